"""A directory that behaves like tracefs, for tests that run without a kernel that traces."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path, PosixPath
from typing import Any

import pytest

from tscwatch.linux import tracefs

STATIC_EVENTS = (
    "syscalls/sys_enter_ioctl",
    "syscalls/sys_exit_ioctl",
    "kvm/kvm_track_tsc",
    "kvm/kvm_update_master_clock",
)
NO_FIELD = "no_such_field"
"""In a filter, the kernel refuses it."""


class TracefsPath(PosixPath):
    """An instance is created and removed with its files; no file is created by writing it."""

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        is_new = not self.exists()
        super().mkdir(mode, parents, exist_ok)
        if is_new and self.parent.name == "instances":
            tracefs_root = self.parent.parent
            shutil.copytree(tracefs_root / "new", Path(self), dirs_exist_ok=True)
            shutil.copytree(tracefs_root / "events", Path(self / "events"))

    def rmdir(self) -> None:
        if self.parent.name != "instances":
            super().rmdir()
        elif (self / "busy").exists():
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        else:
            shutil.rmtree(self)

    def write_text(self, data: str, *arguments: Any, **more: Any) -> int:
        if not self.exists():
            raise FileNotFoundError(self)
        if NO_FIELD in data:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        if (self.parent.name, self.name) == ("events", "enable"):
            for file in self.parent.glob("*/*/enable"):
                Path(file).write_text(data)
        shown = "none" if (self.name, data) == ("filter", "0") else data
        return super().write_text(shown, *arguments, **more)


class FakeTracefs:
    """The directory, and what the kernel and other processes do in it.

    A file ``busy`` in an instance stands for another process that has it open.
    """

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = TracefsPath(directory)
        self.refused = ""
        """The beginning of the definition, without its group, that the kernel refuses."""
        files = {
            "trace_clock": "[local] global boot x86-tsc",
            "options/record-tgid": "0",
            "set_event_pid": "1",
            "tracing_on": "0",
            "buffer_size_kb": "7",
            "buffer_percent": "50",
            "trace_pipe": "",
            "per_cpu/cpu0/stats": "entries: 0\noverrun: 7\nnow ts: 12345\nread events: 0\n",
        }
        for name, text in files.items():
            _write(directory / "new" / name, text)
        for name in ("kprobe_events", "uprobe_events"):
            _write(directory / name, "")
        _write(directory / "events/enable", "0")
        for event in STATIC_EVENTS:
            self.add_event(event)
        (directory / "instances").mkdir()
        monkeypatch.setattr(tracefs, "_append", self.append)

    def instance(self) -> Path:
        """Return the directory of the only instance."""
        (instance,) = (self.root / "instances").iterdir()
        return instance

    def print(self, *lines: str) -> None:
        """Let the kernel write lines to the trace_pipe of the only instance."""
        with (self.instance() / "trace_pipe").open("a") as pipe:
            pipe.write("".join(f"{line}\n" for line in lines))

    def defined(self, file: str) -> list[str]:
        """Return the definitions in ``kprobe_events`` or ``uprobe_events`` without their group."""
        lines = (self.root / file).read_text().splitlines()
        return [line.partition(":")[0] + " " + line.partition("/")[2] for line in lines]

    def event(self, name: str) -> Path:
        """Return the directory of a dynamic event in the only instance."""
        (event,) = self.instance().glob(f"events/tscwatch_*/{name}")
        return event

    def add_event(self, event: str) -> None:
        """Let an event appear, in existing instances too."""
        for directory in (self.root, *(self.root / "instances").glob("*")):
            for name, text in (("enable", "0"), ("filter", "none")):
                _write(directory / "events" / event / name, text)

    def remove_event(self, event: str) -> None:
        """Let an event disappear, with its definition if it is a dynamic one."""
        for directory in (self.root, *(self.root / "instances").glob("*")):
            shutil.rmtree(directory / "events" / event)
        for name in ("kprobe_events", "uprobe_events"):
            lines = (self.root / name).read_text().splitlines(keepends=True)
            kept = [line for line in lines if _event_of(line) != event]
            (self.root / name).write_text("".join(kept))

    def append(self, file: Path, line: str) -> None:
        """Define a dynamic event, or remove one that no instance records."""
        kind, _, rest = line.partition(":")
        event = _event_of(line)
        if kind == "-":
            if event not in map(_event_of, file.read_text().splitlines()):
                raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
            states = self.root.glob(f"instances/*/events/{event}/enable")
            if any(state.read_text() != "0" for state in states):
                raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
            self.remove_event(event)
            return
        if self.refused and rest.partition("/")[2].startswith(self.refused):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        with file.open("a") as definitions:
            definitions.write(line + "\n")
        self.add_event(event)


def _event_of(line: str) -> str:
    return line.split(maxsplit=1)[0].partition(":")[2]


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text(text)
