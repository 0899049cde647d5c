"""The lab: a VM with Debian's own kernel, kprobes and (emulated) nested KVM."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

ROOT = Path(__file__).resolve().parent.parent
_INSIDE = "TSCWATCH_LAB"
_LIMIT_S = 1500


def inside() -> bool:
    return _INSIDE in os.environ


def kernel() -> Optional[Path]:
    """The newest kernel of the distribution's on this machine."""
    images = sorted(Path("/boot").glob("vmlinuz-*"), key=lambda path: path.stat().st_mtime)
    return images[-1] if images else None


def run(command: Sequence[str]) -> int:
    """Run a command inside the lab, from the project's root; gives its exit status."""
    image = kernel()
    if image is None:
        print("the lab needs a kernel in /boot: run make setup", file=sys.stderr)
        return 1
    # The VM shares this machine's /tmp; its own files are faster, and nobody clears them away.
    inner = (
        f"modprobe kvm-amd && cd {ROOT} && mkdir /run/lab && "
        f"exec env {_INSIDE}=1 TMPDIR=/run/lab {shlex.join(command)}"
    )
    bin_directory = Path(sys.executable).parent
    # To files, not to our own output: the VM's console stops when it is a pipe that fills.
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        status = subprocess.run(
            [
                str(bin_directory / "vng"),
                *("--disable-kvm", "--run", str(image), "--cpus", "2", "--memory", "3G", "--rw"),
                *("--qemu-opts=-cpu EPYC,+svm", "--", inner),
            ],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            env={**os.environ, "PATH": f"{bin_directory}:{os.environ['PATH']}"},
            timeout=_LIMIT_S,
            check=False,
        ).returncode
        output.seek(0)
        print(output.read(), flush=True)
        if status:
            errors.seek(0)
            print(errors.read(), file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
