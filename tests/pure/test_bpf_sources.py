"""What is defined both in Python and in the C sources of the BPF programs is the same in both."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Optional

import pytest

from tscwatch.capture import ebpf
from tscwatch.clock import unix_ns
from tscwatch.linux import kvm
from tscwatch.model import Event


def source(name: str) -> str:
    """A C source without its comments."""
    text = (Path(__file__).parents[2] / "bpf" / name).read_text()
    return re.sub(r"/\*.*?\*/", "", text, flags=re.S)


HEADER, KPROBE, TRACEPOINT = map(source, ("tscwatch.h", "kprobe.c", "tracepoint.c"))
SOURCES = HEADER + KPROBE + TRACEPOINT
FORMATS = {"u64": "Q", "s64": "q", "u32": "I", "s32": "i", "u8": "B", "s8": "b", "char": "s"}


def enum(name: str) -> dict[str, int]:
    """The members of an enum and their values."""
    (body,) = re.findall(rf"enum {name} {{(.*?)}};", HEADER, re.S)
    values: dict[str, int] = {}
    following = 0
    for member, value in re.findall(r"([A-Z_]+)(?: = (\d+))?", body):
        values[member] = int(value or following)
        following = values[member] + 1
    return values


def event_fields() -> dict[str, str]:
    """The format of each member of struct event, as for the struct module."""
    (body,) = re.findall(r"struct event {(.*?)};", HEADER, re.S)
    members = re.findall(r"(\w+) (\w+)(?:\[(\d+)\])?;", body)
    assert len(members) == body.count(";")
    return {name: count + FORMATS[kind] for kind, name, count in members}


def raw_event(**values: int | bytes) -> bytes:
    """A struct event as the C compiler lays it out, with 0 in the members that are not given."""
    fields = event_fields()
    filled = {name: b"" if code.endswith("s") else 0 for name, code in fields.items()} | values
    assert filled.keys() == fields.keys()
    return struct.pack(f"@{''.join(fields.values())}0Q", *filled.values())


def test_the_ioctl_numbers() -> None:
    defined = re.findall(r"#define KVM_(\w+) (\w+)", SOURCES)
    numbers = {name: int(number, 16) for name, number in defined}
    assert len(defined) == len(numbers) == 10
    assert numbers == {name: getattr(kvm, name) for name in numbers}


def test_the_operations() -> None:
    expected = {f"OP_{op.upper()}": number for number, op in enumerate(ebpf._OPS, 1)}
    assert enum("op") == expected


def test_the_last_cold_commands() -> None:
    names = [f"AFTER_{(after or 'nothing').upper()}" for after in ebpf._AFTERS]
    assert enum("after") == {name: number for number, name in enumerate(names)}


def test_the_counters() -> None:
    counters = enum("count")
    assert counters.pop("COUNTS") == len(counters) == 6
    assert counters == {name: getattr(ebpf, name[len("COUNT") :]) for name in counters}


def test_the_programs_that_others_call() -> None:
    assert enum("rest") == {name.upper(): index for index, name in enumerate(ebpf._REST)}
    for name in ebpf._REST:
        assert f"int {name}(" in TRACEPOINT


def test_the_layout_of_an_event() -> None:
    assert ebpf._EVENT.size == len(raw_event())
    packed = struct.calcsize("=" + "".join(event_fields().values()))
    assert ebpf._EVENT.format == f"={''.join(event_fields().values())}{len(raw_event()) - packed}x"


def test_each_member_of_an_event_is_read_as_what_it_is() -> None:
    raw = raw_event(
        ts=1,
        vm=0x2F,
        arg=3,
        result=-4,
        pid=5,
        tid=6,
        op=enum("op")["OP_SET"],
        vcpu=7,
        sync=8,
        runner=9,
        fd=10,
        after=enum("after")["AFTER_REGS"],
        ran=1,
        comm=b"qemu",
    )
    assert ebpf._event(raw) == Event(
        ts=unix_ns(1),
        op="set",
        vm="kvm:2f",
        pid=5,
        tid=6,
        comm="qemu",
        vcpu=7,
        khz=3,
        status=-4,
        after="regs",
        sync=8,
        runner=9,
        ran=True,
        fd=10,
    )


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        ("OP_GET", {"khz": 7, "pid": 5}),
        ("OP_SET", {"khz": 3, "pid": 5}),
        ("OP_VCPU_FOUND", {"khz": 7, "pid": 3, "tid": 3}),
        ("OP_LOST", {"lost_events": 3, "khz": None, "vm": ""}),
        ("OP_VM_CREATE", {"khz": None, "lost_events": 0}),
    ],
)
def test_what_the_argument_and_the_result_mean(op: str, expected: dict[str, object]) -> None:
    event = ebpf._event(raw_event(op=enum("op")[op], arg=3, result=7, pid=5, tid=6))
    assert {name: getattr(event, name) for name in expected} == expected


@pytest.mark.parametrize(("op", "khz"), [("OP_GET", None), ("OP_SET", 3)])
def test_a_call_that_failed(op: str, khz: Optional[int]) -> None:
    event = ebpf._event(raw_event(op=enum("op")[op], arg=3, result=-22))
    assert (event.khz, event.status) == (khz, -22)


def test_the_maps() -> None:
    declared = re.findall(r"BPF_\w+\((?:\"\w+\", \w+, [\w ]+, )?(\w+),", HEADER)
    assert sorted(declared) == sorted(ebpf._MAPS)


def test_the_offsets() -> None:
    def macros(members: tuple[tuple[str, str, str], ...]) -> set[str]:
        return {f"{label.upper().replace('.', '_')}_OFFSET" for label, _, _ in members}

    def used(text: str) -> set[str]:
        return set(re.findall(r"\w+_OFFSET", text))

    assert used(HEADER + KPROBE) == macros(kvm.VCPU_MEMBERS)
    assert used(TRACEPOINT) - used(HEADER + KPROBE) == macros(ebpf._FILE_MEMBERS)


def test_the_functions_that_run_at_kprobes() -> None:
    handlers = {handler for _, handler in ebpf._KPROBES}
    defined = re.findall(r"^int (\w+)\(", KPROBE, re.M)
    assert sorted(defined) == sorted({*handlers, "leave_ioctl", "rest_of_enter"})
