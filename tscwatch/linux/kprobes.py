"""The kernel's switches for all kprobes of the host.

One is for kprobes (``Documentation/trace/kprobes.rst``).  The other is for ftrace, which calls the
kprobes at a function's entry (``CONFIG_KPROBES_ON_FTRACE``; ``ftrace_shutdown_sysctl``).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from tscwatch.linux.files import read_text

log = logging.getLogger(__name__)

SWITCHES = (Path("/sys/kernel/debug/kprobes/enabled"), Path("/proc/sys/kernel/ftrace_enabled"))


class KprobesSwitch:
    """Follows the switches, and leaves them alone: whoever turned one off may have a reason."""

    def __init__(self, files: Sequence[Path] = SWITCHES) -> None:
        self.is_on = True
        """As of the last :meth:`read`."""
        self.gaps = 0
        """How often one was found off."""
        self._files = files

    def read(self) -> bool:
        """Read the switches, and log if one was turned off; return True if all are on again.

        A file that cannot be read is one that nobody can write: debugfs is not mounted, or the
        kernel does not have it.
        """
        off = [str(file) for file in self._files if read_text(file) == "0"]
        was_on, self.is_on = self.is_on, not off
        if was_on and off:
            self.gaps += 1
            log.warning("all kprobes of this host are off: write 1 to %s", " and ".join(off))
        return self.is_on and not was_on
