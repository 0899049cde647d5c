"""What KVM does with a frequency that is set, by the rules of kvm_set_tsc_khz."""

from __future__ import annotations

from typing import Optional

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tscwatch.analysis import frequency
from tscwatch.model import Host

FREQUENCIES = st.integers(1, 10_000_000)
HOSTS = st.builds(
    Host,
    tsc_khz=FREQUENCIES,
    scaling=st.booleans(),
    kvm_tolerance_ppm=st.integers(0, 1_000_000),
)


@pytest.mark.parametrize(
    ("tsc_khz", "ppm", "lowest", "highest"),
    [
        (2_600_000, 250, 2_599_350, 2_600_650),
        (2_599_999, 250, 2_599_349, 2_600_648),  # 2599349.00025 and 2600648.99975
        (2_999_999, 100, 2_999_699, 3_000_298),
        (2_600_000, 0, 2_600_000, 2_600_000),
    ],
)
def test_the_bounds_of_the_tolerance_are_rounded_down(
    tsc_khz: int, ppm: int, lowest: int, highest: int
) -> None:
    """adjust_tsc_khz divides integers."""
    host = Host(tsc_khz, True, kvm_tolerance_ppm=ppm)
    for khz, is_within in (
        (lowest - 1, False),
        (lowest, True),
        (highest, True),
        (highest + 1, False),
    ):
        assert frequency.is_within_tolerance(khz, host) == is_within
        assert frequency.effective(khz, host) == (tsc_khz if is_within else khz)
        without_scaling = host._replace(scaling=False)
        assert frequency.catches_up(khz, without_scaling) == (khz > highest)
        assert frequency.is_accepted(khz, without_scaling) == (khz >= lowest)


@given(HOSTS, FREQUENCIES)
def test_a_host_that_does_not_scale_takes_one_of_three_ways(host: Host, khz: int) -> None:
    host = host._replace(scaling=False)
    within = frequency.is_within_tolerance(khz, host)
    catches_up = frequency.catches_up(khz, host)
    refused = not frequency.is_accepted(khz, host)
    assert [within, catches_up, refused].count(True) == 1
    assert frequency.effective(khz, host) == (host.tsc_khz if within else None)
    assert host.tsc_khz is not None
    assert within or catches_up == (khz > host.tsc_khz)


@given(HOSTS, FREQUENCIES)
def test_a_host_that_scales_gives_what_is_out_of_its_tolerance(host: Host, khz: int) -> None:
    host = host._replace(scaling=True)
    assert frequency.is_accepted(khz, host)
    assert not frequency.catches_up(khz, host)
    within = frequency.is_within_tolerance(khz, host)
    assert frequency.effective(khz, host) == (host.tsc_khz if within else khz)


@given(HOSTS)
def test_the_hosts_own_frequency_is_always_given(host: Host) -> None:
    assert host.tsc_khz is not None
    assert frequency.is_within_tolerance(host.tsc_khz, host)
    assert frequency.effective(host.tsc_khz, host) == host.tsc_khz


def test_whether_a_host_scales_may_not_be_known() -> None:
    """Then nothing is claimed about a frequency that it would have to scale to."""
    host = Host(2_600_000, None)
    for khz in (2_000_000, 3_000_000):
        assert frequency.is_accepted(khz, host)
        assert not frequency.catches_up(khz, host)
        assert frequency.effective(khz, host) is None


@pytest.mark.parametrize("scaling", [None, True, False])
def test_the_hosts_frequency_may_not_be_known(scaling: Optional[bool]) -> None:
    host = Host(None, scaling)
    for khz in (0, 1, 2_600_000):
        assert frequency.is_accepted(khz, host)
        assert not frequency.catches_up(khz, host)
        assert frequency.effective(khz, host) is None
        assert frequency.effective(khz, host, ratio=0.5) is None


@pytest.mark.parametrize("scaling", [None, True, False])
def test_a_ratio_that_was_read_decides(scaling: Optional[bool]) -> None:
    """KVM's tolerance may have been another when the frequency was set."""
    host = Host(2_600_000, scaling)
    for khz in (2_600_000, 2_600_001, 2_000_000):
        assert frequency.effective(khz, host, ratio=0.9615387) == 2_500_001  # 2500000.62
        assert frequency.effective(khz, host, ratio=1.0) == 2_600_000
    assert frequency.effective(None, host, ratio=1.0) is None  # nothing is known of the vCPU


@pytest.mark.parametrize(
    ("clocksource", "rests"),
    [
        ("tsc", True),
        ("hyperv_clocksource_tsc_page", True),
        ("", True),  # not known
        ("hpet", False),
        ("kvm-clock", False),
        ("hyperv_clocksource_msr", False),
        ("tsc-early", False),
    ],
)
def test_kvms_count_of_tscs_needs_a_clocksource_that_is_the_tsc(
    clocksource: str, rests: bool
) -> None:
    assert frequency.rests_on_tsc(Host(clocksource=clocksource)) is rests


def test_a_distance_is_that_from_what_was_wanted() -> None:
    assert frequency.ppm_between(2_600_260, 2_600_000) == pytest.approx(100)
    assert frequency.ppm_between(2_599_740, 2_600_000) == pytest.approx(100)
    assert frequency.ppm_between(1_000_000, 2_000_000) == pytest.approx(500_000)
    assert frequency.ppm_between(2_000_000, 1_000_000) == pytest.approx(1_000_000)
    assert frequency.ppm_between(0, 1_000_000) == pytest.approx(1_000_000)
    for khz, wanted in ((None, 1), (1, None), (None, None), (1, 0)):
        assert frequency.ppm_between(khz, wanted) is None
