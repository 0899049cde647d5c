"""From which moment on the TSCs of a VM mean something."""

from __future__ import annotations

from typing import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tscwatch.analysis.writes import TscWrites


def test_before_anything_was_written_nothing_is_to_be_expected() -> None:
    assert TscWrites().are_over


def test_a_round_of_writes_is_over_when_the_vm_runs() -> None:
    """QEMU's load: each vCPU is given its frequency, and its TSC is written after that."""
    writes = TscWrites()
    for vcpu in range(3):
        writes.frequency_given(vcpu)
        assert not writes.are_over
        writes.written(vcpu, vcpu + 1, of_plug=False)
        assert not writes.are_over  # another vCPU may follow
    writes.vm_runs()
    assert writes.are_over


def test_a_reset_is_over_when_the_vm_runs() -> None:
    """It writes TSCs, but sets no frequency."""
    writes = TscWrites()
    writes.written(0, 1, of_plug=False)
    assert not writes.are_over
    writes.vm_runs()
    assert writes.are_over


def test_a_plug_writes_one_vcpu_while_the_others_run() -> None:
    writes = TscWrites()
    writes.frequency_given(2)
    writes.vm_runs()
    assert not writes.are_over  # the others run, but its TSC is still to be written
    writes.written(2, 3, of_plug=True)
    assert writes.are_over


def test_the_write_before_the_frequency_of_a_plug_is_not_the_last_one() -> None:
    """KVM writes the TSC of a new vCPU when it is created, before QEMU's first call."""
    writes = TscWrites()
    writes.written(2, 3, of_plug=True)
    assert not writes.are_over
    writes.frequency_given(2)
    writes.written(1, 1, of_plug=True)  # of another vCPU
    assert not writes.are_over


@pytest.mark.parametrize(
    ("end", "is_over"),
    [
        (lambda writes: writes.vm_resumes(), True),
        (lambda writes: writes.vm_runs(), False),
        (lambda writes: writes.removed(2), True),
        (lambda writes: writes.removed(1), False),
        (lambda writes: writes.goes_on(), False),
    ],
)
def test_a_write_that_never_comes_is_awaited_until_it_cannot_come(
    end: Callable[[TscWrites], None], is_over: bool
) -> None:
    writes = TscWrites()
    writes.frequency_given(2)
    end(writes)
    assert writes.are_over is is_over


def test_a_vm_that_resumes_has_no_write_under_way() -> None:
    writes = TscWrites()
    writes.written(0, 1, of_plug=False)
    writes.frequency_given(0)
    writes.vm_resumes()
    assert writes.are_over


def test_an_unplugged_vcpu_stays_in_kvms_count() -> None:
    writes = TscWrites()
    for vcpu in range(2):
        writes.written(vcpu, vcpu + 1, of_plug=False)
    writes.removed(1)
    assert writes.generation == {0, 1}


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans())))
def test_the_generation_is_what_kvm_counts(written: list[tuple[int, bool]]) -> None:
    """kvm_synchronize_tsc adds a vCPU to the present generation, or begins a new one with it."""
    writes, members = TscWrites(), set[int]()
    for vcpu, matches in written:
        members = members | {vcpu} if matches else {vcpu}
        writes.written(vcpu, len(members), of_plug=False)
        assert writes.generation == members


@pytest.mark.parametrize(
    "happens",
    [
        lambda writes: writes.goes_on(),
        lambda writes: writes.frequency_given(0),
        lambda writes: writes.written(0, 1, of_plug=False),
        lambda writes: writes.written(0, 1, of_plug=True),
    ],
)
def test_two_readings_between_which_nothing_happens_end_the_writes(
    happens: Callable[[TscWrites], None],
) -> None:
    """The end may not have been seen: events can be lost, and a guest can stay stopped."""
    writes = TscWrites()
    assert writes.read()
    writes.frequency_given(7)
    happens(writes)
    assert not writes.read()
    assert not writes.are_over
    happens(writes)
    assert not writes.read()
    assert not writes.are_over
    assert writes.read()
    assert writes.are_over
