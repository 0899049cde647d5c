"""The dashboard, drawn by Grafana's own components, and what its queries cost in a large fleet."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.support import fleet, grafana
from tests.support.guests import wait_for
from tests.support.observer import Observer
from tests.support.prometheus import Span, check_rules, free_port, prometheus, query, series
from tests.support.scenarios import skewed
from tscwatch.model import Host

UUID = "6e0b1d3a-5a43-4a4c-9a0e-0d6a4c3f7b11"
EMPTY = ("tscwatch_vcpu_tsc_lag_seconds", "tscwatch_vm_owner_info")
"""What the guest of the run does not have: within KVM's tolerance, its TSCs are not apart."""


class Run(NamedTuple):
    """A Prometheus that has scraped a real guest, and the guest's name."""

    address: str
    vm: str
    span: Span


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A guest that migrates, and whose plugged vCPU then has another frequency."""
    directory = tmp_path_factory.mktemp("dashboard")
    with (
        Observer(directory, "--source", "ftrace") as observer,
        prometheus(directory, observer.target) as address,
    ):
        wait_for(lambda: bool(query(address, "increase(tscwatch_mismatches_total[1m])")), "scrapes")
        with skewed(directory, "drawn-", uuid=UUID) as guest:
            active = f'tscwatch_mismatch_active{{kind="vcpu_skew",vm="{guest.name}"}}[1m]'
            wait_for(lambda: bool(query(address, f"count_over_time({active}) > 5")), "some points")
            yield Run(address, guest.name, Span.until_now(60, every_s=1))


@contextmanager
def recorded(directory: Path, hosts: Iterable[fleet.Target], span: Span) -> Iterator[str]:
    """Yield the address of a Prometheus that has the history of simulated hosts."""
    fleet.write_history(directory, hosts, span)
    with prometheus(directory, f"127.0.0.1:{free_port()}") as address:
        yield address


def queries() -> Iterator[Any]:
    """Yield each query with its panel; annotations have no panel of their own."""
    for panel in grafana.panels():
        for target in panel["targets"]:
            yield pytest.param(panel, target, id=f"{panel['title']}-{target['refId']}")
    for annotation in grafana.DASHBOARD["annotations"]["list"]:
        yield pytest.param(grafana.WHOLE_WIDTH, annotation, id=annotation["name"])


@pytest.mark.parametrize(("panel", "target"), list(queries()))
def test_each_query_has_data(run: Run, panel: grafana.Panel, target: dict[str, Any]) -> None:
    values = grafana.choose(run.address, vm=run.vm)
    found = grafana.answer(run.address, panel, target, values, run.span)["result"]
    assert bool(found) != any(metric in target["expr"] for metric in EMPTY), found


def test_the_first_guest_is_one_of_the_worst(run: Run) -> None:
    values = grafana.choose(run.address)
    severity = 'tscwatch_mismatch_active{severity="%s"}'
    worst = query(run.address, f"{severity % 'critical'} or {severity % 'warning'}")
    assert values.raw["vm"] in {series["metric"]["vm"] for series in worst}


def test_grafanas_components_draw_each_panel(run: Run, tmp_path: Path) -> None:
    values = grafana.choose(run.address, vm=run.vm)
    page = grafana.draw(tmp_path, run.address, run.span, values, grafana.rows())
    assert re.findall('class="error".*', page) == []
    assert re.findall('data-truncated="[^"]*"', page) == []
    drawn = [panel for panel in grafana.panels() if f">{panel['title']}</h2>" in page]
    assert drawn == list(grafana.panels())
    assert 'class="empty"' not in page
    assert "No data" not in page
    graphs = [panel for panel in drawn if panel["type"] == "timeseries"]
    assert page.count("<canvas") == len(graphs)
    assert f"var-vm={run.vm}" in page  # the link to the guest
    assert ">warning<" in page


def test_a_healthy_fleet_has_no_panel_without_data(tmp_path: Path) -> None:
    span = Span.until_now(1200, every_s=60)
    host = fleet.simulated(1, "healthy", Host(2_600_000, True, 250, "tsc"), GUESTS)
    with recorded(tmp_path, [host], span) as address:
        values = grafana.choose(address, pool="healthy")
        page = grafana.draw(tmp_path, address, span, values, grafana.rows())
    assert "No data" not in page
    assert "No guest has a mismatch" in page


def check_query(
    directory: Path,
    title: str,
    samples: dict[str, float],
    *input_series: dict[str, str],
    **values: str,
) -> None:
    """Check with promtool what a panel's last query yields after half an hour.

    :param samples: the expected values by their labels.
    :param values: those of the dashboard's variables.
    """
    (panel,) = (panel for panel in grafana.panels() if panel["title"] == title)
    query = {
        "expr": grafana.interpolate(panel["targets"][-1]["expr"], values),
        "eval_time": "30m",
        "exp_samples": [{"labels": key, "value": value} for key, value in samples.items()],
    }
    case = {"input_series": list(input_series), "promql_expr_test": [query]}
    check_rules(directory, "groups: []", case)


def test_hosts_are_down_also_if_none_answers(tmp_path: Path) -> None:
    at = {"job": "tscwatch", "instance": "h1:9978", "pool": "a"}
    check_query(
        tmp_path,
        "Hosts down",
        {"{}": 1},
        series("tscwatch_build_info", "1x10 stale", **at),
        series("up", "1x10 0x20", **at),
        series("up", "0x30", job="node", instance="h1:9100", pool="a"),
        pool=".*",
    )


@pytest.mark.parametrize("others", [(-1,), (-1, 0, -1), (0, 1), (0, -1)])
def test_frequencies_are_compared_with_one_that_a_vcpu_has(
    tmp_path: Path, others: tuple[int, ...]
) -> None:
    """A guest whose first vCPU has the frequency 2^31 Hz, and the others 2^21 Hz more or less."""
    guest = {"instance": "h1", "vm": "db"}
    frequencies, expected = [], {}
    for vcpu, off in enumerate((0, *others)):
        labels = {**guest, "vcpu": str(vcpu)}
        hertz = 2**31 + off * 2**21
        frequencies.append(series("tscwatch_vcpu_tsc_effective_hertz", f"{hertz}x30", **labels))
        expected[f'{{instance="h1",vm="db",vcpu="{vcpu}"}}'] = 1e6 * off / 2**10
    check_query(tmp_path, "Rate of each vCPU", expected, *frequencies, **guest)


# 2,000 hosts with 100,000 vCPUs

LARGE = 2000
HOSTS = 4
"""In each of two pools."""
GUESTS = 7
"""Per host, each with 8 vCPUs."""
MOST_SAMPLES = 10_000_000
"""In memory, for one query: a fifth of what Prometheus permits by default."""


@pytest.fixture(scope="module")
def two_pools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Hosts all of whose guests are skewed, so that each vCPU has series of its own."""
    directory = tmp_path_factory.mktemp("fleet")
    span = Span.until_now(6 * 3600, every_s=120)
    targets = (
        fleet.simulated(number, pool, Host(2_600_000 + number, True, 250, "tsc"), GUESTS, GUESTS)
        for pool in ("a", "b")
        for number in range(HOSTS)
    )
    with recorded(directory, targets, span) as address:
        yield Run(address, "a-h00-guest-1000", span)


