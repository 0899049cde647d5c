"""What Python and the kernel programs both define is the same in both."""

from __future__ import annotations

import re
from pathlib import Path

from tscwatch.capture import ebpf
from tscwatch.linux import kvm

BPF = Path(__file__).parents[2] / "bpf"
HEADER = (BPF / "tscwatch.h").read_text()
SIZES = {"u64": 8, "s64": 8, "u32": 4, "s32": 4, "u8": 1, "s8": 1, "char": 1}


def members(enum: str) -> list[str]:
    body = re.findall(rf"enum {enum} {{(.*?)}};", HEADER, re.S)[0]
    return re.findall(r"[A-Z_]+", re.sub(r"/\*.*?\*/", "", body))


def names(prefix: str, enum: str) -> list[str]:
    return [name[len(prefix) :].lower() for name in members(enum)]


def test_the_ioctl_numbers() -> None:
    texts = [path.read_text() for path in sorted(BPF.iterdir())]
    defined = {
        name: int(number, 16)
        for text in texts
        for name, number in re.findall(r"#define KVM_(\w+) (0x\w+)", text)
    }
    assert len(defined) == 9
    assert defined == {name: getattr(kvm, name) for name in defined}


def test_the_operations() -> None:
    assert names("OP_", "op") == list(ebpf._OPS)


def test_the_last_cold_commands() -> None:
    assert names("AFTER_", "after") == ["nothing", *filter(None, ebpf._AFTERS)]


def test_the_counters() -> None:
    for index, name in enumerate(members("count")[:-1]):
        assert getattr(ebpf, name.replace("COUNT", "", 1)) == index


def test_the_event() -> None:
    body = re.findall(r"struct event {(.*?)};", HEADER, re.S)[0]
    fields = re.findall(r"(\w+) \w+(?:\[(\d+)\])?;", body)
    size = sum(SIZES[kind] * int(count or 1) for kind, count in fields)
    assert ebpf._EVENT.size == -size % 8 + size


def test_the_maps() -> None:
    declared = re.findall(r"BPF_\w+\((?:\"lru_hash\", \w+, [\w ]+, )?(\w+),", HEADER)
    assert sorted(declared) == sorted(ebpf._MAPS)
