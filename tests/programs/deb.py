"""Tests the packages and the image that ``make rpm image`` has made: ``make test-deb``.

Another build must yield the same files, in another directory but for the RPMs, and lintian must
find no error and no warning.  In clean trees of Debian's releases, the Debian package is upgraded
from an old one, removed and purged, and installed anew; one tree also builds it from the source
package, with the pure tests.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.support import checkout
from tests.support.lab_vm import ROOT

RELEASES = ("bookworm", "trixie", "sid")
BUILDS = "sid"
# A mirror may be a snapshot, whose indices have expired.
OPTIONS = (
    *("--quiet", "--variant=apt", "--skip=cleanup/apt/lists", "--dpkgopt=force-unsafe-io"),
    '--aptopt=Acquire::Check-Valid-Until "false"',
)

PATTERNS = (
    *("dist/*", "build/bpf/*", "build/rpm/**/*.rpm", "build/*.tar"),
    *(f"build/deb/*.{kind}" for kind in ("deb", "dsc", "tar.*")),
)
SUFFIXES = {".rpm", ".gz", ".whl", ".json", ".deb", ".dsc", ".xz", ".tar"}

MODULES = "usr/lib/python3/dist-packages/tscwatch"
CONFIGURATION = "etc/tscwatch/tscwatch.yaml"
ENABLED = "etc/systemd/system/multi-user.target.wants/tscwatch.service"
UNIT = "usr/lib/systemd/system/tscwatch.service"
FILES = (
    CONFIGURATION,
    UNIT,
    "usr/share/man/man1/tscwatch.1.gz",
    "usr/share/bash-completion/completions/tscwatch",
    "usr/share/zsh/vendor-completions/_tscwatch",
    *(
        f"usr/share/doc/tscwatch/{name}"
        for name in ("changelog.gz", "copyright", "README.md", "RUNBOOK.md", "SECURITY.md")
    ),
)

OLD = {
    "DEBIAN/control": """\
Package: tscwatch
Version: 0.1.0
Architecture: all
Maintainer: root <root@localhost>
Depends: python3
Description: a package of the time before debhelper
""",
    "DEBIAN/conffiles": f"/{CONFIGURATION}\n",
    "DEBIAN/postinst": "#!/bin/sh\npy3compile -p tscwatch\n",
    "DEBIAN/prerm": "#!/bin/sh\npy3clean -p tscwatch\n",
    f"{MODULES}/__init__.py": "",
    f"{MODULES}/removed_since.py": "",
    UNIT: "",
    CONFIGURATION: (ROOT / "deploy/tscwatch.yaml").read_text(),
}


def digests(directory: Path) -> dict[str, str]:
    """Return the SHA-256 of each file that ``make rpm image`` has made, by its name."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for pattern in PATTERNS
        for path in directory.glob(pattern)
    }


def build_again(copy: Path) -> None:
    """Make all packages in a copy of the checkout, and in another time zone.

    An RPM contains the path of the directory in which it is built, so for the RPMs the copy takes
    the checkout's place, in a mount namespace of its own.
    """
    commit = ("git", "log", "-1", "--format=%H %ct")
    shown = subprocess.run(commit, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    revision, time = shown.split()
    make = f"make -s REVISION={revision}"
    script = f"""
        rm .venv && mkdir .venv && mount --bind {ROOT}/.venv .venv && {make} image &&
        mount --rbind {copy} {ROOT} && cd {ROOT} &&
        {make} --assume-old=dist rpm RPMBUILD="rpmbuild --nocheck"
    """
    subprocess.run(
        ["unshare", "--mount", "sh", "-c", script],
        check=True,
        cwd=copy,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "SOURCE_DATE_EPOCH": time, "TZ": "Asia/Kathmandu"},
    )


def compare_builds() -> None:
    """Build all packages again: each file must be the same."""
    first = digests(ROOT)
    assert {Path(package).suffix for package in first} == SUFFIXES, "run `make rpm image` first"
    with checkout.copied() as copy:
        build_again(copy)
        second = digests(copy)
    assert first == second, f"{first} {second}"
    for package, digest in sorted(first.items()):
        print(f"{digest}  {package}")


def lint() -> Path:
    """Return the directory of the Debian packages, in which lintian has found nothing."""
    directory = ROOT / "build/deb"
    (changes,) = directory.glob("*.changes")
    command = ["lintian", "--allow-root", "--fail-on", "error,warning", str(changes)]
    subprocess.run(command, check=True)
    return directory


