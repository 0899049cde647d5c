"""Draws the dashboard with Grafana's own components (its npm packages) in headless Chromium.

Grafana's server is not in those packages.  What it does before anything is drawn is done here:
choose the values of the variables, replace them in expressions, and query Prometheus.
``page.jsx`` then makes data frames of the answers and hands them to the components.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Optional

from tests.support.guests import PATIENCE_S
from tests.support.prometheus import DEPLOY, Span, api

DASHBOARD = json.loads((DEPLOY / "grafana/dashboard.json").read_text())
WIDTH = 1600
"""Of the window, in pixels."""
ALL = "All"
_HERE = Path(__file__).parent
_ROW_HEIGHT = 38
WHOLE_WIDTH = {"gridPos": {"w": 24}}
"""In place of a panel, for the queries of annotations."""

Panel = dict[str, Any]


def step_s(panel: Panel, span: Span) -> int:
    """Return the step of a panel's queries, as Grafana computes it from the panel's width."""
    points: int = panel.get("maxDataPoints") or WIDTH * panel["gridPos"]["w"] // 24
    return max(span.every_s, math.ceil((span.end - span.start) / points))


class Values(NamedTuple):
    """The values of the variables: as they stand in expressions, and as they are displayed."""

    raw: dict[str, str]
    texts: dict[str, str]


def rows() -> dict[str, list[Panel]]:
    """Return the panels of each row, by the first word of its title."""
    found: dict[str, list[Panel]] = {}
    for panel in DASHBOARD["panels"]:
        if panel["type"] == "row":
            current = found[panel["title"].partition(" ")[0]] = [panel, *panel["panels"]]
        else:
            current.append(panel)
    return found


def panels() -> Iterator[Panel]:
    """Yield each panel that has queries."""
    for row in rows().values():
        yield from (panel for panel in row if panel["type"] != "row")


def interpolate(text: str, values: Mapping[str, str]) -> str:
    """Replace variables by their values; those without a value are kept."""

    def value(match: re.Match[str]) -> str:
        return values.get(match[1] or match[2], match[0])

    return re.sub(r"\$\{(\w+)(?::\w+)?\}|\$(\w+)", value, text)


def choose(address: str, **chosen: str) -> Values:
    """Return the variables' values: the chosen ones, else what Grafana chooses at first."""
    values = Values({}, {})
    for variable in DASHBOARD["templating"]["list"]:
        name = variable["name"]
        if variable["type"] == "constant":
            values.raw[name] = values.texts[name] = variable["query"]
        elif variable["type"] == "query":
            offered = options(address, variable, values)
            text = chosen.get(name, ALL if variable["includeAll"] else offered[0])
            everything = variable.get("allValue") or "|".join(map(_escaped, offered))
            values.raw[name] = everything if text == ALL else text
            values.texts[name] = text
    return values


def _escaped(value: str) -> str:
    """Escape a value for a regular expression in a PromQL string."""
    return re.sub(r"[$^*{}\[\]'+?.()|\\]", r"\\\\\g<0>", value)


def options(address: str, variable: dict[str, Any], values: Values) -> list[str]:
    """Return what a variable can be set to, in the order of Grafana's list."""
    query = interpolate(variable["query"], values.raw)
    labels = re.fullmatch(r"label_values\((.*), (\w+)\)", query)
    if labels:
        found = api(address, f"label/{labels[2]}/values", **{"match[]": labels[1]})
        return sorted(found)
    (expr,) = re.findall(r"^query_result\((.*)\)$", query)
    pattern = variable["regex"].strip("/")
    series = api(address, "query", query=expr)["result"]
    texts = ["{" + ",".join(f'{k}="{v}"' for k, v in s["metric"].items()) + "}" for s in series]
    return [match[1] for match in (re.search(pattern, text) for text in texts) if match]


