"""The dashboard: a row each for the fleet, the pools of hosts, the hosts, and one guest.

It is read in that order: which guests are in trouble, whether their hosts fit together, whether
their hosts are observed, and what each vCPU of a guest does.  Every query returns few series,
however large the fleet is, and is evaluated at few points if it reads series of every host.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import count
from typing import Any, Optional, TypeVar, Union

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, table, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import (
    BigValueColorMode,
    BigValueGraphMode,
    BigValueTextMode,
    GraphDrawStyle,
    LegendDisplayMode,
    LegendPlacement,
    LineInterpolation,
    SortOrder,
    StackingMode,
    TableCellHeight,
    TooltipDisplayMode,
    VisibilityMode,
)
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DashboardLinkType,
    DataSourceRef,
    DataTransformerConfig,
    DynamicConfigValue,
    FieldColorModeId,
    Threshold,
    ThresholdsMode,
    ValueMap,
    ValueMappingResult,
    VariableHide,
    VariableOption,
    VariableRefresh,
)

Panel = TypeVar("Panel", stat.Panel, table.Panel, timeseries.Panel)
AnyPanel = Union[stat.Panel, table.Panel, timeseries.Panel]
Colours = tuple[tuple[Optional[float], str], ...]
"""Lowest values, None for the first, and the colour from each on."""

_PROMETHEUS = DataSourceRef(type_val="prometheus", uid="${datasource}")
_ROWS = 20
"""Of a table of guests or hosts."""
_VCPUS = 16
"""vCPUs of one guest in a graph."""
_GUESTS = 500
"""In the list of guests."""
_POINTS = 120
"""At how many points a graph evaluates a query that reads series of every host."""

_FLEET = 'pool=~"$pool"'
_HOSTS = 'pool=~"$pool",instance=~"$instance"'
_GUEST = 'instance=~"$instance",vm="$vm"'
_HOSTS_OF_GUEST = 'instance=~"$guest_host"'

_HEALTHY: Colours = ((None, "green"),)
_TROUBLE: Colours = ((None, "green"), (1, "red"))
_CONCERN: Colours = ((None, "green"), (1, "orange"))
_FACT: Colours = ((None, "green"), (1, "blue"))

_SEVERITIES = {
    0: ("none", "green"),
    1: ("info", "blue"),
    2: ("warning", "orange"),
    3: ("critical", "red"),
}


# Expressions


def _mismatches(selector: str) -> str:
    """Each active mismatch; its value is the key of its severity in :data:`_SEVERITIES`."""
    active = f"tscwatch_mismatch_active{{{selector},severity="
    return f'3 * {active}"critical"}} or 2 * {active}"warning"}} or {active}"info"}}'


def _severity(selector: str) -> str:
    """The worst severity of each guest that has a mismatch."""
    return f"max by (instance, vm) ({_mismatches(selector)})"


def _count(expr: str) -> str:
    return f"count({expr}) or vector(0)"


def _worst_guests() -> str:
    """The guests of the first severity, among them those whose TSCs are farthest apart."""
    severity = f"1e9 * {_severity(_FLEET)}"
    apart = f"max by (instance, vm) (tscwatch_vm_tsc_spread_seconds{{{_FLEET}}})"
    return f"topk({_ROWS}, {severity} + on (instance, vm) {apart} or {severity})"


def _worst_mismatches() -> str:
    """When the mismatch of each guest began that has the guest's severity; the latest of several.

    The value is in milliseconds.
    """
    severity = _mismatches(_FLEET)
    started = f"tscwatch_mismatch_started_timestamp_seconds{{{_FLEET}}}"
    worst = (
        f"max by (instance, vm, kind) ({severity}) "
        f"== on (instance, vm) group_left () max by (instance, vm) ({severity})"
    )
    latest = f"topk by (instance, vm) (1, {started} and on (instance, vm, kind) ({worst}))"
    return f"1e3 * max by (instance, vm, kind, phase) ({latest})"


def _ppm_of_pool() -> str:
    """How far each host's frequency is from the median of its pool, in ppm."""
    hertz = f"tscwatch_host_tsc_hertz{{{_FLEET}}}"
    median = f"quantile by (pool) (0.5, {hertz})"
    return f"max by (instance, pool) (1e6 * ({hertz} / on (pool) group_left () {median} - 1))"


