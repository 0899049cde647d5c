"""``tscwatch top``: a live table of the VMs of the running daemon, from its ``/vms``."""

from __future__ import annotations

import json
import sys
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

from tscwatch.errors import DaemonSilent
from tscwatch.model import duration
from tscwatch.publish.format import printable

_INTERVAL_S = 1.0
_TIMEOUT_S = 10
_CLEAR_SCREEN = "\x1b[H\x1b[J"
_HEAD = ("vm", "vcpu", "requested", "reported", "effective", "last call", "owner", "state")
_ROW = "{:<20} {:>5} {:>10} {:>10} {:>10}  {:<20} {:<24} {}"


def run(url: str) -> None:
    """Print the table once; on a terminal, print it again each second until interrupted.

    :param url: the daemon's address, without a path.
    :raises DaemonSilent: see :func:`fetch`.
    """
    while True:
        lines = list(table(fetch(url)))
        if not sys.stdout.isatty():
            print("\n".join(lines))
            return
        print(_CLEAR_SCREEN + "\n".join(lines), flush=True)
        time.sleep(_INTERVAL_S)


def fetch(url: str) -> list[dict[str, Any]]:
    """Return the VMs of the daemon, as :meth:`tscwatch.publish.state.State.rows` returns them.

    :param url: the daemon's address, without a path.
    :raises DaemonSilent: nothing answers there, or a program that is not tscwatch.
    """
    try:
        with urllib.request.urlopen(f"{url}/vms", timeout=_TIMEOUT_S) as response:
            return list(json.load(response))
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise DaemonSilent(
            f"no running tscwatch answers at {url} ({reason}): start it with 'tscwatch run', or "
            "give its address with --url"
        ) from error


def table(vms: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of the table, by the VMs' names; frequencies are in kHz.

    :param vms: as :func:`fetch` returns them.
    """
    yield _ROW.format(*_HEAD).rstrip()
    for vm in sorted(vms, key=lambda vm: str(vm["vm"])):
        state = ", ".join(_states(vm)) or "ok"
        for number, (vcpu, row) in enumerate(vm["vcpus"].items()):
            yield _ROW.format(
                printable(vm["vm"])[:20] if number == 0 else "",
                vcpu,
                *(row.get(name, "-") for name in ("requested", "reported", "effective")),
                row.get("place", "-"),
                printable(_owner(vm))[:24] if number == 0 else "",
                state if number == 0 else "",
            ).rstrip()


def _owner(vm: dict[str, Any]) -> str:
    owner = vm.get("owner") or {}
    return "/".join(owner[key] for key in ("namespace", "project", "vmid", "name") if key in owner)


def _states(vm: dict[str, Any]) -> Iterator[str]:
    for mismatch in vm["mismatches"]:
        apart = mismatch.get("apart_seconds")
        size = "" if mismatch["ppm"] is None else f" {mismatch['ppm']:.1f} ppm"
        if apart is not None:
            size = f" {duration(apart)}"
        yield f"{mismatch['kind']}{size} ({mismatch['severity']})"
    if vm["hotplug_risk"]:
        yield "hotplug risk"
    if vm["synchronised"] is not None and vm["synchronised"] < len(vm["vcpus"]):
        yield f"KVM: {vm['synchronised']} synchronised"
