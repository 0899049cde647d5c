"""Each right that is missing has one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from tscwatch.host import rights

PTRACE, DAC, ADMIN, PERFMON, BPF = 1 << 19, 1 << 2, 1 << 21, 1 << 38, 1 << 39


def sentences(root: Path, held: int, debugfs: bool = True) -> list[str]:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/status").write_text(f"Name:\ttscwatch\nCapEff:\t{held:016x}\n")
    if debugfs:
        (root / "sys/kernel/debug/kvm").mkdir(parents=True)
    return list(rights.missing(root))


@pytest.mark.parametrize("bpf", [ADMIN, BPF | PERFMON])
def test_nothing_is_missing(bpf: int, tmp_path: Path) -> None:
    assert sentences(tmp_path, PTRACE | DAC | bpf) == []


@pytest.mark.parametrize(
    ("held", "name"),
    [
        (DAC | ADMIN, "CAP_SYS_PTRACE"),
        (PTRACE | ADMIN, "CAP_DAC_READ_SEARCH"),
        (PTRACE | DAC, "CAP_SYS_ADMIN"),
        (PTRACE | DAC | BPF, "CAP_SYS_ADMIN"),
        (PTRACE | DAC | PERFMON, "CAP_SYS_ADMIN"),
    ],
)
def test_a_capability_is_missing(held: int, name: str, tmp_path: Path) -> None:
    (sentence,) = sentences(tmp_path, held)
    assert sentence.startswith(f"{name} is missing: ")
    assert "container" in sentence


def test_debugfs_is_missing(tmp_path: Path) -> None:
    (sentence,) = sentences(tmp_path, PTRACE | DAC | ADMIN, debugfs=False)
    assert "/sys/kernel/debug" in sentence
