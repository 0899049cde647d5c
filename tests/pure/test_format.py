"""Lines for programs and for people."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from tests.support.histories import History
from tscwatch.analysis.attribute import Attributor
from tscwatch.model import Call, Contradiction, Mismatch, Owner, Risk
from tscwatch.publish import format
from tscwatch.publish.format import LogLine


def first_call() -> Call:
    history = History("kvm:1", 100)
    history.emit("vm_create")
    history.new_vcpu(0, "boot")
    attributor = Attributor()
    facts = [fact for event in history.events for fact in attributor.feed(event)]
    return next(fact for fact in facts if isinstance(fact, Call))


def test_a_call_as_json_has_the_documented_keys() -> None:
    fields = json.loads(format.as_json(LogLine(first_call())))
    assert fields["type"] == "call"
    assert (fields["vm"], fields["pid"], fields["vcpu"]) == ("guest-100", 100, 0)
    assert (fields["op"], fields["khz"], fields["result"]) == ("get", 2_600_000, 0)
    assert (fields["phase"], fields["step"]) == ("boot", "init")
    assert fields["evidence"] == ["after:create", "machine:incomplete"]
    assert {"ts", "uuid", "tid"} < set(fields)


def test_each_kind_of_item_has_the_owner() -> None:
    call = first_call()
    assert format.fields(LogLine(call))["owner"] is None
    guest = call.guest._replace(owner=Owner("proxmox", name="db", vmid="100"))
    for item in (
        call._replace(guest=guest),
        Mismatch(1, "raised", "desync", "db", guest, (1,), None, "critical", "hotplug", "late"),
        Risk(1, "db", guest, True, "off"),
        Contradiction(1, "db", guest, "phase", "two sides"),
    ):
        fields = json.loads(format.as_json(LogLine(item)))
        assert fields["owner"] == {"platform": "proxmox", "name": "db", "vmid": "100"}


def test_a_failed_get_has_no_frequency() -> None:
    call = first_call()
    failed = call._replace(event=call.event._replace(khz=None, status=-5))
    assert json.loads(format.as_json(LogLine(failed)))["khz"] is None
    assert json.loads(format.as_json(LogLine(failed)))["result"] == -5
    assert format.as_text(LogLine(failed)).endswith("EIO")


@given(st.text())
def test_no_name_steers_a_terminal_or_breaks_a_line(name: str) -> None:
    line = LogLine(first_call()._replace(vm=name))
    assert format.as_text(line).isprintable()
    assert "\n" not in format.as_json(line)
    assert json.loads(format.as_json(line))["vm"] == name
