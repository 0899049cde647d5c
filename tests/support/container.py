"""Runs a command in a container, with runc(8) and this machine's file system, read-only.

As a program, it executes runc in its place::

    python -m tests.support.container [--own-processes] [--no-devices] DIRECTORY COMMAND...
"""

from __future__ import annotations

import json
import os
import sys
from argparse import REMAINDER, ArgumentParser
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CAPABILITIES = ["CAP_SYS_ADMIN", "CAP_SYS_PTRACE", "CAP_DAC_READ_SEARCH"]
_HOST_DIRECTORIES = ("/usr", "/lib", "/lib64", "/bin", "/sbin", "/etc", "/dev", "/sys", "/tmp")


def within(directory: Path, *options: str) -> list[str]:
    """Return the command that runs another one in a container; see the options above.

    :param directory: an empty one, for the container's files.
    """
    return [sys.executable, "-m", "tests.support.container", *options, str(directory)]


def config(command: list[str], own_processes: bool, devices: bool) -> dict[str, Any]:
    """Return the container's configuration (the OCI runtime specification's ``config.json``).

    :param own_processes: give it a process namespace of its own.
    :param devices: allow it to open all devices.
    """
    namespaces = ["mount", "ipc", "uts"]
    mounts = [_bind(path) for path in (*_HOST_DIRECTORIES, str(ROOT), sys.prefix)]
    if own_processes:
        namespaces.append("pid")
        mounts.insert(0, {"destination": "/proc", "type": "proc", "source": "proc"})
    else:
        mounts.insert(0, _bind("/proc"))
    return {
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": command,
            "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"],
            "cwd": str(ROOT),
            "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), CAPABILITIES),
        },
        "root": {"path": "rootfs", "readonly": True},
        "mounts": mounts,
        "linux": {
            "namespaces": [{"type": kind} for kind in namespaces],
            "resources": {"devices": [{"allow": devices, "access": "rwm"}]},
        },
    }


def _bind(path: str) -> dict[str, Any]:
    return {"destination": path, "type": "bind", "source": path, "options": ["rbind"]}


def main() -> None:
    parser = ArgumentParser()
    parser.add_argument("--own-processes", action="store_true")
    parser.add_argument("--no-devices", action="store_true")
    parser.add_argument("directory", type=Path)
    parser.add_argument("command", nargs=REMAINDER)
    arguments = parser.parse_args()
    directory: Path = arguments.directory
    (directory / "rootfs").mkdir(parents=True)
    text = config(arguments.command, arguments.own_processes, not arguments.no_devices)
    (directory / "config.json").write_text(json.dumps(text))
    name = f"tscwatch-{os.getpid()}"
    os.execvp("runc", ["runc", "run", "--bundle", str(directory), name])


if __name__ == "__main__":
    main()
