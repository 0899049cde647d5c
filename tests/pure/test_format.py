"""Lines for programs and for people."""

from __future__ import annotations

import json
from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.histories import History
from tscwatch import clock
from tscwatch.analysis.attribute import Attributor
from tscwatch.model import (
    Call,
    Contradiction,
    Event,
    Guest,
    KvmTscState,
    Mismatch,
    Owner,
    Risk,
)
from tscwatch.publish import format
from tscwatch.publish.format import LogLine

TS = 1_700_000_000_123_456_789
SET = Event(TS, "set", "kvm:1", 7, 8, "qemu", 2, 2_600_000)


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


GUEST = Guest(7, "qemu", "db", "u-u-i-d")
KVM = KvmTscState(1, "db", GUEST, 2, 1, 3, False)
SKEW = Mismatch(
    *(TS, "raised", "vcpu_skew", "db", GUEST, (2, 3), 100.00049, "critical", "hotplug", "off"),
    requested_ppm=135.25,
    apart_seconds=1.5,
    kvm_state=KVM,
)


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (
            LogLine(Call(SET, "db", GUEST, "hotplug", "post_init", ())),
            "db               vCPU 2    SET   2600000 kHz  hotplug/post_init",
        ),
        (
            LogLine(Call(SET, "db", GUEST, "unknown", "unknown", ()), times=5, late_ns=2 * 10**9),
            "db               vCPU 2    SET   2600000 kHz  unknown  (the last of 5)  (2.0 s late)",
        ),
        (
            LogLine(Call(SET._replace(vcpu=None, status=-22), "db", GUEST, "boot", "init", ())),
            "db               VM        SET   2600000 kHz  boot/init  EINVAL",
        ),
        (
            LogLine(Call(SET._replace(op="get", khz=None), "db", GUEST, "boot", "init", ())),
            "db               vCPU 2    GET         - kHz  boot/init",
        ),
        (
            LogLine(SKEW),
            "db               vCPU 2,3  MISMATCH raised: vcpu_skew 1.5 s apart, requested 135.2 "
            "ppm, effective 100.0 ppm, 8.6 s a day (critical, since hotplug): off; KVM considers 1 "
            "of 3 vCPUs synchronised and its master clock is off",
        ),
        (
            LogLine(SKEW._replace(requested_ppm=None, apart_seconds=None, ppm=5, kvm_state=None)),
            "db               vCPU 2,3  MISMATCH raised: vcpu_skew 5.0 ppm (critical, since "
            "hotplug): off",
        ),
        (
            LogLine(SKEW._replace(ppm=None, requested_ppm=None, apart_seconds=0, kvm_state=None)),
            "db               vCPU 2,3  MISMATCH raised: vcpu_skew 0 ns apart (critical, since "
            "hotplug): off",
        ),
        (
            LogLine(Risk(TS, "db", GUEST, False, "calm")),
            "db                         HOTPLUG RISK cleared: calm",
        ),
        (
            LogLine(Contradiction(TS, "db", GUEST, "phase", "two sides")),
            "db                         CONTRADICTION about phase: two sides",
        ),
    ],
)
def test_an_item_as_text(line: LogLine, text: str) -> None:
    seconds = clock.wall_ns(TS + line.late_ns) // 10**9
    time = datetime.fromtimestamp(seconds).strftime("%H:%M:%S")
    assert format.as_text(line) == f"{time}.123456  {text}"


def test_a_mismatch_as_json() -> None:
    line = LogLine(SKEW._replace(apart_seconds=1.2345678912), times=5, late_ns=2 * 10**9)
    fields = json.loads(format.as_json(line))
    assert fields == {
        "type": "mismatch",
        "ts": clock.wall_ns(TS + 2 * 10**9) / 1e9,
        "state": "raised",
        "kind": "vcpu_skew",
        "severity": "critical",
        "vm": "db",
        "uuid": "u-u-i-d",
        "pid": 7,
        "owner": None,
        "vcpus": [2, 3],
        "apart_seconds": 1.234567891,
        "requested_ppm": 135.25,
        "ppm": 100.0,
        "seconds_a_day": 8.64,
        "phase": "hotplug",
        "detail": "off",
        "kvm_synchronised": 1,
        "kvm_online": 3,
        "kvm_master_clock": False,
        "times": 5,
        "late_seconds": 2,
    }
    unknown = SKEW._replace(ppm=None, requested_ppm=None, apart_seconds=None, kvm_state=None)
    fields = json.loads(format.as_json(LogLine(unknown)))
    sizes = ("apart_seconds", "requested_ppm", "ppm", "seconds_a_day", "kvm_master_clock")
    assert [fields[name] for name in sizes] == [None] * 5
    exact = SKEW._replace(ppm=1.23456, requested_ppm=0.0004)
    fields = json.loads(format.as_json(LogLine(exact)))
    assert (fields["ppm"], fields["requested_ppm"]) == (1.235, 0)


@given(st.text())
def test_no_name_steers_a_terminal_or_breaks_a_line(name: str) -> None:
    line = LogLine(first_call()._replace(vm=name))
    assert format.as_text(line).isprintable()
    assert "\n" not in format.as_json(line)
    assert json.loads(format.as_json(line))["vm"] == name