@pytest.mark.parametrize(("panel", "target"), list(queries()))
def test_a_large_fleet_can_be_queried(
    two_pools: Run, panel: grafana.Panel, target: dict[str, Any]
) -> None:
    address, vm, span = two_pools
    samples = []
    for chosen in ({"pool": "a"}, {}):
        values = grafana.choose(address, vm=vm, **chosen)
        if chosen:
            values.raw["instance"] = "a-.*"  # as if all its hosts were selected
        data = grafana.answer(address, panel, target, values, span, stats="all")
        samples.append(data["stats"]["samples"]["peakSamples"])
    half, all_hosts = samples
    per_host = (all_hosts - half) / HOSTS
    assert half + per_host * (LARGE - HOSTS) <= MOST_SAMPLES


MOST_SERIES = 40
"""That a browser must draw."""
MOST_GUESTS = 500
"""In the list of guests."""
_LAST = 'vcpu="7"'
"""The vCPU that is apart in each skewed guest."""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """More hosts, pools, skewed guests, vCPUs of one guest, and guests than are shown."""
    directory = tmp_path_factory.mktemp("wide")
    span = Span.until_now(600, every_s=60)
    first, *others = (
        fleet.simulated(0, f"p{number:02}", Host(2_600_000, True, 250, "tsc"), 1, 1)
        for number in range(MOST_SERIES + 1)
    )
    ((_, published),) = first.published
    off = {name: value for name, value in published.items() if _LAST in name}
    for vcpu in range(8, 8 + MOST_SERIES):
        published |= {name.replace(_LAST, f'vcpu="{vcpu}"'): off[name] for name in off}
    healthy = range(MOST_GUESTS - MOST_SERIES)
    published |= {f'tscwatch_vm_info{{vm="healthy-{number}",': 1 for number in healthy}
    with recorded(directory, [first, *others], span) as address:
        yield Run(address, "p00-h00-guest-1000", span)


@pytest.mark.parametrize(("panel", "target"), list(queries()))
def test_few_series_are_drawn(wide: Run, panel: grafana.Panel, target: dict[str, Any]) -> None:
    values = grafana.choose(wide.address, vm=wide.vm)
    found = grafana.answer(wide.address, panel, target, values, wide.span)["result"]
    assert len(found) <= MOST_SERIES


def test_the_list_of_guests_is_short_and_has_each_guest_of_one_host(wide: Run) -> None:
    (variable,) = (v for v in grafana.DASHBOARD["templating"]["list"] if v["name"] == "vm")
    values = grafana.choose(wide.address)
    offered = grafana.options(wide.address, variable, values)
    assert len(offered) == MOST_GUESTS
    assert all("-guest-" in name for name in offered[: MOST_SERIES + 1])  # the skewed ones
    values.raw["instance"] = "p00-h00"
    of_host = grafana.options(wide.address, variable, values)
    assert len(of_host) == 1 + MOST_GUESTS - MOST_SERIES
