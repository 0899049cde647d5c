"""The kernel is locked down, which cannot be undone: these tests run last."""

from __future__ import annotations

import json
import subprocess

import pytest

from tests.support.observer import run
from tscwatch.linux import lockdown


@pytest.fixture(scope="module", autouse=True)
def _locked() -> None:
    if not lockdown.FILE.exists():
        mount = ["mount", "-t", "securityfs", "none", str(lockdown.FILE.parent)]
        subprocess.run(mount, check=True)
    lockdown.FILE.write_text("confidentiality")


@pytest.mark.parametrize("source", ["auto", "bcc", "ftrace"])
def test_the_cause_is_one_sentence(source: str) -> None:
    result = run("run", "--source", source)
    assert result.returncode == 6, result.stderr
    (line,) = result.stderr.splitlines()
    assert "lockdown=integrity" in line


def test_the_doctor_does_not_contradict_itself() -> None:
    result = run("doctor", "--json")
    assert (result.returncode, result.stderr) == (2, "")
    found = {check["what"]: check for check in map(json.loads, result.stdout.splitlines())}
    for what in ("lockdown", "kprobes", "tracefs", "debugfs", "source"):
        assert found[what]["state"] != "ok", found[what]
        assert "lockdown=integrity" in found[what]["remedy"] + found[what]["found"]