def answer(
    address: str, panel: Panel, target: dict[str, Any], values: Values, span: Span, **more: str
) -> dict[str, Any]:
    """Return Prometheus' data for a query of a panel."""
    step = step_s(panel, span)
    rate_interval = max(step + span.every_s, 4 * span.every_s)
    expr = interpolate(target["expr"], {**values.raw, "__rate_interval": f"{rate_interval}s"})
    if target.get("instant"):
        return dict(api(address, "query", query=expr, time=str(span.end), **more))
    times = {"start": str(span.start), "end": str(span.end), "step": str(step)}
    return dict(api(address, "query_range", query=expr, **times, **more))


def _events(address: str, values: Values, span: Span) -> Iterator[dict[str, Any]]:
    """Yield the annotations with their times in seconds; a run of values is one event."""
    for annotation in DASHBOARD["annotations"]["list"]:
        for series in answer(address, WHOLE_WIDTH, annotation, values, span)["result"]:
            title = annotation["titleFormat"]
            for label, text in series["metric"].items():
                title = title.replace(f"{{{{{label}}}}}", text)
            points = [(time_s, float(value)) for time_s, value in series["values"]]
            times = {value / 1e3 for _, value in points}
            if not annotation.get("useValueForTime"):
                seen = {time_s for time_s, _ in points}
                step = step_s(WHOLE_WIDTH, span)
                times = {time_s for time_s in seen if time_s - step not in seen}
            for time_s in sorted(times):
                yield {
                    "time": time_s * 1e3,
                    "text": title,
                    "colour": annotation["iconColor"],
                    "ids": annotation["filter"]["ids"],
                }


def _laid_out(opened: Collection[str]) -> tuple[list[Panel], int]:
    """Return the panels of some rows, each with its upper edge, and the height of all."""
    laid_out = []
    top = 0
    for heading, *others in (rows()[name] for name in opened):
        laid_out.append({**heading, "top": top})
        top += _ROW_HEIGHT
        first = min(panel["gridPos"]["y"] for panel in others)
        for panel in others:
            laid_out.append({**panel, "top": top + (panel["gridPos"]["y"] - first) * _ROW_HEIGHT})
        last = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in others)
        top += (last - first) * _ROW_HEIGHT
    return laid_out, top


def draw(
    directory: Path,
    address: str,
    span: Span,
    values: Values,
    opened: Collection[str],
    picture: Optional[Path] = None,
) -> str:
    """Draw the dashboard and return the page's elements as HTML.

    :param directory: for the page's files.
    :param opened: the rows to draw, by the first words of their titles.
    :param picture: a PNG to write.
    """
    laid_out, height = _laid_out(opened)
    for panel in laid_out:
        panel["title"] = interpolate(panel["title"], values.texts)
        panel["answers"] = [
            answer(address, panel, target, values, span)["result"]
            for target in panel.get("targets", ())
        ]
    drawing = {
        "title": DASHBOARD["title"],
        "selected": [
            {"label": variable["label"], "text": values.texts[variable["name"]]}
            for variable in DASHBOARD["templating"]["list"]
            if variable.get("label")
        ],
        "panels": laid_out,
        "annotations": list(_events(address, values, span)),
        "range": {"from": span.start * 1e3, "to": span.end * 1e3},
        "width": WIDTH - 8,
    }
    for file in (_HERE / "page.html", *(_HERE / "build").iterdir()):
        shutil.copy(file, directory)
    (directory / "drawing.js").write_text(f"window.drawing = {json.dumps(drawing)};")
    picture = picture or directory / "page.png"
    return subprocess.run(
        [
            *("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            "--allow-file-access-from-files",  # or errors have no text
            *("--virtual-time-budget=20000", f"--window-size={WIDTH},{height + 56}"),
            *(f"--screenshot={picture}", "--dump-dom", (directory / "page.html").as_uri()),
        ],
        check=True,
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE_S,
        cwd=directory,
    ).stdout
