"""The lines of a VM's vCPUs as KVM's debugfs shows them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tscwatch.host import lines
from tscwatch.host.lines import read_lines
from tscwatch.model import Line


def write(vm: Path, vcpu: int, **files: object) -> None:
    """Write a vCPU's files; ``guest_mode`` and names with dashes in place of underscores."""
    directory = vm / f"vcpu{vcpu}"
    directory.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        file = name if name == "guest_mode" else name.replace("_", "-")
        (directory / file).write_text(f"{value}\n")


def scaled(ratio: int, bits: int) -> dict[str, int]:
    return {"tsc_scaling_ratio": ratio, "tsc_scaling_ratio_frac_bits": bits}


def test_vcpus_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for vcpu in (10, 2, 0, 255):
        write(tmp_path, vcpu, guest_mode=0, tsc_offset=-vcpu)
    expected = tuple(Line(vcpu, -vcpu) for vcpu in (0, 2, 10, 255))
    assert read_lines(tmp_path) == expected


def test_what_else_is_there_is_no_vcpu(tmp_path: Path) -> None:
    write(tmp_path, 1, guest_mode=0, tsc_offset=-5)
    for name in ("vcpu", "vcpux", "vcpu1x", "cpu1", "vcpus2", "xvcpu3"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tsc-offset").write_text("7\n")
    (tmp_path / "exits").write_text("7\n")
    assert read_lines(tmp_path) == (Line(1, -5),)


@pytest.mark.parametrize(
    ("ratio", "bits", "expected"),
    [
        (1 << 48, 48, 1.0),  # Intel
        (3 << 47, 48, 1.5),
        (5 << 30, 32, 1.25),  # AMD
        ((1 << 48) - 1, 48, 1 - 2**-48),
    ],
)
def test_the_ratio_is_a_fixed_point_number(
    tmp_path: Path, ratio: int, bits: int, expected: float
) -> None:
    write(tmp_path, 0, guest_mode=0, tsc_offset=-9, **scaled(ratio, bits))
    assert read_lines(tmp_path) == (Line(0, -9, expected),)


def test_without_a_ratio_kvm_does_not_scale(tmp_path: Path) -> None:
    """Its files are there only if the hardware scales."""
    write(tmp_path, 0, guest_mode=0, tsc_offset=-9)
    write(tmp_path, 1, guest_mode=0, tsc_offset=-9, tsc_scaling_ratio=3 << 47)
    write(tmp_path, 2, guest_mode=0, tsc_offset=-9, tsc_scaling_ratio_frac_bits=48)
    assert read_lines(tmp_path) == tuple(Line(vcpu, -9) for vcpu in range(3))


@given(st.integers(-(2**63), 2**63 - 1))
def test_each_offset_of_64_bits_can_be_read(
    tmp_path_factory: pytest.TempPathFactory, offset: int
) -> None:
    vm = tmp_path_factory.mktemp("vm")
    write(vm, 0, guest_mode=0, tsc_offset=offset)
    assert read_lines(vm) == (Line(0, offset),)


@pytest.mark.parametrize("text", ["", "x", "1.5", "-"])
def test_an_offset_that_is_no_number_leaves_the_vcpu_out(tmp_path: Path, text: str) -> None:
    write(tmp_path, 0, guest_mode=0, tsc_offset=text)
    write(tmp_path, 1, guest_mode=0, tsc_offset=-9)
    assert read_lines(tmp_path) == (Line(1, -9),)


def test_a_vcpu_or_a_vm_that_is_gone_has_no_line(tmp_path: Path) -> None:
    (tmp_path / "vcpu0").mkdir()
    assert read_lines(tmp_path) == ()
    assert read_lines(tmp_path / "none") == ()


def test_a_vcpu_without_the_file_guest_mode_has_a_line(tmp_path: Path) -> None:
    write(tmp_path, 0, tsc_offset=-9)
    assert read_lines(tmp_path) == (Line(0, -9),)


@pytest.mark.parametrize("while_reading", ["tsc-offset", "tsc-scaling-ratio"])
def test_a_vcpu_that_enters_a_nested_guest_meanwhile_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, while_reading: str
) -> None:
    """What was read may be of that guest's line already."""
    write(tmp_path, 0, guest_mode=0, tsc_offset=-9, **scaled(1 << 48, 48))
    number = lines._number

    def enter(path: str) -> int | None:
        if path.endswith(while_reading):
            write(tmp_path, 0, guest_mode=1)
        return number(path)

    monkeypatch.setattr(lines, "_number", enter)
    assert read_lines(tmp_path) == ()
    assert (tmp_path / "vcpu0/guest_mode").read_text() == "1\n"


def test_no_file_stays_open(tmp_path: Path) -> None:
    """They are read every 10 s, for each vCPU of the host."""
    write(tmp_path, 0, guest_mode=0, tsc_offset="x", **scaled(1 << 48, 48))
    write(tmp_path, 1, guest_mode=0, tsc_offset=-9, **scaled(1 << 48, 48))
    before = sorted(os.listdir("/proc/self/fd"))  # noqa: PTH208
    read_lines(tmp_path)
    assert sorted(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
