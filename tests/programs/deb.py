"""Tests the Debian package in clean Debian trees: ``make test-deb``.

In each tree, apt installs the package with its dependencies, and the program is run; then the
package is removed and purged, after which none of its files may be left.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

RELEASES = ("bookworm", "trixie")


def inside(tree: Path, *command: str) -> str:
    """Run a command in a tree and return its standard output.

    :raises CalledProcessError: it failed.
    """
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "DEBIAN_FRONTEND": "noninteractive"}
    return subprocess.run(
        ["chroot", str(tree), *command],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ).stdout


def files(tree: Path) -> set[str]:
    """Return the paths below ``/usr`` and ``/etc`` whose names contain ``tscwatch``."""
    return {
        str(path.relative_to(tree))
        for top in ("usr", "etc")
        for path in (tree / top).rglob("*")
        if "tscwatch" in str(path.relative_to(tree))
    }


def check(release: str, package: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=f"{release}-") as name:
        tree = Path(name)
        subprocess.run(["debootstrap", "--variant=minbase", release, name], check=True)
        shutil.copy(package, tree / "tmp/tscwatch.deb")
        inside(tree, "apt-get", "install", "-qy", "--no-install-recommends", "/tmp/tscwatch.deb")
        assert inside(tree, "tscwatch", "--version").startswith("tscwatch ")
        assert "kvm_arch_init_vcpu" in inside(tree, "tscwatch", "explain", "boot")
        bytecode = "from tscwatch.capture import ebpf; print(ebpf.is_packaged())"
        assert inside(tree, "python3", "-c", bytecode) == "True\n"
        for file in (
            "usr/lib/systemd/system/tscwatch.service",
            "usr/share/man/man1/tscwatch.1.gz",
            "usr/share/bash-completion/completions/tscwatch",
            "etc/tscwatch/tscwatch.yaml",
        ):
            assert (tree / file).is_file(), file
        assert not list((tree / "etc/systemd").rglob("tscwatch*"))  # the service is not enabled
        inside(tree, "apt-get", "remove", "-qy", "tscwatch")
        assert files(tree) == {"etc/tscwatch", "etc/tscwatch/tscwatch.yaml"}
        inside(tree, "apt-get", "purge", "-qy", "tscwatch")
        assert files(tree) == set()
    print(f"{release}: the package was installed, run, removed and purged")


def main() -> None:
    for release in RELEASES:
        check(release, Path(sys.argv[1]))


if __name__ == "__main__":
    main()