def _ppm_of_guest(frequency: str) -> str:
    """How far a frequency of each vCPU is from the median of the guest's vCPUs, in ppm.

    If the two in the middle differ, the median is the higher one, so that it is a vCPU's.
    """
    hertz = f"tscwatch_vcpu_tsc_{frequency}_hertz{{{_GUEST}}}"
    middle = f"quantile by (instance, vm) (0.5, {hertz})"
    median = f"min by (instance, vm) ({hertz} >= on (instance, vm) group_left () {middle})"
    return f"1e6 * ({hertz} / on (instance, vm) group_left () {median} - 1)"


def _largest(number: int, expr: str) -> str:
    return f"{expr} and topk({number}, abs({expr}))"


def _increase(metric: str, by: str = "", more: str = "") -> str:
    """How often something happened on the selected hosts; by a label, only what did happen."""
    increase = f"(increase({metric}{{{_HOSTS}{more}}}[$__rate_interval]))"
    return f"sum by ({by}) {increase} > 0" if by else f"sum {increase}"


# Panels


def _thresholds(colours: Colours) -> dashboard.ThresholdsConfig:
    steps = [Threshold(value, colour) for value, colour in colours]
    return dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps)


def _texts(meanings: dict[int, tuple[str, str]]) -> list[Any]:
    """Show a text in a colour for each value."""
    results = {str(key): ValueMappingResult(*meaning) for key, meaning in meanings.items()}
    return [ValueMap(results)]


def _color(mode: FieldColorModeId, fixed: Optional[str] = None) -> dict[str, str]:
    return {"mode": mode.value, **({"fixedColor": fixed} if fixed else {})}


def _described(panel: Panel, title: str, description: str, section: str) -> Panel:
    """Add a title, a description, and a link to a section of the runbook."""
    link = dashboard.DashboardLink("Runbook").type(DashboardLinkType.LINK)
    url = "${runbook:raw}" + (f"#{section}" if section else "")
    return (
        panel.title(title)
        .description(description)
        .datasource(_PROMETHEUS)
        .links([link.url(url).target_blank(True)])
    )


def _number(
    title: str,
    description: str,
    *exprs: Union[str, tuple[str, str]],
    section: str = "",
    colours: Colours,
    span: int = 3,
) -> stat.Panel:
    """A number of now, or one for each series with its legend."""
    panel = (
        stat.Panel()
        .height(4)
        .span(span)
        .thresholds(_thresholds(colours))
        .color_scheme(dashboard.FieldColor().mode(FieldColorModeId.THRESHOLDS))
        .color_mode(BigValueColorMode.VALUE)
        .graph_mode(BigValueGraphMode.NONE)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .text_mode(BigValueTextMode.VALUE)
        .no_value("unknown")
    )
    for index, each in enumerate(exprs):
        expr, legend = (each, "") if isinstance(each, str) else each
        query = prometheus.Dataquery().expr(expr).instant().legend_format(legend)
        panel.with_target(query.datasource(_PROMETHEUS).ref_id(_ref_id(index)))
        if legend:
            panel.text_mode(BigValueTextMode.VALUE_AND_NAME)
    return _described(panel, title, description, section)


def _legend(*values: str) -> common.VizLegendOptions:
    """A legend, with values of each line if there are any."""
    legend = common.VizLegendOptions().show_legend(True).placement(LegendPlacement.BOTTOM)
    return legend.display_mode(LegendDisplayMode.LIST).calcs(list(values))


def _lines(
    title: str,
    description: str,
    *queries: tuple[str, str],
    section: str = "",
    unit: str,
    decimals: Optional[int] = None,
    span: int = 12,
    points: Optional[int] = None,
    least: Optional[float] = None,
) -> timeseries.Panel:
    """A graph; each query has an expression and a legend.

    :param points: at how many points it is evaluated, if not at each pixel.
    :param least: what the axis shows on both sides of 0 if no value is larger.
    """
    tooltip = common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI).sort(SortOrder.DESCENDING)
    panel = (
        timeseries.Panel()
        .height(8)
        .span(span)
        .unit(unit)
        .color_scheme(dashboard.FieldColor().mode(FieldColorModeId.PALETTE_CLASSIC))
        .line_width(2)
        .line_interpolation(LineInterpolation.STEP_AFTER)
        .show_points(VisibilityMode.NEVER)
        .legend(_legend())
        .tooltip(tooltip)
    )
    if decimals is not None:
        panel.decimals(decimals)
    if points is not None:
        panel.max_data_points(points)
    if least is not None:
        panel.axis_soft_min(-least).axis_soft_max(least)
    for index, (expr, name) in enumerate(queries):
        query = prometheus.Dataquery().expr(expr).range().legend_format(name)
        panel.with_target(query.datasource(_PROMETHEUS).ref_id(_ref_id(index)))
    return _described(panel, title, description, section)


