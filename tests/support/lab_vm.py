"""Runs a command in the lab VM, which has Debian's kernel with kprobes and (emulated) nested KVM.

The VM boots this machine's root file system, or that of another Debian in a directory, which has
neither bcc nor kernel headers.  There, a Debian package's files are run instead of the checkout's::

    python -m tests.support.lab_vm [--root DIRECTORY PACKAGE] COMMAND...

The tests in ``tests/lab`` run only inside it.
"""

from __future__ import annotations

import compileall
import fcntl
import os
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Optional

from tscwatch.linux.compiler import CACHE

ROOT = Path(__file__).resolve().parents[2]
DEBIAN_11, DEBIAN_13, DEBIAN_SID = (
    ROOT / ".lab" / suite for suite in ("bullseye", "trixie", "sid")
)
"""Root file systems that ``make matrix`` boots: Linux 5.10, QEMU 5.2 and Python 3.9; Linux 6.12,
QEMU 10 and Python 3.13; and the newest of each."""
BYTECODE = ROOT / "build/bpf"
"""What ``make bpf`` compiles."""
_INSIDE = "TSCWATCH_LAB"
_BIN = Path(sys.executable).parent
_MODULE_SOURCES = ROOT / "tests/lab/kvm_scales"
SCALING_MODULE = ROOT / ".lab/kvm_scales/kvm_scales.ko"
"""See :func:`scaling`."""
_LIMIT_S = 3600
"""After this time the VM is killed."""

# With one thread per CPU, TCG can keep the translation of code that another CPU is patching at that
# moment. The kernel patches itself whenever the first VM starts or the last one ends
# (preempt_notifier_key, in __schedule), and a CPU that keeps the breakpoint of such a patch traps
# on it forever.
EMULATED = ("-cpu", "EPYC,+svm", "-accel", "tcg,thread=single")
"""QEMU's options for an emulated machine with SVM."""

# The root file system that virtme-ng mounts asks the host at every read. A second mount of the same
# files has a cache; with it, tests take half the time. What is in these directories must not change
# while the VM runs.
_READ_ONLY = ("/usr", *(str(ROOT / name) for name in (".venv", "tscwatch", "tests/support")))
_SHARE = "security_model=none,multidevs=remap,readonly=on"
_MOUNT = "mount -t 9p -o ro,trans=virtio,version=9p2000.L,cache=loose,msize=524288 cached"


def inside() -> bool:
    """Return whether this process runs inside the lab VM."""
    return _INSIDE in os.environ


def kernel(root: Path) -> Optional[Path]:
    """Return the newest image of ``linux-image-amd64`` in a root file system, if there is one.

    Debian's kernel for clouds does not have 9p, with which the VM mounts its root.
    """
    found = (root / "boot").glob("vmlinuz-*[0-9]-amd64")
    images = sorted(found, key=lambda path: path.stat().st_mtime)
    return images[-1] if images else None


def missing(root: Optional[Path] = None) -> list[str]:
    """Return what the lab VM needs and this machine lacks, in words."""
    found = {
        f"a kernel in {root or ''}/boot": kernel(root or Path("/")),
        "virtme-ng": shutil.which("vng", path=_BIN),
        "QEMU": shutil.which("qemu-system-x86_64"),
        "busybox": shutil.which("busybox"),
    }
    return [name for name, path in found.items() if path is None]


def build_scaling_module(image: Path) -> None:
    """Build :data:`SCALING_MODULE` for a kernel of this machine, if it is not up to date."""
    headers = Path("/usr/src", f"linux-headers-{image.name.partition('-')[2]}")
    if not headers.is_dir():
        print(f"Without {headers}, KVM in the lab VM does not scale the TSC.", file=sys.stderr)
        return
    SCALING_MODULE.parent.mkdir(parents=True, exist_ok=True)
    with (SCALING_MODULE.parent / "lock").open("w") as lock:  # two VMs may start at once
        fcntl.flock(lock, fcntl.LOCK_EX)
        _make_scaling_module(headers)


def _make_scaling_module(headers: Path) -> None:
    for source in _MODULE_SOURCES.iterdir():
        copy = SCALING_MODULE.with_name(source.name)
        if not copy.exists() or copy.read_bytes() != source.read_bytes():
            shutil.copy(source, copy)
    subprocess.run(
        ["make", "-s", "-C", str(headers), f"M={copy.parent}", "modules"],
        check=True,
        stderr=subprocess.DEVNULL,  # this kernel's types, which are missing, are not needed
    )