def old_package(directory: Path) -> Path:
    """Make the package that is upgraded, and return its path."""
    tree = directory / "first"
    for name, text in OLD.items():
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755 if text.startswith("#!") else 0o644)
    package = directory / "first.deb"
    subprocess.run(["dpkg-deb", "--root-owner-group", "-b", str(tree), str(package)], check=True)
    return package


def inside(tree: Path, *command: str) -> str:
    """Run a command, which must succeed, in a tree with its own ``/proc``; return its output."""
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "DEBIAN_FRONTEND": "noninteractive"}
    confined = ("unshare", "--mount", "--pid", "--fork", f"--mount-proc={tree}/proc")
    ran = subprocess.run(
        [*confined, "chroot", str(tree), *command],
        check=False,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert ran.returncode == 0, f"{command}: {ran.returncode}\n{ran.stdout}"
    return ran.stdout


def install(tree: Path, package: Path) -> None:
    shutil.copy(package, tree / "tmp/tscwatch.deb")
    inside(tree, "apt-get", "install", "-qy", "--no-install-recommends", "/tmp/tscwatch.deb")


def files(tree: Path) -> set[str]:
    """Return the paths, outside dpkg's own directories, whose names contain ``tscwatch``."""
    return {
        str(path.relative_to(tree))
        for top in ("usr", "etc", "var/cache", "var/lib/systemd")
        for path in (tree / top).rglob("*")
        if "tscwatch" in str(path.relative_to(tree))
    }


def check(tree: Path) -> None:
    """The program runs, has its bytecode, and each file is there."""
    assert inside(tree, "tscwatch", "--version").startswith("tscwatch ")
    assert "kvm_arch_init_vcpu" in inside(tree, "tscwatch", "explain", "boot")
    bytecode = "from tscwatch.capture import ebpf; print(ebpf.is_packaged())"
    assert inside(tree, "python3", "-c", bytecode) == "True\n"
    for file in FILES:
        assert (tree / file).is_file(), file


def upgrade(tree: Path, first: Path, package: Path) -> None:
    """Upgrade from the first package: the administrator's changes must stay until a purge."""
    install(tree, first)
    configuration = tree / CONFIGURATION
    changed = configuration.read_text().replace("source: auto", "source: ftrace")
    configuration.write_text(changed)
    (tree / ENABLED).parent.mkdir(parents=True, exist_ok=True)
    (tree / ENABLED).symlink_to(f"/{UNIT}")
    install(tree, package)
    check(tree)
    assert not list((tree / MODULES).rglob("*removed_since*"))
    assert (configuration.read_text(), (tree / ENABLED).is_symlink()) == (changed, True)
    (tree / "var/cache/tscwatch").mkdir()
    (tree / "var/cache/tscwatch/kprobe.c.json").touch()
    inside(tree, "apt-get", "remove", "-qy", "tscwatch")
    assert {CONFIGURATION, ENABLED} <= files(tree)
    assert not [file for file in files(tree) if file.startswith("usr")]
    purge(tree)


def purge(tree: Path) -> None:
    inside(tree, "apt-get", "purge", "-qy", "tscwatch")
    assert files(tree) == set()


def build_inside(tree: Path, packages: Path) -> None:
    """Build the package in a tree that has what the source package asks for, and nothing else."""
    shutil.copytree(packages, tree / "tmp/deb", ignore=lambda *_: ["tscwatch-*"])
    script = """
        cd /tmp/deb && apt-get build-dep -qy --no-install-recommends ./*.dsc &&
        rm *.deb && dpkg-source -x *.dsc source && cd source && dpkg-buildpackage -b -us -uc
    """
    assert " passed in " in inside(tree, "sh", "-c", script)
    assert list((tree / "tmp/deb").glob("*.deb"))


def main() -> None:
    compare_builds()
    packages = lint()
    (package,) = packages.glob("*.deb")
    for release in RELEASES:
        with tempfile.TemporaryDirectory(prefix=f"{release}-") as name:
            tree = Path(name) / "tree"
            subprocess.run(["mmdebstrap", *OPTIONS, release, str(tree)], check=True)
            upgrade(tree, old_package(Path(name)), package)
            install(tree, package)
            check(tree)
            assert not list((tree / "etc/systemd").rglob("tscwatch*"))  # it is not enabled
            purge(tree)
            if release == BUILDS:
                build_inside(tree, packages)
        print(f"{release}: the package was upgraded, installed, run, removed and purged")


if __name__ == "__main__":
    main()
