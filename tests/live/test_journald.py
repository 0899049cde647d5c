"""Journal entries, as the real journald stores them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.pure.test_format import first_call
from tests.support.guests import PATIENCE_S, wait_for
from tscwatch.model import Mismatch, Owner, Risk
from tscwatch.publish import systemd
from tscwatch.publish.format import LogLine

JOURNALD = "/lib/systemd/systemd-journald"


@pytest.fixture(scope="module")
def journald() -> Iterator[None]:
    """Keep journald running, which is started if it is not."""
    if subprocess.run(["pgrep", "-x", "systemd-journal"], capture_output=True, check=False).stdout:
        yield
        return
    Path("/run/systemd/journal/socket").unlink(missing_ok=True)
    process = subprocess.Popen([JOURNALD], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(systemd.JOURNAL.exists, "journald")
    yield
    process.terminate()
    process.wait(PATIENCE_S)


def entries(**fields: str) -> list[dict[str, Any]]:
    """Return the entries with these fields, which are named without ``TSCWATCH_``."""
    matches = [f"TSCWATCH_{name.upper()}={value}" for name, value in fields.items()]
    command = ["journalctl", "-o", "json", "--no-pager", "-q", *matches]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [json.loads(line) for line in output.splitlines()]


def test_a_call_and_a_mismatch_are_found_by_their_fields(journald: None, tmp_path: Path) -> None:
    vm = str(tmp_path)  # a name that no other entry has
    call = first_call()._replace(vm=vm)
    mismatch = Mismatch(
        1,
        "raised",
        "vcpu_skew",
        vm,
        call.guest,
        (2, 3),
        135.0,
        "warning",
        "hotplug",
        "vCPU 2 differs",
    )
    systemd.send_to_journal(LogLine(call))
    systemd.send_to_journal(LogLine(mismatch))
    systemd.send_to_journal(LogLine(mismatch._replace(severity="critical")))
    systemd.send_to_journal(LogLine(Risk(1, vm, call.guest, False, "calm")))
    wait_for(lambda: len(entries(vm=vm)) == 4, "the entries")
    (first,) = entries(vm=vm, type="call")
    assert (first["TSCWATCH_PHASE"], first["TSCWATCH_KHZ"]) == ("boot", "2600000")
    assert (first["PRIORITY"], first["SYSLOG_IDENTIFIER"]) == ("6", "tscwatch")
    skews = entries(vm=vm, kind="vcpu_skew")
    assert [skew["PRIORITY"] for skew in skews] == ["4", "3"]
    assert skews[0]["TSCWATCH_VCPUS"] == "2,3"
    assert "vCPU 2 differs" in skews[0]["MESSAGE"]


def test_a_guest_is_found_by_its_owner(journald: None, tmp_path: Path) -> None:
    namespace = str(tmp_path)  # a name that no other entry has
    call = first_call()
    owner = Owner("kubevirt", namespace, "db\nTSCWATCH_PHASE=forged")
    systemd.send_to_journal(LogLine(call._replace(guest=call.guest._replace(owner=owner))))
    wait_for(lambda: bool(entries(owner_namespace=namespace)), "the entry")
    (entry,) = entries(owner_namespace=namespace)
    assert entry["TSCWATCH_OWNER_NAME"] == owner.name
    assert (entry["TSCWATCH_OWNER_PLATFORM"], entry["TSCWATCH_PHASE"]) == ("kubevirt", "boot")
    assert {name for name in entry if "OWNER" in name} == {
        f"TSCWATCH_OWNER_{fact}" for fact in ("PLATFORM", "NAMESPACE", "NAME")
    }


def test_a_name_begins_no_field_of_its_own(journald: None, tmp_path: Path) -> None:
    name = f"{tmp_path}\nTSCWATCH_PHASE=forged"
    systemd.send_to_journal(LogLine(first_call()._replace(vm=name)))
    wait_for(lambda: bool(entries(vm=name)), "the entry")
    (entry,) = entries(vm=name)
    assert entry["TSCWATCH_PHASE"] == "boot"


def test_without_journald_there_is_a_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    systemd.send_to_journal(LogLine(first_call()), tmp_path / "nobody")
    assert "boot/init" in capsys.readouterr().out
