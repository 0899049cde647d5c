"""Runs ``make demo`` in a bare Debian, with ``/dev/kvm`` or without it: ``make test-bare``.

A tree has what debootstrap's variant ``minbase`` has, make, git and the certificates of the web, so
that nothing which this machine has can hide what a make target lacks.  In a clone of the last
commit, ``make demo`` must install all that it needs, and succeed: with this machine's KVM, or in
the lab VM.  The kernel is this machine's::

    python -m tests.programs.bare RELEASE with|without
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.support.lab_vm import ROOT
from tscwatch.linux.kvm import DEV_KVM

OPTIONS = (
    *("--quiet", "--variant=minbase", "--include=make,git,ca-certificates"),
    "--dpkgopt=force-unsafe-io",  # the tree need not survive a crash
)
PASSED = "\nEvery call was reported with the right phase and step, and the skew was found.\n"
IN_LAB = "so it runs in the lab VM"

# The tree has a /dev of its own: packages change the group of /dev/kvm when they are installed
# (udev's postinst and systemd's tmpfiles.d).
ENTER = """
    mount --rbind /proc "$0/proc" && mount --rbind /sys "$0/sys" &&
    mount -t devpts none "$0/dev/pts" && mount -t tmpfs none "$0/dev/shm" && exec chroot "$0" "$@"
"""
# This machine may reach the registries by a proxy, or with a certificate of its own.
PASSED_ON = re.compile(r"PIP_\w+|\w+_proxy|\w+_PROXY|SSL_CERT_\w+")
CERTIFICATES = Path("usr/local/share/ca-certificates")


def enter(tree: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a tree, and return its status and its output."""
    environment = {name: value for name, value in os.environ.items() if PASSED_ON.fullmatch(name)}
    environment.update(HOME="/root", PATH="/usr/sbin:/usr/bin:/sbin:/bin")
    return subprocess.run(
        ["unshare", "--mount", "sh", "-c", ENTER, str(tree), *command],
        check=False,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


def make_tree(release: str, directory: Path) -> Path:
    """Make a bare Debian with a clone of this repository, which gets packages as this machine."""
    tree, options = directory / "tree", directory / "apt.conf"
    dump = subprocess.run(["apt-config", "dump", "Acquire"], check=True, capture_output=True)
    options.write_bytes(dump.stdout)
    command = ["mmdebstrap", *OPTIONS, f"--aptopt={options}", release, str(tree)]
    subprocess.run(command, check=True)
    if Path("/etc/pip.conf").exists():
        shutil.copy("/etc/pip.conf", tree / "etc")
    shutil.copytree("/" / CERTIFICATES, tree / CERTIFICATES, dirs_exist_ok=True)
    assert enter(tree, "update-ca-certificates").returncode == 0
    subprocess.run(
        ["git", "clone", "-q", f"file://{ROOT}", str(tree / "root/tscwatch")], check=True
    )
    return tree


def demonstrate(tree: Path, in_lab: bool) -> None:
    """Run ``make demo``, which must run in the lab VM if, and only if, there is no KVM."""
    demo = enter(tree, "make", "-C", "/root/tscwatch", "demo")
    is_right = (
        demo.returncode == 0
        and PASSED in demo.stdout
        and demo.stdout.count(IN_LAB) == in_lab
        and "Traceback" not in demo.stdout
    )
    if not is_right:
        sys.exit(f"{demo.stdout}\nFAILED: make demo exited with status {demo.returncode}")


def main(release: str, kvm: str) -> None:
    began = time.monotonic()

    def report(what: str) -> None:
        print(f"{release} {kvm} KVM: {time.monotonic() - began:4.0f} s  {what}", flush=True)

    with tempfile.TemporaryDirectory(prefix=f"{release}-") as name:
        tree = make_tree(release, Path(name))
        if kvm == "with":
            os.mknod(tree / "dev/kvm", stat.S_IFCHR | 0o600, DEV_KVM.stat().st_rdev)
        report("the bare tree is there")
        demonstrate(tree, in_lab=kvm == "without")
        report("make demo has passed")


if __name__ == "__main__":
    main(*sys.argv[1:])
