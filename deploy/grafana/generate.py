"""Generates the dashboard: ``make grafana``."""

from __future__ import annotations

from pathlib import Path

from grafana_foundation_sdk.builders import dashboard, prometheus, stat, table, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import DataSourceRef, VariableRefresh

HERE = Path(__file__).parent
_PROMETHEUS = DataSourceRef(type_val="prometheus", uid="${datasource}")
_OF_HOST = '{instance=~"$instance"}'
_OF_VM = '{instance=~"$instance",vm=~"$vm"}'


def _query(expr: str, legend: str = "", instant: bool = False) -> prometheus.Dataquery:
    query = prometheus.Dataquery().expr(expr).datasource(_PROMETHEUS)
    if instant:
        return query.instant().format("table")
    return query.range().legend_format(legend)


def _number(title: str, expr: str) -> stat.Panel:
    return stat.Panel().title(title).height(4).span(6).with_target(_query(expr, instant=True))


def _lines(title: str, unit: str, *queries: tuple[str, str]) -> timeseries.Panel:
    panel = timeseries.Panel().title(title).unit(unit).height(8).span(12).datasource(_PROMETHEUS)
    for expr, legend in queries:
        panel = panel.with_target(_query(expr, legend))
    return panel


def _variable(name: str, metric: str, label: str) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(name)
        .label(name)
        .query(f"label_values({metric}, {label})")
        .datasource(_PROMETHEUS)
        .multi(True)
        .include_all(True)
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)  # the set of guests changes
    )


def the_dashboard() -> dashboard.Dashboard:
    """Return the dashboard: a row for the fleet, one for the hosts, one for the guests."""
    calls = "sum by (phase, step) (increase(tscwatch_tsc_ioctls_total"
    phases = f'{calls}{{instance=~"$instance",phase!~"probe|unknown"}}[$__rate_interval])) > 0'
    return (
        dashboard.Dashboard("TSC frequency of KVM guests")
        .uid("tscwatch")
        .tags(["tscwatch", "kvm"])
        .refresh("30s")
        .time("now-6h", "now")
        .with_variable(dashboard.DatasourceVariable("datasource").type("prometheus"))
        .with_variable(_variable("instance", "tscwatch_build_info", "instance"))
        .with_variable(_variable("vm", 'tscwatch_vm_info{instance=~"$instance"}', "vm"))
        .annotation(
            dashboard.AnnotationQuery()
            .name("phases")
            .datasource(_PROMETHEUS)
            .enable(True)
            .icon_color("blue")
            .expr(phases)
        )
        .with_row(dashboard.Row("Fleet"))
        .with_panel(_number("Hosts", "count(tscwatch_build_info)"))
        .with_panel(_number("Guests", "count(tscwatch_vm_info)"))
        .with_panel(
            _number(
                "Guests with a mismatch",
                'count(count by (instance, vm) (tscwatch_mismatch_active{severity!="info"} == 1)) '
                "or vector(0)",
            )
        )
        .with_panel(_number("Guests with a hotplug risk", "sum(tscwatch_vm_hotplug_risk)"))
        .with_panel(
            table.Panel()
            .title("Mismatches")
            .height(8)
            .span(24)
            .datasource(_PROMETHEUS)
            .with_target(_query("1e6 * tscwatch_mismatch_deviation_ratio", instant=True))
        )
        .with_panel(_lines("Hosts", "hertz", ("tscwatch_host_tsc_hertz", "{{instance}}")))
        .with_panel(
            _lines(
                "Mismatches raised, by kind",
                "short",
                (
                    "sum by (kind) (increase(tscwatch_mismatches_total[$__rate_interval]))",
                    "{{kind}}",
                ),
            )
        )
        .with_row(dashboard.Row("Host: $instance"))
        .with_panel(
            _lines(
                "Calls by phase",
                "ops",
                (
                    f"sum by (phase) (rate(tscwatch_tsc_ioctls_total{_OF_HOST}[$__rate_interval]))",
                    "{{phase}}",
                ),
            )
        )
        .with_panel(
            _lines(
                "Lost events and contradictions",
                "short",
                (
                    f"sum by (reason) (increase(tscwatch_events_lost_total{_OF_HOST}"
                    "[$__rate_interval]))",
                    "lost: {{reason}}",
                ),
                (
                    f"sum by (claim) (increase(tscwatch_contradictions_total{_OF_HOST}"
                    "[$__rate_interval]))",
                    "contradicted: {{claim}}",
                ),
            )
        )
        .with_row(dashboard.Row("Guest: $vm"))
        .with_panel(
            _lines(
                "Seconds apart",
                "s",
                (f"tscwatch_vm_tsc_spread_seconds{_OF_VM}", "{{vm}}"),
            )
        )
        .with_panel(
            _lines(
                "Effective",
                "hertz",
                (f"tscwatch_vm_tsc_effective_min_hertz{_OF_VM}", "{{vm}} lowest"),
                (f"tscwatch_vm_tsc_effective_max_hertz{_OF_VM}", "{{vm}} highest"),
                (f"tscwatch_vcpu_tsc_effective_hertz{_OF_VM}", "{{vm}} vCPU {{vcpu}}"),
            )
        )
        .with_panel(
            _lines(
                "Reported by KVM, of vCPUs that differ",
                "hertz",
                (f"tscwatch_vcpu_tsc_reported_hertz{_OF_VM}", "{{vm}} vCPU {{vcpu}}"),
            )
        )
        .with_panel(
            _lines(
                "KVM's view, and hotplug risk",
                "short",
                (f"tscwatch_vm_tsc_matched_vcpus{_OF_VM}", "{{vm}} synchronised vCPUs"),
                (f"tscwatch_vm_master_clock{_OF_VM}", "{{vm}} master clock"),
                (f"tscwatch_vm_hotplug_risk{_OF_VM}", "{{vm}} hotplug risk"),
            )
        )
    )


def generated() -> dict[str, str]:
    """Return the content of each generated file, by file name."""
    board = JSONEncoder(sort_keys=True, indent=2).encode(the_dashboard().build())
    return {"dashboard.json": board + "\n"}


if __name__ == "__main__":
    for name, content in generated().items():
        (HERE / name).write_text(content)