def _bars(
    title: str, description: str, *queries: tuple[str, str], section: str
) -> timeseries.Panel:
    """Stacked counts."""
    panel = _lines(
        title,
        description,
        *queries,
        section=section,
        unit="short",
        decimals=0,
        span=8,
        points=_POINTS,
    )
    panel.min(0).axis_soft_max(1).no_value("None in this time")
    return panel.draw_style(GraphDrawStyle.BARS).fill_opacity(80).line_width(0).stacking(_stacked())


def _stacked() -> common.StackingConfig:
    return common.StackingConfig().mode(StackingMode.NORMAL).group("A")


def _columns(
    title: str,
    description: str,
    columns: dict[str, tuple[str, Optional[int]]],
    *exprs: str,
    section: str = "",
) -> table.Panel:
    """A table of now, whose rows are joined by the labels that all queries have.

    :param columns: the title and the width, in pixels, of the columns for labels and for queries
        (A, B, ...), in their order.
    """
    panel = table.Panel().cell_height(TableCellHeight.SM)
    for index, expr in enumerate(exprs):
        query = prometheus.Dataquery().expr(expr).instant().format("table")
        panel.with_target(query.datasource(_PROMETHEUS).ref_id(_ref_id(index)))
    only = len(exprs) == 1
    fields = {_field(name, only): title for name, (title, _) in columns.items()}
    values = {_field(_ref_id(index), only) for index in range(len(exprs))}
    panel.with_transformation(DataTransformerConfig("merge", options={}))
    options = {
        "excludeByName": dict.fromkeys(sorted({"Time"} | values - set(fields)), True),
        "indexByName": {name: index for index, name in enumerate(fields)},
        "renameByName": fields,
    }
    panel.with_transformation(DataTransformerConfig("organize", options=options))
    for name, width in columns.values():
        panel.override_by_name(name, _set(noValue="-", custom_width=width))
    return _described(panel, title, description, section)


def _field(column: str, only: bool) -> str:
    """Return Grafana's name of a label's field, or of that of a query's values."""
    if len(column) > 1:
        return column
    return "Value" if only else f"Value #{column}"


def _ref_id(index: int) -> str:
    return chr(ord("A") + index)


def _set(**properties: object) -> list[DynamicConfigValue]:
    """Return the properties of an override; those of a type of panel begin with ``custom_``."""
    return [
        DynamicConfigValue(name.replace("custom_", "custom."), value)
        for name, value in properties.items()
        if value is not None
    ]


def _coloured_text(meanings: dict[int, tuple[str, str]]) -> list[DynamicConfigValue]:
    return _set(
        mappings=_texts(meanings),
        color=_color(FieldColorModeId.THRESHOLDS),
        custom_cellOptions={"type": "color-text"},
        custom_align="left",
    )


# Rows


