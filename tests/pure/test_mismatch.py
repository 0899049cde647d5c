"""Every kind of mismatch has all of its parts, in the code and in what is shipped beside it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tests.support.histories import HOST_KHZ
from tscwatch.analysis.mismatch import (
    DEFAULT_TOLERANCE,
    MISMATCHES,
    Context,
    VcpuFacts,
    evaluate,
)
from tscwatch.model import KINDS, SEVERITIES, VM_SCOPE, Guest, Host, Kind, Severity

ROOT = Path(__file__).parents[2]
OTHER_KHZ = HOST_KHZ + 260
CONTEXT = Context(
    Host(HOST_KHZ, False),
    Guest(1, "qemu", tsc_khz=HOST_KHZ),
    1,
    HOST_KHZ,
    common_effective=HOST_KHZ,
)


def off_by(khz: int, lag: float) -> dict[Kind, VcpuFacts]:
    """Return an example of each kind.

    :param khz: how far the vCPU's frequency is off.
    :param lag: how many seconds its TSC is behind.
    """
    other = HOST_KHZ + khz
    return {
        "desync": VcpuFacts(lag=lag, phase="hotplug", effective=other),
        "refused": VcpuFacts(initial=HOST_KHZ, refused=(other, -22)),
        "withheld": VcpuFacts(reported=other, withheld=True),
        "vcpu_skew": VcpuFacts(requested=other, written=(1, other), effective=other),
        "configured": VcpuFacts(requested=other),
        "readback": VcpuFacts(requested=HOST_KHZ, reported=other),
        "unscaled": VcpuFacts(requested=HOST_KHZ, effective=other),
        "changed": VcpuFacts(requested=other, changed_from=HOST_KHZ),
    }


OFF = off_by(260, 9.14)
"""Of each kind, a vCPU that is 100 ppm off."""
NEAR, FAR = off_by(26, 1e-3), off_by(2600, -20)
"""Likewise, 10 and 1000 ppm."""
CRITICAL = ("desync", "vcpu_skew")
"""The guest's vCPUs disagree, by however little."""


def test_the_table_has_every_kind() -> None:
    assert tuple(MISMATCHES) == KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_a_vcpu_that_is_off_is_sized_and_described(kind: Kind) -> None:
    assert kind in OFF, f"no example of {kind}"
    rule = MISMATCHES[kind]
    assert rule.is_off(OFF[kind], CONTEXT, 0)
    deviation = evaluate(kind, [(2, OFF[kind])], CONTEXT)
    assert deviation is not None
    assert deviation.vcpus == (2,)
    assert deviation.ppm == pytest.approx(100)
    assert deviation.severity == ("critical" if kind in CRITICAL else "warning")
    assert "vCPU 2" in deviation.detail


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vcpus", [(NEAR, FAR, OFF), (FAR, OFF, NEAR), (OFF, NEAR, FAR)])
def test_the_vcpu_that_is_off_most_has_the_size_and_the_severity(
    kind: Kind, vcpus: tuple[dict[Kind, VcpuFacts], ...]
) -> None:
    deviation = evaluate(kind, [(index, vcpu[kind]) for index, vcpu in enumerate(vcpus)], CONTEXT)
    assert deviation is not None
    assert deviation.vcpus == (0, 1, 2)
    assert deviation.ppm == pytest.approx(1000)
    assert deviation.severity == "critical"
    assert deviation.requested_ppm == (pytest.approx(1000) if kind == "vcpu_skew" else None)
    assert deviation.apart_seconds == (20 if kind == "desync" else None)


@pytest.mark.parametrize("vcpu", [VcpuFacts(apart_by_kvm=True), VcpuFacts(lag=1e-3)])
def test_a_size_that_is_not_known_is_not_the_largest(vcpu: VcpuFacts) -> None:
    for vcpus in ([(0, vcpu), (1, OFF["desync"])], [(0, OFF["desync"]), (1, vcpu)]):
        deviation = evaluate("desync", vcpus, CONTEXT)
        assert deviation is not None
        assert deviation.ppm == pytest.approx(100)
        assert deviation.apart_seconds == 9.14


@pytest.mark.parametrize("kind", KINDS)
def test_a_vcpu_of_which_nothing_is_known_is_not_off(kind: Kind) -> None:
    assert not MISMATCHES[kind].is_off(VcpuFacts(), CONTEXT, 0)
    assert evaluate(kind, [], CONTEXT) is None


@pytest.mark.parametrize("kind", KINDS)
def test_it_has_a_severity_whatever_its_size(kind: Kind) -> None:
    for vcpu in (*OFF.values(), VcpuFacts()):
        assert MISMATCHES[kind].severity(vcpu, CONTEXT) in SEVERITIES


@pytest.mark.parametrize(
    ("khz", "severity"),
    [
        (HOST_KHZ - 2, "info"),
        (HOST_KHZ + 130, "info"),
        (HOST_KHZ + 131, "warning"),
        (HOST_KHZ + 650, "warning"),
        (HOST_KHZ - 650, "warning"),  # 250 ppm of the host's frequency, but 250.06 ppm of its own
        (HOST_KHZ - 651, "critical"),
    ],
)
def test_a_rate_that_is_off_by_design_is_not_critical(khz: int, severity: Severity) -> None:
    vcpu = VcpuFacts(requested=khz, effective=HOST_KHZ)
    assert MISMATCHES["unscaled"].severity(vcpu, CONTEXT) == severity