def can_scale() -> bool:
    """Return whether this is the lab VM, with the kernel that :data:`SCALING_MODULE` is for."""
    if not inside() or not SCALING_MODULE.exists():
        return False
    return f"vermagic={os.uname().release} ".encode() in SCALING_MODULE.read_bytes()


@contextmanager
def scaling() -> Iterator[None]:
    """Make KVM believe that the hardware scales the TSC, inside the lab VM.

    The emulated CPU does not, so a guest itself does not see the rate.  All that KVM computes from
    it is as on a host that scales: ratios, offsets, its count and its master clock.
    """
    subprocess.run(["insmod", str(SCALING_MODULE)], check=True)
    try:
        yield
    finally:
        subprocess.run(["rmmod", SCALING_MODULE.stem], check=True)


def _prepare(root: Optional[Path]) -> str:
    """Return the shell command that makes reading fast inside the VM, and compiling unnecessary.

    The bytecode of the BPF programs does not depend on the kernel (:mod:`tscwatch.linux.compiler`).
    """
    read_only = _READ_ONLY if root is None else _READ_ONLY[:1]
    commands = [f"mkdir /run/cached && {_MOUNT} /run/cached"]
    commands += [f"mount --bind /run/cached{path} {path}" for path in read_only]
    if root is None and BYTECODE.exists():
        commands.append(f"mkdir -m 700 {CACHE} && cp {BYTECODE}/*.json {CACHE}")
    return " && ".join(commands)


def run(command: Sequence[str], root: Optional[Path] = None) -> int:
    """Run a command inside the lab VM, in the project's root directory; return its exit status.

    :param root: another distribution's root file system, instead of this machine's.  Its Python
        also finds the packages of this Python's virtual environment.
    """
    image = kernel(root or Path("/"))
    if image is None or missing(root):
        lacking = ", ".join(missing(root))
        print(f"The lab VM needs {lacking}: run `make setup-lab`.", file=sys.stderr)
        return 1
    options = []
    if root is None:
        build_scaling_module(image)
        for directory in _READ_ONLY[2:]:  # the VM cannot store what Python compiles
            compileall.compile_dir(directory, quiet=2)
    else:
        (root / str(ROOT).lstrip("/")).mkdir(parents=True, exist_ok=True)
        options = ["--root", str(root), "--rwdir", f"{ROOT}={ROOT}"]
    share = f"local,id=cached,path={root or '/'},{_SHARE}"
    devices = ("-fsdev", share, "-device", "virtio-9p-pci,fsdev=cached,mount_tag=cached")
    # The VM's own tmpfs is faster than the shared file system, and needs no clean-up.
    inner = (
        f"modprobe kvm-amd && mkdir /run/lab && {_prepare(root)} && cd {ROOT} && "
        f"exec env {_INSIDE}=1 PYTHONPATH={sysconfig.get_path('purelib')} TMPDIR=/run/lab "
        f"{shlex.join(command)}"
    )
    # Standard error has messages of the emulator, which matter only if the command fails.
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [
                str(_BIN / "vng"),
                *("--disable-kvm", "--run", str(image), "--cpus", "2", "--memory", "3G", "--rw"),
                # Emulated, the TSC looks unstable, and KVM would do without its master clock.
                *("--append", "tsc=reliable"),
                *options,
                *(f"--qemu-opts={' '.join((*EMULATED, *devices))}", "--", inner),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, "PATH": f"{_BIN}:{os.environ['PATH']}"},
            cwd=root,
            start_new_session=True,
        )
        limit = threading.Timer(_LIMIT_S, os.killpg, (process.pid, signal.SIGKILL))
        limit.start()
        assert process.stdout is not None
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
            status = process.wait()
        finally:
            limit.cancel()
            with suppress(ProcessLookupError):  # it is still there if this one is interrupted
                os.killpg(process.pid, signal.SIGKILL)
        if status:
            errors.seek(0)
            print(errors.read(), file=sys.stderr)
            print(f"The lab VM exited with status {status}.", file=sys.stderr)
    return status


def run_package(package: str, command: Sequence[str], root: Path) -> int:
    """Run a command inside the lab VM, with a package's files in the place of the checkout's.

    :param package: the path of a Debian package, from the project's root directory.
    """
    files = "/run/package"
    script = (
        f"dpkg-deb -x {package} {files} && "
        f"mount --bind {files}/usr/lib/python3/dist-packages/tscwatch tscwatch && "
        f"exec {shlex.join(command)}"
    )
    return run(["sh", "-c", script], root)


def main(arguments: Sequence[str]) -> int:
    if arguments[:1] == ["--root"]:
        return run_package(arguments[2], arguments[3:], Path(arguments[1]).resolve())
    return run(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