def _fleet() -> list[AnyPanel]:
    severity = _severity(_FLEET)
    at_risk = f"tscwatch_vm_hotplug_risk{{{_FLEET}}} == 1"
    has_kvm = f"tscwatch_host_tsc_scaling_supported{{{_FLEET}}} or tscwatch_vm_info{{{_FLEET}}}"
    blind = f"tscwatch_probe_attached{{{_FLEET}}} == 0 and on (instance) ({has_kvm})"
    clockless = (
        f"tscwatch_vm_master_clock{{{_FLEET}}} == 0 unless on (instance, vm) "
        f'tscwatch_mismatch_active{{{_FLEET},kind=~"desync|vcpu_skew"}} unless on (instance) '
        f"tscwatch_host_clocksource_info{{{_FLEET},"
        'clocksource!~"tsc|hyperv_clocksource_tsc_page"}'
    )
    of_tscwatch = "last_over_time(group by (job) (tscwatch_build_info)[1d:10m])"
    down = f"up{{{_FLEET}}} == 0 and on (job) {of_tscwatch}"
    worst = _worst_guests()
    link = {
        "title": "Show this guest",
        "url": "/d/tscwatch?${datasource:queryparam}&${pool:queryparam}&${__url_time_range}"
        "&var-instance=${__data.fields.instance}&var-vm=${__data.fields.vm}",
    }
    guests = (
        _columns(
            "Worst guests",
            f"The {_ROWS} guests with the severest mismatches; among those of one severity, the "
            "guests whose TSCs are farthest apart. Kind and phase are those of the guest's latest "
            "mismatch of that severity. A guest's name leads to the row of that guest.",
            {
                "vm": ("guest", None),
                "instance": ("host", 150),
                "A": ("severity", 80),
                "kind": ("mismatch", 100),
                "phase": ("since phase", 110),
                "B": ("apart", 100),
                "C": ("off by", 110),
                "D": ("began", 150),
            },
            f"floor({worst} / 1e9)",
            f"max by (instance, vm) (tscwatch_vm_tsc_spread_seconds{{{_FLEET}}}) "
            f"and on (instance, vm) {worst}",
            f"1e6 * max by (instance, vm) (tscwatch_mismatch_deviation_ratio{{{_FLEET}}}) "
            f"and on (instance, vm) {worst}",
            f"{_worst_mismatches()} and on (instance, vm) {worst}",
            section="tscdesync",
        )
        .no_value("No guest has a mismatch")
        .height(10)
        .span(16)
        .sort_by(
            [
                common.TableSortByFieldState().display_name("severity").desc(True),
                common.TableSortByFieldState().display_name("apart").desc(True),
            ]
        )
        .override_by_name("guest", _set(links=[link]))
        .override_by_name("severity", _coloured_text(_SEVERITIES))
        .override_by_name("apart", _set(unit="s"))
        .override_by_name("off by", _set(unit="ppm", decimals=1))
        .override_by_name("began", _set(unit="dateTimeFromNow"))
    )
    history = _lines(
        "Guests with a mismatch",
        "By the worst severity of each guest.",
        *((_count(f"{severity} == {key}"), _SEVERITIES[key][0]) for key in (3, 2, 1)),
        unit="short",
        decimals=0,
        span=8,
        points=_POINTS,
    )
    history.height(10).min(0).axis_soft_max(1).fill_opacity(40).line_width(1).stacking(_stacked())
    for name, colour in _SEVERITIES.values():
        history.override_by_name(name, _set(color=_color(FieldColorModeId.FIXED, colour)))
    return [
        _number(
            "Hosts",
            "Hosts whose tscwatch answers.",
            _count(f"tscwatch_build_info{{{_FLEET}}}"),
            colours=((None, "red"), (1, "green")),
            span=2,
        ),
        _number(
            "Hosts down",
            "Hosts whose tscwatch does not answer, of each job in which one did within a day.",
            _count(down),
            section="tscwatchdown",
            colours=_TROUBLE,
        ),
        _number(
            "Hosts blind",
            "Hosts that can use KVM or run guests, and on which a probe is not attached.",
            _count(f"count by (instance) ({blind})"),
            section="tscwatchblind",
            colours=_TROUBLE,
        ),
        _number(
            "Guests",
            "VMs on all hosts.",
            _count(f"tscwatch_vm_info{{{_FLEET}}}"),
            colours=_HEALTHY,
            span=2,
        ),
        _number(
            "Critical",
            "Guests whose vCPUs disagree about time now or tick at different rates, or whose rate "
            "is off by more than KVM's tolerance or by an unknown size.",
            _count(f"{severity} == 3"),
            section="tscdesync",
            colours=_TROUBLE,
        ),
        _number(
            "Warning",
            "Guests whose vCPUs were given different frequencies but tick alike, or whose rate is "
            "off by more than 50 ppm, that have no critical mismatch.",
            _count(f"{severity} == 2"),
            section="tscmismatch",
            colours=_CONCERN,
        ),
        _number(
            "Info",
            "Guests whose rate is off by at most 50 ppm: a clock daemon corrects that.",
            _count(f"{severity} == 1"),
            section="tscmismatch",
            colours=_FACT,
            span=2,
        ),
        _number(
            "No master clock",
            "Guests for which KVM does not use its master clock, although their vCPUs have one "
            "frequency, their TSCs are together, and the host's clocksource is the TSC.",
            _count(f"count by (instance, vm) ({clockless})"),
            section="tscmasterclocklost",
            colours=_CONCERN,
        ),
        _number(
            "Hotplug risk",
            "Guests in which the TSC of a vCPU that is plugged now would start apart from the "
            "others. Nothing is wrong with them yet.",
            _count(at_risk),
            section="hotplug-risk",
            colours=_FACT,
        ),
        guests,
        history,
    ]