@pytest.mark.parametrize(
    ("khz", "severity"),
    [
        (HOST_KHZ + 130, "info"),  # 50 ppm
        (HOST_KHZ + 131, "warning"),
        (HOST_KHZ + 650, "warning"),  # 250 ppm, KVM's own tolerance
        (HOST_KHZ + 651, "critical"),
    ],
)
def test_a_limit_belongs_to_the_milder_severity(khz: int, severity: Severity) -> None:
    assert MISMATCHES["configured"].severity(VcpuFacts(requested=khz), CONTEXT) == severity


def test_vcpus_that_tick_alike_are_skewed_but_not_critical() -> None:
    vcpu = VcpuFacts(requested=OTHER_KHZ, written=(1, OTHER_KHZ), effective=HOST_KHZ)
    deviation = evaluate("vcpu_skew", [(2, vcpu)], CONTEXT)
    assert deviation is not None
    assert (deviation.severity, deviation.ppm) == ("warning", 0)
    assert deviation.requested_ppm == pytest.approx(100)
    assert "all tick alike" in deviation.detail


@pytest.mark.parametrize(
    ("vcpu", "sentence"),
    [
        (
            VcpuFacts(lag=9.14, phase="hotplug", effective=HOST_KHZ),
            "vCPU 2's TSC is 9.1 s behind the others (started at 0 when plugged); it ticks at the "
            "same rate",
        ),
        (
            VcpuFacts(lag=-0.5, phase="hotplug", effective=OTHER_KHZ),
            "vCPU 2's TSC is 500.0 ms ahead of the others; it ticks 100.0 ppm faster",
        ),
        (VcpuFacts(lag=2e-6), "vCPU 2's TSC is 2.0 us behind the others"),
        (
            VcpuFacts(apart_by_kvm=True),
            "the TSC of vCPU 2 does not match the others'; by how much they are apart is not known",
        ),
    ],
)
def test_a_desync_states_what_the_guest_suffers(vcpu: VcpuFacts, sentence: str) -> None:
    deviation = evaluate("desync", [(2, vcpu)], CONTEXT)
    assert deviation is not None
    assert deviation.detail == sentence
    assert deviation.apart_seconds == (None if vcpu.lag is None else abs(vcpu.lag))


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_explained(kind: Kind) -> None:
    meaning, origin, advice = MISMATCHES[kind].explanation
    assert meaning, f"{kind} has no meaning"
    assert origin, f"{kind} has no origin"
    assert advice, f"{kind} has no advice"


@pytest.mark.parametrize("kind", DEFAULT_TOLERANCE)
def test_a_tolerance_is_a_key_of_the_example_configuration(kind: Kind) -> None:
    example = yaml.safe_load((ROOT / "deploy/tscwatch.yaml").read_text())
    section = f"tolerance_{MISMATCHES[kind].unit}"
    assert example[section][kind] == DEFAULT_TOLERANCE[kind]
    assert not MISMATCHES[kind].is_off(OFF[kind], CONTEXT, 100.1)


@pytest.mark.parametrize("kind", KINDS)
def test_one_alert_covers_it_and_the_runbook_explains_that_alert(kind: Kind) -> None:
    text = (ROOT / "deploy/prometheus/tscwatch.rules.yml").read_text()
    rules = [rule for group in yaml.safe_load(text)["groups"] for rule in group["rules"]]
    alerts = [
        rule["alert"]
        for rule in rules
        if rule.get("expr", "").startswith("tscwatch_mismatch_active")
        and selects(rule["expr"], kind)
    ]
    assert len(alerts) == 1, f"{kind} is covered by {alerts}"
    runbook = (ROOT / "deploy/RUNBOOK.md").read_text()
    section = runbook.partition(f"\n## {alerts[0]}\n")[2].partition("\n## ")[0]
    assert f"`{kind}`" in section, f"RUNBOOK.md, {alerts[0]}: {kind} is not explained"


def selects(expr: str, kind: str) -> bool:
    match = re.search(r'\{.*?kind(=~|!~|=|!=)"([\w|]+)"', expr)
    assert match, expr
    return (kind in match[2].split("|")) == match[1].startswith("=")


def test_the_vms_default_is_no_vcpu() -> None:
    deviation = evaluate("refused", [(VM_SCOPE, OFF["refused"])], CONTEXT)
    assert deviation is not None
    assert deviation.vcpus == ()
    assert "the VM's default" in deviation.detail


def test_many_vcpus_make_one_sentence() -> None:
    skewed = [(index, OFF["vcpu_skew"]) for index in range(10)]
    deviation = evaluate("vcpu_skew", skewed, CONTEXT)
    assert deviation is not None
    assert len(deviation.vcpus) == 10
    assert deviation.detail.count("vCPU") == 4
    assert "and 6 more" in deviation.detail
