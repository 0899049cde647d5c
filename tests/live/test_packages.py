"""The files of ``make install``, and the packages' metadata; see also ``make test-deb``."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from deploy.alerts import generate
from tests.support.lab_vm import ROOT
from tscwatch import __version__

SPEC = ROOT / "deploy/rpm/tscwatch.spec"
MACROS = {
    "%{_bindir}": "usr/bin",
    "%{python3_sitelib}": "usr/lib/python3/dist-packages",
    "%{_sysconfdir}": "etc",
    "%{_unitdir}": "usr/lib/systemd/system",
    "%{_mandir}": "usr/share/man",
    "%{_datadir}": "usr/share",
    "%{_docdir}": "usr/share/doc",
}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with all files of ``make install``."""
    tree = tmp_path_factory.mktemp("tree")
    subprocess.run(["make", "-s", "install", f"DESTDIR={tree}"], check=True, cwd=ROOT)
    return tree


def test_rpmlint_finds_no_error() -> None:
    checked = subprocess.run(["rpmlint", str(SPEC)], capture_output=True, text=True, check=False)
    assert (checked.returncode, re.findall(r"(\d+) errors", checked.stdout)) == (0, ["0"])


def test_the_spec_owns_each_file_that_is_installed(installed: Path) -> None:
    section = SPEC.read_text().partition("%files\n")[2].partition("%changelog")[0]
    patterns = []
    for line in section.split("\n"):
        path = re.sub(r"^%(doc|dir|config\(\w+\)) ", "", line)
        if path.startswith("%{"):
            macro = path[: path.index("}") + 1]
            patterns.append(MACROS[macro] + path[len(macro) :])
    owned = {file for pattern in patterns for file in installed.glob(pattern)}
    for file in installed.rglob("*"):
        if file.is_file():
            assert owned & {file, *file.parents}, file.relative_to(installed)
    assert len(owned) == len(patterns)


def test_the_alerts_link_to_the_runbook_that_is_installed(installed: Path) -> None:
    path = urlsplit(generate.RUNBOOK).path
    assert (installed / path[1:]).read_text() == (ROOT / "deploy/RUNBOOK.md").read_text()


def test_the_packages_are_of_this_version() -> None:
    assert f"Version:        {__version__}\n" in SPEC.read_text()
    assert f"## {__version__} " in (ROOT / "CHANGELOG.md").read_text()


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
    rules = (directory / "prometheus/tscwatch.rules.yml").read_text()
    (runbook,) = set(re.findall(r"runbook_url: file://([^#]+)#", rules))
    assert (installed / runbook.lstrip("/")).is_file()


def test_the_installed_program_runs(installed: Path) -> None:
    shown = subprocess.run(
        ["/usr/bin/python3", str(installed / "usr/bin/tscwatch"), "--version"],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(installed / MACROS["%{python3_sitelib}"])},
    )
    assert shown.stdout == f"tscwatch {__version__}\n"


def test_pip_installs_it_where_bcc_is_the_systems(tmp_path: Path) -> None:
    subprocess.run(
        ["/usr/bin/python3", "-m", "venv", "--system-site-packages", str(tmp_path / "venv")],
        check=True,
    )
    bin_directory = tmp_path / "venv/bin"
    subprocess.run([str(bin_directory / "pip"), "install", "-q", str(ROOT)], check=True)
    script = (
        "import bcc, importlib.resources as r, tscwatch; assert 'venv' in tscwatch.__file__; "
        "assert (r.files('tscwatch') / 'bpf/kprobe.c').is_file()"
    )
    for command in (["python", "-c", script], ["tscwatch", "--version"]):
        subprocess.run([str(bin_directory / command[0]), *command[1:]], check=True, cwd=tmp_path)