def _pools() -> list[AnyPanel]:
    ppm = _ppm_of_pool()
    hertz = f"tscwatch_host_tsc_hertz{{{_FLEET}}}"
    scaling = f"tscwatch_host_tsc_scaling_supported{{{_FLEET}}}"
    farthest = f"and on (instance) topk({_ROWS}, abs({ppm}))"
    clocksources = _number(
        "Clocksources",
        "Hosts by the kernel's clocksource. Unless that is the TSC, KVM uses its master clock for "
        "no guest.",
        (
            f"count by (clocksource) (tscwatch_host_clocksource_info{{{_FLEET}}})",
            "{{clocksource}}",
        ),
        section="tschostclocksource",
        colours=((None, "orange"),),
        span=8,
    )
    for name in ("tsc", "hyperv_clocksource_tsc_page"):
        color = _color(FieldColorModeId.FIXED, "green")
        clocksources.override_by_name(name, _set(color=color))
    return [
        _number(
            "Widest pool",
            "The pool whose fastest host is farthest from its slowest, in ppm. Beyond KVM's "
            "tolerance, 250 ppm by default, a guest cannot keep its frequency if it migrates to a "
            "host that does not scale.",
            (
                f"topk(1, 1e6 * (max by (pool) ({hertz}) / min by (pool) ({hertz}) - 1))",
                "pool {{pool}}",
            ),
            section="tscpooldiffers",
            colours=((None, "green"), (250, "orange")),
            span=8,
        )
        .unit("ppm")
        .decimals(1),
        clocksources,
        _number(
            "TSC scaling",
            "Hosts by whether their hardware scales a guest's TSC.",
            (_count(f"{scaling} == 1"), "scale"),
            (_count(f"{scaling} == 0"), "do not scale"),
            section="tscpooldiffers",
            colours=((None, "text"),),
            span=8,
        ),
        _lines(
            "Frequencies of hosts against their pool",
            f"The frequencies of the {_ROWS // 2} hosts that are farthest from the median of their "
            "pool, in ppm of it. Each boot of a host calibrates its TSC anew.",
            (_largest(_ROWS // 2, ppm), "{{instance}}"),
            section="tscpooldiffers",
            unit="ppm",
            decimals=1,
            least=1,
            points=_POINTS,
        ).height(10),
        _columns(
            "Hosts farthest from their pool",
            f"The {_ROWS} hosts that are farthest from the median of their pool.",
            {
                "instance": ("host", None),
                "pool": ("pool", 110),
                "A": ("off by", 110),
                "B": ("frequency", 130),
                "C": ("TSC scaling", 110),
                "clocksource": ("clocksource", 120),
            },
            f"{ppm} {farthest}",
            f"max by (instance) ({hertz}) {farthest}",
            f"max by (instance) ({scaling}) {farthest}",
            f"max by (instance, clocksource) (tscwatch_host_clocksource_info{{{_FLEET}}}) "
            f"{farthest}",
            section="tscpooldiffers",
        )
        .height(10)
        .span(12)
        .sort_by([common.TableSortByFieldState().display_name("off by").desc(True)])
        .override_by_name("off by", _set(unit="ppm", decimals=1))
        .override_by_name("frequency", _set(unit="hertz", decimals=6))
        .override_by_name("TSC scaling", _coloured_text({0: ("no", "text"), 1: ("yes", "green")})),
    ]


def _hosts() -> list[AnyPanel]:
    some = f"and on (instance) topk({_ROWS}, tscwatch_build_info{{{_HOSTS}}})"
    return [
        _columns(
            "Observers",
            f"tscwatch on the selected hosts, or on {_ROWS} of them.",
            {
                "instance": ("host", None),
                "version": ("tscwatch", None),
                "source": ("source", None),
                "attach": ("attached to", None),
                "program": ("program", None),
                "C": ("configuration", None),
                "D": ("guests", None),
                "E": ("last call", None),
            },
            f"max by (instance, version) (tscwatch_build_info{{{_HOSTS}}}) {some}",
            f"max by (instance, source, attach, program) (tscwatch_source_info{{{_HOSTS}}}) {some}",
            f"max by (instance) (tscwatch_config_last_reload_successful{{{_HOSTS}}}) {some}",
            f"count by (instance) (tscwatch_vm_info{{{_HOSTS}}}) {some}",
            f"1e3 * max by (instance) (tscwatch_last_event_timestamp_seconds{{{_HOSTS}}}) {some}",
            section="tscwatchblind",
        )
        .height(6)
        .span(24)
        .override_by_name(
            "configuration", _coloured_text({0: ("refused", "red"), 1: ("in force", "green")})
        )
        .override_by_name("last call", _set(unit="dateTimeFromNow")),
        _bars(
            "Frequencies set, by phase",
            "KVM_SET_TSC_KHZ calls on the selected hosts, by the phase of the VM's life.",
            (_increase("tscwatch_tsc_ioctls_total", "phase", ',op="set"'), "{{phase}}"),
            section="",
        ),
        _bars(
            "Mismatches raised, by kind",
            "On the selected hosts. A mismatch is raised again when its size or its vCPUs change.",
            (_increase("tscwatch_mismatches_total", "kind"), "{{kind}}"),
            section="tscmismatch",
        ),
        _bars(
            "Failed calls and lost events",
            "On the selected hosts: calls that failed (by `errno` in "
            "`tscwatch_tsc_ioctl_errors_total`), events that were lost, contradictions between "
            "tscwatch and KVM or QEMU, VMs and vCPUs beyond the limits, and runs of BPF programs "
            "that the kernel skipped, nearly all of them at a KVM_RUN.",
            (_increase("tscwatch_tsc_ioctl_errors_total"), "failed calls"),
            (_increase("tscwatch_events_lost_total"), "lost events"),
            (_increase("tscwatch_contradictions_total"), "contradictions"),
            (_increase("tscwatch_tracking_dropped_total"), "not tracked"),
            (_increase("tscwatch_bpf_runs_skipped_total"), "skipped runs"),
            section="tscwatchlosesevents",
        ),
    ]


def _guest() -> list[AnyPanel]:
    vm_info = f"tscwatch_vm_info{{{_GUEST}}}"
    effective, requested = _ppm_of_guest("effective"), _ppm_of_guest("requested")
    lag = f"tscwatch_vcpu_tsc_lag_seconds{{{_GUEST}}}"
    host = f"tscwatch_host_tsc_hertz{{{_HOSTS_OF_GUEST}}}"
    tolerance = f"tscwatch_host_tsc_tolerance_ratio{{{_HOSTS_OF_GUEST}}}"
    switch = {0: ("off", "orange"), 1: ("on", "green")}
    risk = {0: ("none", "green"), 1: ("yes", "blue")}
    not_in_legend = {"legend": True, "tooltip": False, "viz": False}
    whole = _set(
        color=_color(FieldColorModeId.FIXED, "text"),
        custom_lineStyle={"fill": "dash", "dash": [8, 8]},
    )
    return [
        _number(
            "Severity",
            "The worst severity of the guest's mismatches.",
            f"max({_mismatches(_GUEST)} or 0 * {vm_info})",
            section="tscdesync",
            colours=_HEALTHY,
            span=4,
        ).mappings(_texts(_SEVERITIES)),
        _number(
            "Apart now",
            "How far the TSCs of the guest's vCPUs are apart.",
            f"max(tscwatch_vm_tsc_spread_seconds{{{_GUEST}}})",
            section="tscdesync",
            colours=((None, "green"), (1e-6, "red")),
            span=4,
        ).unit("s"),
        _number(
            "Rates differ by",
            "How far the rates of the guest's vCPUs are apart. If it is not 0, their TSCs drift.",
            f"1e6 * max(tscwatch_vm_tsc_rate_spread_ratio{{{_GUEST}}})",
            section="tscvcpuskew",
            colours=((None, "green"), (1e-3, "red")),
            span=4,
        )
        .unit("ppm")
        .decimals(1),
        _number(
            "Synchronised vCPUs",
            "How many vCPUs KVM considers synchronised.",
            f"max(tscwatch_vm_tsc_matched_vcpus{{{_GUEST}}})",
            section="tscmasterclocklost",
            colours=((None, "text"),),
            span=4,
        ),
        _number(
            "KVM's master clock",
            "Whether KVM uses its master clock for the guest; kvmclock is slower without it.",
            f"min(tscwatch_vm_master_clock{{{_GUEST}}})",
            section="tscmasterclocklost",
            colours=_HEALTHY,
            span=4,
        ).mappings(_texts(switch)),
        _number(
            "Hotplug risk",
            "Whether the TSC of a vCPU that is plugged now would start apart from the others.",
            f"max(tscwatch_vm_hotplug_risk{{{_GUEST}}})",
            section="hotplug-risk",
            colours=_HEALTHY,
            span=4,
        ).mappings(_texts(risk)),
        _lines(
            "Lag of each vCPU",
            "How far the TSC of each vCPU that is off is behind most others of the guest; negative "
            "is ahead.",
            (f"tscwatch_vm_tsc_spread_seconds{{{_GUEST}}}", "farthest apart"),
            (_largest(_VCPUS, lag), "vCPU {{vcpu}}"),
            section="tscdesync",
            unit="s",
            least=1e-6,
        ).override_by_name("farthest apart", whole),
        _lines(
            "Rate of each vCPU",
            "The effective frequency of each vCPU, in ppm of their median, which is the higher one "
            "if the two in the middle differ. vCPUs that all have the same frequencies are not "
            "shown one by one.",
            (
                f"1e6 * tscwatch_vm_tsc_rate_spread_ratio{{{_GUEST}}}",
                "fastest to slowest",
            ),
            (_largest(_VCPUS, effective), "vCPU {{vcpu}}"),
            section="tscvcpuskew",
            unit="ppm",
            decimals=1,
            least=1,
        ).override_by_name("fastest to slowest", whole),
        _lines(
            "Frequency requested for each vCPU",
            "What was last set for each vCPU, in ppm of their median, which is the higher one if "
            "the two in the middle differ. Within KVM's tolerance, vCPUs for which different "
            "frequencies were requested tick at the same rate.",
            (_largest(_VCPUS, requested), "vCPU {{vcpu}}"),
            section="tscvcpuskew",
            unit="ppm",
            decimals=1,
            least=1,
        ).no_value("The same for all vCPUs"),
        _lines(
            "Frequency",
            "The lowest and the highest effective frequency of the guest's vCPUs, and that of the "
            "host; the last digit is 1 kHz. Between the dashed lines, KVM does not scale: they are "
            "its tolerance.",
            (host, "host {{instance}}"),
            (f"{host} * (1 + {tolerance})", "tolerance above"),
            (f"{host} * (1 - {tolerance})", "tolerance below"),
            (f"tscwatch_vm_tsc_effective_max_hertz{{{_GUEST}}}", "fastest vCPU"),
            (f"tscwatch_vm_tsc_effective_min_hertz{{{_GUEST}}}", "slowest vCPU"),
            section="tscfrequencychangedbymigration",
            unit="hertz",
            decimals=6,
        )
        .legend(_legend("lastNotNull"))
        .override_by_regexp("tolerance .*", [*whole, *_set(custom_hideFrom=not_in_legend)]),
        _columns(
            "Identity",
            "Which VM it is, and whose, if its platform names the owner.",
            {
                "vm": ("guest", None),
                "instance": ("host", None),
                "pid": ("pid", 100),
                "vmm": ("VMM", 100),
                "machine": ("machine", 100),
                "uuid": ("UUID", 310),
                "platform": ("platform", None),
                "namespace": ("namespace", None),
                "name": ("name", None),
                "project": ("project", None),
                "vmid": ("VMID", None),
            },
            f"max by (instance, vm, uuid, pid, vmm, machine) ({vm_info})",
            "max by (instance, vm, platform, namespace, name, project, vmid) "
            f"(tscwatch_vm_owner_info{{{_GUEST}}})",
            section="whose-guest-it-is",
        )
        .height(4)
        .span(24),
    ]


# The whole


def _variable(name: str, label: str, query: str) -> dashboard.QueryVariable:
    """A variable of which one value is selected, at first the first one."""
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .query(query)
        .datasource(_PROMETHEUS)
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)  # the set of guests changes
    )


