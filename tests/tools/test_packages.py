"""The files of ``make install``, the RPM, the source distribution and the wheel.

The Debian package has a program of its own (``make test-deb``).
"""

from __future__ import annotations

import re
import subprocess
import tarfile
from email import message_from_bytes
from pathlib import Path
from urllib.parse import urlsplit
from zipfile import ZipFile

import pytest

from deploy.alerts import generate
from tests.support.lab_vm import ROOT
from tscwatch import __version__

SPEC = ROOT / "deploy/rpm/tscwatch.spec"
SDIST = ROOT / f"dist/tscwatch-{__version__}.tar.gz"
WHEEL = ROOT / f"dist/tscwatch-{__version__}-py3-none-any.whl"
MODULES = "usr/lib/python3/dist-packages"
IS_PACKAGED = (
    "import bcc, tscwatch; from tscwatch.capture import ebpf; "
    "assert '/venv/' in tscwatch.__file__; print(ebpf.is_packaged())"
)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with all files of ``make install``."""
    tree = tmp_path_factory.mktemp("tree")
    subprocess.run(["make", "-s", "install", f"DESTDIR={tree}"], check=True, cwd=ROOT)
    return tree


@pytest.fixture(scope="module")
def rpms() -> list[Path]:
    """Return the source RPM and the RPM of ``make rpm``, which also made what is in ``dist``."""
    made = sorted((ROOT / "build/rpm").rglob("*.rpm"))
    assert made, "there are no packages: run `make rpm`"
    return made


def test_the_alerts_link_to_the_runbook_that_is_installed(installed: Path) -> None:
    path = urlsplit(generate.RUNBOOK).path
    assert (installed / path[1:]).read_text() == (ROOT / "deploy/RUNBOOK.md").read_text()


def test_the_packages_are_of_this_version() -> None:
    spec = SPEC.read_text()
    assert f"Version:        {__version__}\n" in spec
    (release,) = re.findall(r"(?m)^Release: +(\d+)%{\?dist}$", spec)
    assert f" tscwatch-{__version__}-{release}.src.rpm\n" in (ROOT / "README.md").read_text()
    assert f"## {__version__} " in (ROOT / "CHANGELOG.md").read_text()
    debian = (ROOT / "deploy/debian/changelog").read_text()
    assert debian.startswith(f"tscwatch ({__version__}-")


def test_rpmlint_finds_nothing(rpms: list[Path]) -> None:
    config = ROOT / "tests/support/rpmlint.toml"
    command = ["rpmlint", "-c", str(config), str(SPEC), *map(str, rpms)]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "2 packages and 1 specfiles checked; 0 errors, 0 warnings" in checked.stdout


def test_the_rpm_has_the_bytecode(rpms: list[Path]) -> None:
    command = ["rpm", "-qpl", *(str(rpm) for rpm in rpms if rpm.name.endswith(".noarch.rpm"))]
    files = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    for name in ("kprobe", "tracepoint"):
        assert f"/tscwatch/bpf/{name}.c.json\n" in files


def test_the_source_distribution_has_each_file_of_the_repository(rpms: list[Path]) -> None:
    with tarfile.open(SDIST) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    listed = subprocess.run(
        ["git", "ls-files"], check=True, capture_output=True, text=True, cwd=ROOT
    )
    missing = set(listed.stdout.split()) - names
    assert missing == {".ci/run", "tscwatch/bpf"}
    assert {f"tscwatch/{file}" for file in names if file.startswith("bpf/")} <= names


def test_the_wheel_states_its_licence_and_what_it_needs(rpms: list[Path]) -> None:
    directory = f"tscwatch-{__version__}.dist-info"
    with ZipFile(WHEEL) as wheel:
        metadata = message_from_bytes(wheel.read(f"{directory}/METADATA"))
        assert wheel.read(f"{directory}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert metadata["Version"] == __version__
    assert metadata["License-Expression"] == "Apache-2.0"
    classifiers = metadata.get_all("Classifier", [])
    assert "Operating System :: POSIX :: Linux" in classifiers
    # PyPI refuses the classifier of a licence beside License-Expression (PEP 639).
    assert [each for each in classifiers if each.startswith("License ::")] == []
    needs = [each for each in metadata.get_all("Requires-Dist", []) if "extra ==" not in each]
    of_rpm = re.findall(r"(?m)^Requires: +python3-(.*)$", SPEC.read_text())
    assert [re.split(r"[<>=]", each)[0] for each in needs] == [
        name.replace("_", "-") for name in of_rpm
    ]


@pytest.mark.parametrize("what", [".", str(WHEEL)], ids=["the checkout", "the wheel"])
def test_the_readmes_pip_command(what: str, rpms: list[Path], tmp_path: Path) -> None:
    (command,) = re.findall(
        r"(?m)^(python3 -m venv .*pip install) \.", (ROOT / "README.md").read_text()
    )
    command = command.replace("python3", "/usr/bin/python3").replace("/opt/", f"{tmp_path}/venv/")
    subprocess.run(["sh", "-c", f"{command} -q {what}"], check=True, cwd=ROOT)
    for program, expected in (
        (("tscwatch", "--version"), f"tscwatch {__version__}\n"),
        (("python", "-c", IS_PACKAGED), "True\n"),
    ):
        path = tmp_path / "venv/tscwatch/bin" / program[0]
        ran = subprocess.run(
            [path, *program[1:]], check=True, cwd=tmp_path, capture_output=True, text=True
        )
        assert ran.stdout == expected


def test_the_manual_is_found_by_what_it_is_about(installed: Path) -> None:
    manual = installed / "usr/share/man"
    subprocess.run(["mandb", "--quiet", "--create", str(manual)], check=True)
    command = ["apropos", "-M", str(manual), "--and", "KVM", "TSC"]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert re.fullmatch(r"tscwatch \(1\) +- shows when .*\n", found)


def test_the_manual_is_formatted_without_a_warning(installed: Path) -> None:
    page = installed / "usr/share/man/man1/tscwatch.1"
    command = ["man", "--warnings", "--encoding=UTF-8", "--local-file", str(page)]
    shown = subprocess.run(command, check=True, capture_output=True, text=True)
    assert shown.stderr == ""
    assert "FILES" in shown.stdout


def test_each_link_in_the_documentation_leads_to_a_file(installed: Path) -> None:
    directory = installed / "usr/share/doc/tscwatch"
    names = {"README.md", "RUNBOOK.md", "SECURITY.md", "CONTRIBUTING.md"}
    assert names <= {path.name for path in directory.iterdir()}
    for text in directory.rglob("*.md"):
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text.read_text()):
            assert (text.parent / link).exists(), f"{text.name}: {link}"


def test_each_file_of_the_program_is_installed(installed: Path) -> None:
    package = ROOT / "tscwatch"
    files = [*package.rglob("*.py"), package / "py.typed", *package.glob("bpf/*")]
    program = installed / MODULES / "tscwatch"
    assert {path.name for path in files} >= {"cli.py", "tracepoint.c", "tscwatch.h"}
    names = [path.relative_to(package) for path in files]
    assert [name for name in names if not (program / name).is_file()] == []


def test_the_installed_program_runs(installed: Path) -> None:
    shown = subprocess.run(
        ["/usr/bin/python3", str(installed / "usr/bin/tscwatch"), "--version"],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(installed / MODULES)},
    )
    assert shown.stdout == f"tscwatch {__version__}\n"
