"""Kernel headers for bcc to compile with.

bcc wants a kernel header tree even for a program that uses none.  Ours reads the kernel by
BTF, so headers of any kernel of this architecture serve; but bcc itself only looks for those
of the running one, and its ``BCC_KERNEL_SOURCE`` does not understand trees that Debian and
SUSE split in two.  So another kernel's tree is laid together in a private directory.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tscwatch.errors import HeadersMissing

_MODULES = Path("/lib/modules")
_SOURCES = Path("/usr/src")
_PARTS = ("include", "arch/x86/include")

REMEDY = (
    "install them with 'apt-get install linux-headers-amd64' (Debian), "
    "'apt-get install linux-headers-generic' (Ubuntu) or 'dnf install kernel-devel' (Fedora, EL)"
)


@contextmanager
def for_bcc(modules: Path = _MODULES, sources: Path = _SOURCES) -> Iterator[None]:
    """While this holds, bcc finds headers.

    :raises HeadersMissing: there are none on this host.
    """
    running = modules / os.uname().release
    if "BCC_KERNEL_SOURCE" in os.environ or _is_whole(_trees(running)):
        yield
        return
    with tempfile.TemporaryDirectory(prefix="tscwatch-headers-") as private:
        _lay_together(find(modules, sources), Path(private))
        os.environ["BCC_KERNEL_SOURCE"] = private
        try:
            yield
        finally:
            del os.environ["BCC_KERNEL_SOURCE"]


def find(modules: Path = _MODULES, sources: Path = _SOURCES) -> list[Path]:
    """The newest header tree of any kernel, in one part or in two (build, source).

    :raises HeadersMissing: there are none on this host.
    """
    candidates = [_trees(kernel) for kernel in _newest_first(modules, "*")]
    candidates += [[tree] for tree in _newest_first(sources, "linux-headers-*")]
    candidates += [[tree] for tree in _newest_first(sources / "kernels", "*")]
    for trees in candidates:
        if _is_whole(trees):
            return trees
    raise HeadersMissing(f"bcc cannot compile without kernel headers, of any version: {REMEDY}")


def _trees(kernel: Path) -> list[Path]:
    return [kernel / name for name in ("build", "source") if (kernel / name).is_dir()]


def _newest_first(directory: Path, pattern: str) -> list[Path]:
    return sorted(directory.glob(pattern), key=_version, reverse=True)


def _version(path: Path) -> list[int]:
    return [int(number) for number in "".join(c if c.isdigit() else " " for c in path.name).split()]


def _is_whole(trees: list[Path]) -> bool:
    if not all(is_trusted(tree.stat()) for tree in trees):
        return False
    wanted = ("include/linux/kconfig.h", "include/generated/autoconf.h", "arch/x86/include/asm")
    return all(any((tree / name).exists() for tree in trees) for name in wanted)


def is_trusted(status: os.stat_result) -> bool:
    """Whether nobody but root, or who runs us, can have written it."""
    writable = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return status.st_uid in (0, os.geteuid()) and not writable


def _lay_together(trees: list[Path], target: Path) -> None:
    for part in _PARTS:
        merged = target / part
        merged.mkdir(parents=True)
        for tree in trees:
            for entry in (tree / part).glob("*"):
                link = merged / entry.name
                if not link.exists():
                    link.symlink_to(entry.resolve())