def _several(name: str, label: str, query: str) -> dashboard.QueryVariable:
    """A variable of which several values can be selected, at first all."""
    every = VariableOption(selected=True, text=["All"], value=["$__all"])
    return _variable(name, label, query).multi(True).include_all(True).current(every)


def _variables(runbook: str) -> Sequence[Any]:
    """Return the variables; the guest's first value, which is its default, is the worst guest."""
    guests = f"{_mismatches(_HOSTS)} or 0 * tscwatch_vm_info{{{_HOSTS}}}"
    worst = f"topk({_GUESTS}, max by (vm) ({guests}))"
    return (
        dashboard.DatasourceVariable("datasource").type("prometheus"),
        _several("pool", "Pool", "label_values(tscwatch_build_info, pool)").all_value(".*"),
        _several(
            "instance", "Host", f"label_values(tscwatch_build_info{{{_FLEET}}}, instance)"
        ).all_value(".*"),
        _variable("vm", "Guest", f"query_result(sort_desc({worst}))").regex('/vm="([^"]*)"/'),
        _several("guest_host", "", f"label_values(tscwatch_vm_info{{{_GUEST}}}, instance)").hide(
            VariableHide.HIDE_VARIABLE
        ),
        dashboard.ConstantVariable("runbook").value(runbook),
    )


