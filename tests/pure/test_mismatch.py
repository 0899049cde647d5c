"""Every kind of mismatch has all of its parts, in the code and in what is shipped beside it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tests.support.histories import HOST_KHZ
from tscwatch.analysis.mismatch import (
    DEFAULT_TOLERANCE_PPM,
    MISMATCHES,
    Context,
    VcpuFacts,
    evaluate,
)
from tscwatch.model import KINDS, SEVERITIES, VM_SCOPE, Guest, Host, Kind

ROOT = Path(__file__).parents[2]
OTHER_KHZ = HOST_KHZ + 260
CONTEXT = Context(Host(HOST_KHZ, False), Guest(1, "qemu", tsc_khz=HOST_KHZ), 1, HOST_KHZ)

OFF: dict[Kind, VcpuFacts] = {
    "refused": VcpuFacts(initial=HOST_KHZ, refused=(OTHER_KHZ, -22)),
    "withheld": VcpuFacts(reported=OTHER_KHZ, withheld=True),
    "vcpu_skew": VcpuFacts(requested=OTHER_KHZ, written=(1, OTHER_KHZ)),
    "configured": VcpuFacts(requested=OTHER_KHZ),
    "readback": VcpuFacts(requested=HOST_KHZ, reported=OTHER_KHZ),
    "unscaled": VcpuFacts(requested=HOST_KHZ, effective=OTHER_KHZ),
    "changed": VcpuFacts(requested=OTHER_KHZ, changed_from=HOST_KHZ),
}
"""Of each kind, a vCPU that is 100 ppm off."""


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
    assert deviation.severity == "warning"
    assert "vCPU 2" in deviation.detail


@pytest.mark.parametrize("kind", KINDS)
def test_a_vcpu_of_which_nothing_is_known_is_not_off(kind: Kind) -> None:
    assert not MISMATCHES[kind].is_off(VcpuFacts(), CONTEXT, 0)
    assert evaluate(kind, [], CONTEXT) is None


@pytest.mark.parametrize("kind", KINDS)
def test_it_has_a_severity_whatever_its_size(kind: Kind) -> None:
    for ppm in (None, 0.0, 250.0, 251.0):
        assert MISMATCHES[kind].severity(ppm, CONTEXT) in SEVERITIES


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_explained(kind: Kind) -> None:
    meaning, origin, advice = MISMATCHES[kind].explanation
    assert meaning, f"{kind} has no meaning"
    assert origin, f"{kind} has no origin"
    assert advice, f"{kind} has no advice"


@pytest.mark.parametrize("kind", DEFAULT_TOLERANCE_PPM)
def test_a_tolerance_is_a_key_of_the_example_configuration(kind: Kind) -> None:
    example = yaml.safe_load((ROOT / "deploy/tscwatch.yaml").read_text())
    assert example["tolerance_ppm"][kind] == DEFAULT_TOLERANCE_PPM[kind]
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
    match = re.search(r'\{kind(=|!=)"(\w+)"\}', expr)
    assert match, expr
    return (match[2] == kind) == (match[1] == "=")


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
