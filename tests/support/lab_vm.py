"""The lab: a VM with Debian's own kernel, kprobes and (emulated) nested KVM.

It boots this machine's root file system, or another Debian's that lies beside the project::

    python -m tests.support.lab_vm [--root DIRECTORY] COMMAND...
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

ROOT = Path(__file__).resolve().parents[2]
DEBIAN_13 = ROOT / ".lab/trixie"
"""Kernel 6.12, QEMU 10, Python 3.13, bcc 0.31; ``make .lab/trixie`` puts it there."""
_INSIDE = "TSCWATCH_LAB"
_LIMIT_S = 2100

# With a thread for each CPU, TCG can keep a translation of code that another CPU patches at that
# moment. The kernel patches itself at each first and last VM (preempt_notifier_key, in
# __schedule): a CPU that keeps the breakpoint of such a patch traps on it for ever.
EMULATED = ("-cpu", "EPYC,+svm", "-accel", "tcg,thread=single")
"""QEMU's options for a machine with SVM."""


def inside() -> bool:
    return _INSIDE in os.environ


def kernel(root: Path) -> Optional[Path]:
    """The newest kernel of a distribution."""
    images = sorted((root / "boot").glob("vmlinuz-*"), key=lambda path: path.stat().st_mtime)
    return images[-1] if images else None


def run(command: Sequence[str], root: Optional[Path] = None) -> int:
    """Run a command inside the lab, from the project's root; gives its exit status.

    :param root: another distribution's root file system, in place of this machine's; its Python
        finds there what is the distribution's, and the rest where this one does.
    """
    image = kernel(root or Path("/"))
    if image is None:
        print("the lab needs a kernel in /boot: run make setup", file=sys.stderr)
        return 1
    options = []
    if root is not None:
        (root / str(ROOT).lstrip("/")).mkdir(parents=True, exist_ok=True)
        options = ["--root", str(root), "--rwdir", f"{ROOT}={ROOT}"]
    # Files of the VM's own are faster, and nobody clears them away.
    inner = (
        f"modprobe kvm-amd && cd {ROOT} && mkdir /run/lab && exec env {_INSIDE}=1 "
        f"PYTHONPATH={sysconfig.get_path('purelib')} TMPDIR=/run/lab {shlex.join(command)}"
    )
    bin_directory = Path(sys.executable).parent
    # Its error output is the emulator's chatter, and of use only when it fails.
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [
                str(bin_directory / "vng"),
                *("--disable-kvm", "--run", str(image), "--cpus", "2", "--memory", "3G", "--rw"),
                *options,
                *(f"--qemu-opts={' '.join(EMULATED)}", "--", inner),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, "PATH": f"{bin_directory}:{os.environ['PATH']}"},
            cwd=root,
            start_new_session=True,
        )
        limit = threading.Timer(_LIMIT_S, os.killpg, (process.pid, signal.SIGKILL))
        limit.start()
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
        status = process.wait()
        limit.cancel()
        if status:
            errors.seek(0)
            print(errors.read(), f"the lab ended with {status}", sep="\n", file=sys.stderr)
    return status


def main(arguments: Sequence[str]) -> int:
    if arguments[:1] == ["--root"]:
        return run(arguments[2:], Path(arguments[1]).resolve())
    return run(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