def _annotations(panels: Sequence[int]) -> list[dict[str, Any]]:
    """Return the annotations of the guest's graphs, which the SDK has no builder for."""
    common_fields = {
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "enable": True,
        "filter": {"exclude": False, "ids": list(panels)},
        "step": "60s",
    }
    calls = f'tscwatch_tsc_ioctls_total{{{_HOSTS_OF_GUEST},op="set",phase!~"boot|probe|unknown"}}'
    started = f"tscwatch_mismatch_started_timestamp_seconds{{{_GUEST}}}"
    return [
        {
            **common_fields,
            "name": "Phases on the host",
            "iconColor": "blue",
            "expr": f"sum by (phase) (increase({calls}[$__rate_interval])) > 0",
            "titleFormat": "{{phase}}",
            "textFormat": "of a guest on this host",
        },
        {
            **common_fields,
            "name": "Mismatches of the guest",
            "iconColor": "red",
            "expr": f"1e3 * {started}",
            "useValueForTime": True,
            "titleFormat": "{{kind}}",
            "textFormat": "since phase {{phase}}",
        },
    ]


def generated(runbook: str) -> str:
    """Return the dashboard as JSON.

    :param runbook: where the runbook is; the dashboard has it as a constant, which a site can set.
    """
    rows = {
        "Fleet": _fleet(),
        "Pool $pool": _pools(),
        "Host $instance": _hosts(),
        "Guest $vm": _guest(),
    }
    board = (
        dashboard.Dashboard("TSC of KVM guests")
        .uid("tscwatch")
        .description("When the vCPUs of KVM guests disagree about time, and why: tscwatch.")
        .tags(["tscwatch", "kvm"])
        .refresh("30s")
        .time("now-6h", "now")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .link(
            dashboard.DashboardLink("Runbook")
            .type(DashboardLinkType.LINK)
            .url("${runbook:raw}")
            .target_blank(True)
        )
    )
    for variable in _variables(runbook):
        board.with_variable(variable)
    ids = count(1)
    annotated = []
    for title, panels in rows.items():
        row = dashboard.Row(title).id(next(ids))
        numbered = [panel.id(next(ids)) for panel in panels]
        if title.startswith(("Pool", "Host")):  # collapsed: not queried until they are opened
            for panel in numbered:
                row.with_panel(panel)
            board.with_row(row)
        else:
            board.with_row(row)
            for panel in numbered:
                board.with_panel(panel)
        if title.startswith("Guest"):
            built = [panel.build() for panel in numbered]
            annotated = [panel.id_val for panel in built if panel.type_val == "timeseries"]
    fields = json.loads(JSONEncoder().encode(board.build()))
    for variable in fields["templating"]["list"]:
        if variable["type"] == "constant":
            variable["hide"] = VariableHide.HIDE_VARIABLE  # the builder has no such option
    fields["annotations"] = {"list": _annotations(annotated)}
    return json.dumps(fields, indent=2, sort_keys=True) + "\n"
