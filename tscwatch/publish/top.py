"""A live table of the guests that the running daemon knows; it has no probes of its own."""

from __future__ import annotations

import json
import sys
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

from tscwatch.errors import DaemonSilent
from tscwatch.publish.format import printable

_INTERVAL_S = 1.0
_PATIENCE_S = 10
_CLEAR = "\x1b[H\x1b[J"
_HEAD = ("vm", "vcpu", "requested", "reported", "effective", "last call", "state")
_FORM = "{:<20} {:>5} {:>10} {:>10} {:>10}  {:<20} {}"


def fetch(url: str) -> list[dict[str, Any]]:
    """The guests, as the daemon's ``/vms`` tells them.

    :raises DaemonSilent: it does not answer, or not as tscwatch does.
    """
    try:
        with urllib.request.urlopen(f"{url}/vms", timeout=_PATIENCE_S) as page:
            return list(json.load(page))
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise DaemonSilent(
            f"{url} does not answer as tscwatch does ({reason}): start it with 'tscwatch run', or "
            "name its address with --url"
        ) from error


def table(vms: list[dict[str, Any]]) -> Iterator[str]:
    """Its lines; frequencies are in kHz."""
    yield _FORM.format(*_HEAD).rstrip()
    for vm in sorted(vms, key=lambda vm: str(vm["vm"])):
        state = ", ".join(_states(vm)) or "ok"
        for number, (vcpu, row) in enumerate(vm["vcpus"].items()):
            yield _FORM.format(
                printable(vm["vm"])[:20] if number == 0 else "",
                vcpu,
                *(row.get(name, "-") for name in ("requested", "reported", "effective")),
                row.get("place", "-"),
                state if number == 0 else "",
            ).rstrip()


def _states(vm: dict[str, Any]) -> Iterator[str]:
    for mismatch in vm["mismatches"]:
        size = "" if mismatch["ppm"] is None else f" {mismatch['ppm']:.1f} ppm"
        yield f"{mismatch['kind']}{size} ({mismatch['severity']})"
    if vm["hotplug_risk"]:
        yield "hotplug risk"
    if vm["synchronised"] is not None and vm["synchronised"] < len(vm["vcpus"]):
        yield f"KVM: {vm['synchronised']} synchronised"


def run(url: str) -> None:
    """The table again and again in a terminal, else once.

    :raises DaemonSilent: see :func:`fetch`.
    """
    while True:
        lines = list(table(fetch(url)))
        if not sys.stdout.isatty():
            print("\n".join(lines))
            return
        print(_CLEAR + "\n".join(lines), flush=True)
        time.sleep(_INTERVAL_S)
