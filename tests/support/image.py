"""Runs the container image with runc(8), confined as in production.

As a program, it executes runc in its place::

    python -m tests.support.image [--without NAME]... BUNDLE NAME [COMMAND...]

Without a command, the container runs the image's own, in a network namespace of its own.  A command
is that of an :class:`~tests.support.observer.Observer`, ``python -m tscwatch ARGUMENTS...``, of
which the arguments count; the container then shares the host's network, for the observer's port.

Umoci unpacks the image: it is an independent reader of what ``make image`` writes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from argparse import REMAINDER, ArgumentParser
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from tests.support.container import CAPABILITIES, ROOT
from tscwatch import __version__

ARCHIVE = ROOT / f"build/tscwatch_{__version__}_oci.tar"
DEBUGFS, TRACEFS = "/sys/kernel/debug", "/sys/kernel/tracing"
KVM = Path("/dev/kvm")
HOST_PROCESSES = "HOST_PROCESSES"
RIGHTS = (*CAPABILITIES, DEBUGFS, TRACEFS, str(KVM), HOST_PROCESSES)

_CONFIG = "/etc/tscwatch/tscwatch.yaml"
_SECCOMP = Path("/usr/share/containers/seccomp.json")


def unpack(directory: Path) -> Path:
    """Unpack the image, and return the directory that holds ``rootfs`` and ``config.json``."""
    layout, bundle = directory / "layout", directory / "bundle"
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(layout)
    command = ["umoci", "unpack", "--image", f"{layout}:{__version__}", str(bundle)]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    return bundle


def within(bundle: Path, name: str, *without: str) -> list[str]:
    """Return the command that runs a container with this name.

    :param without: the members of :data:`RIGHTS` that it does not get.
    """
    options = [f"--without={right}" for right in without]
    return [sys.executable, "-m", "tests.support.image", *options, str(bundle), name]


def config(bundle: Path, arguments: Sequence[str], without: Collection[str]) -> dict[str, Any]:
    """Return the configuration that umoci made of the image's, with what production adds.

    :param arguments: those of tscwatch; without any, the image's own.
    """
    text: dict[str, Any] = json.loads((bundle / "config.json").read_text())
    mounts = [mount for mount in text["mounts"] if mount["type"] in ("proc", "tmpfs", "sysfs")]
    mounts.append({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"})
    mounts += [_bind(DEBUGFS, DEBUGFS, "ro")] if DEBUGFS not in without else []
    mounts += [_bind(TRACEFS, TRACEFS)] if TRACEFS not in without else []
    namespaces = ["mount", "ipc", "uts", *(["pid"] if HOST_PROCESSES in without else [])]
    if arguments:
        file = arguments[arguments.index("--config") + 1]
        mounts.append(_bind(file, _CONFIG, "ro"))
        text["process"]["args"][1:] = [_CONFIG if word == file else word for word in arguments]
    else:
        namespaces.append("network")
    capabilities = [name for name in CAPABILITIES if name not in without]
    text["process"].update(
        terminal=False,
        capabilities=dict.fromkeys(("bounding", "effective", "permitted"), capabilities),
    )
    kvm = [_kvm()] if str(KVM) not in without else []
    denied = {"allow": False, "access": "rwm"}
    allowed = [{**device, "allow": True, "access": "rw"} for device in kvm]
    text["linux"].update(
        namespaces=[{"type": kind} for kind in namespaces],
        devices=[{**device, "path": str(KVM)} for device in kvm],
        resources={"devices": [denied, *allowed]},
        seccomp=_seccomp(capabilities),
    )
    text["root"] = {"path": str(bundle / "rootfs"), "readonly": True}
    return {**text, "mounts": mounts}


def _bind(source: str, destination: str, *options: str) -> dict[str, Any]:
    options = ("rbind", *options)
    return {"destination": destination, "type": "bind", "source": source, "options": options}


def _kvm() -> dict[str, Any]:
    number = KVM.stat().st_rdev
    return {"type": "c", "major": os.major(number), "minor": os.minor(number)}


def _seccomp(capabilities: Collection[str]) -> dict[str, Any]:
    """Return podman's default profile in the form of the OCI runtime specification.

    A rule of it may depend on the container's capabilities and on the architecture.
    """
    profile = json.loads(_SECCOMP.read_text())

    def applies(rule: dict[str, Any]) -> bool:
        includes, excludes = rule.get("includes") or {}, rule.get("excludes") or {}
        return (
            set(includes.get("caps", ())) <= set(capabilities)
            and not set(excludes.get("caps", ())) & set(capabilities)
            and "amd64" in includes.get("arches", ("amd64",))
        )

    kept = ("names", "action", "args", "errnoRet")
    rules = [rule for rule in profile["syscalls"] if applies(rule)]
    return {
        "defaultAction": profile["defaultAction"],
        "defaultErrnoRet": profile["defaultErrnoRet"],
        "architectures": ["SCMP_ARCH_X86_64"],
        "syscalls": [{key: rule[key] for key in kept if rule.get(key)} for rule in rules],
    }


def main() -> None:
    parser = ArgumentParser()
    parser.add_argument("--without", action="append", choices=RIGHTS, default=[])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("name")
    parser.add_argument("command", nargs=REMAINDER)
    given = parser.parse_args()
    directory: Path = given.bundle.parent / given.name
    directory.mkdir(exist_ok=True)
    text = config(given.bundle, given.command[len(("python", "-m", "tscwatch")) :], given.without)
    (directory / "config.json").write_text(json.dumps(text))
    os.execvp("runc", ["runc", "run", "--bundle", str(directory), given.name])


if __name__ == "__main__":
    main()
