"""Runs guests under the real libvirt, and starts its daemons if they are not running."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.support.guests import MACHINE, PATIENCE_S, QEMU, TRACES, wait_for

_DOMAIN = """
<domain type='kvm'>
  <name>{name}</name>
  <metadata>{metadata}</metadata>
  <memory unit='MiB'>64</memory>
  <vcpu current='2'>4</vcpu>
  <os><type arch='x86_64' machine='{machine}'>hvm</type></os>
  <cpu mode='custom' match='exact' check='none'>
    <model>qemu64</model>
    <feature policy='disable' name='arch-capabilities'/>
  </cpu>
  <devices><emulator>{emulator}</emulator><memballoon model='none'/></devices>
</domain>
"""
# libvirt also runs the emulator to probe its capabilities; only the guest itself is traced. With
# -D, strace is a grandchild, so that libvirt's child is QEMU itself.
_TRACED = """#!/bin/sh
case "$*" in
*guest={name},*) exec strace -D -A -f -qq -e trace=ioctl -e signal=none -o {trace} {qemu} "$@" ;;
esac
exec {qemu} "$@"
"""


def virsh(*arguments: str) -> str:
    """Run virsh and return its standard output.

    :raises RuntimeError: it failed.
    """
    result = subprocess.run(
        ["virsh", "-c", "qemu:///system", *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    if result.returncode:
        raise RuntimeError(f"virsh {' '.join(arguments)}: {result.stderr.strip()}")
    return result.stdout


@contextmanager
def daemons(directory: Path) -> Iterator[None]:
    """Keep libvirtd and virtlogd running, which are started if libvirt does not answer."""
    with ExitStack() as stack:
        if not _answers():
            for program in ("virtlogd", "libvirtd"):
                with (directory / f"{program}.log").open("wb") as log:
                    daemon = subprocess.Popen([program], stdout=log, stderr=log)
                stack.callback(daemon.wait, PATIENCE_S)
                stack.callback(daemon.terminate)
            wait_for(_answers, "libvirt to answer")
        yield


def _answers() -> bool:
    try:
        virsh("list")
    except RuntimeError:
        return False
    return True


@contextmanager
def domain(directory: Path, name: str, metadata: str = "") -> Iterator[str]:
    """Define a guest with two of at most four vCPUs, and yield its name; undefine it at the end.

    :param metadata: XML elements, each in a namespace of its own.
    """
    description = directory / f"{name}.xml"
    emulator = _emulator(directory, name)
    content = _DOMAIN.format(name=name, metadata=metadata, machine=MACHINE.get(), emulator=emulator)
    description.write_text(content)
    virsh("define", str(description))
    try:
        yield name
    finally:
        if "running" in virsh("domstate", name):
            virsh("destroy", name)
        virsh("undefine", name, "--managed-save")


def _emulator(directory: Path, name: str) -> Path:
    qemu = Path("/usr/bin") / QEMU
    traces = TRACES.get()
    if traces is None:
        return qemu
    trace, wrapper = traces / f"{name}.strace", directory / f"{name}.sh"
    trace.touch()
    trace.chmod(0o666)  # libvirt runs QEMU, and so strace, as another user
    for parent in traces, directory:
        parent.chmod(0o755)
    wrapper.write_text(_TRACED.format(name=name, trace=trace, qemu=qemu))
    wrapper.chmod(0o755)
    return wrapper
