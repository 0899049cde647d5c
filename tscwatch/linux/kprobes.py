"""The kernel's switch for all kprobes of the host (``Documentation/trace/kprobes.rst``)."""

from __future__ import annotations

import logging
from pathlib import Path

from tscwatch.linux.files import read_text

log = logging.getLogger(__name__)

_SWITCH = Path("/sys/kernel/debug/kprobes/enabled")


class KprobesSwitch:
    """Follows the switch.  Whoever has turned it off may have had a reason, so it is only read."""

    def __init__(self, file: Path = _SWITCH) -> None:
        self.is_on = True
        """As of the last :meth:`read`."""
        self.gaps = 0
        """How often it was off."""
        self._file = file

    def read(self) -> bool:
        """Read the switch, and log a change; return whether it was off until now, and is on."""
        # Without debugfs, the file cannot be read, and nobody can turn the switch off.
        was_on, self.is_on = self.is_on, read_text(self._file) != "0"
        if was_on and not self.is_on:
            self.gaps += 1
            log.warning("all kprobes of this host are off: write 1 to %s", self._file)
        return self.is_on and not was_on
