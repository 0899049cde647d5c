"""Whether KVM is there: it may be built in, loaded late, unloaded, and loaded again."""

from __future__ import annotations

from pathlib import Path
from typing import Optional

_MODULE = Path("/sys/module/kvm")


def load_number(module: Path = _MODULE) -> Optional[int]:
    """A number that differs after each load of the module; None while it is not loaded."""
    try:
        if is_loadable(module) and (module / "initstate").read_text().strip() != "live":
            return None
        return module.stat().st_ino
    except OSError:
        return None


def is_loadable(module: Path = _MODULE) -> bool:
    """Whether KVM is a module; one that is built in has no load state."""
    return (module / "initstate").exists()
