"""Every scenario, on every machine type and source, beside an oracle: ``make matrix``.

A cell is right when tscwatch saw, thread by thread, the calls, values and results that strace saw
of the same guests, and gave each the phase and step of the moment at which the driver brought it
about.  Where QEMU exits at once after a call, ftrace may have to call its phase unknown; the cell
says so.  Each run leaves its cells in ``tests/matrix/``; the table of all is ``tests/MATRIX.md``.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
from contextlib import suppress
from itertools import product
from pathlib import Path

from qemu.qmp import QMPError

from tests.support import lab_vm
from tests.support.guests import MACHINE, QEMU, TRACES
from tests.support.observer import Observer
from tests.support.scenarios import (
    ENDS_AT_ONCE,
    HOST_SCENARIOS,
    LAB_SCENARIOS,
    MORE,
    Scenario,
    unknowns,
)
from tests.support.strace import traced

HERE = Path(__file__).parents[1]
CELLS = HERE / "matrix"
TABLE = HERE / "MATRIX.md"
RIGHT = "right"
NOT_RUN = {
    "pc in the lab": "KVM does not see the machine type; emulation is slow",
    "COLO": "needs a replicated pair; a repeated load stands for it (one_vcpu)",
    "libvirt in the lab": "its calls are QEMU's, as here; emulation is slow",
    "virsh migrate": "needs two hosts; managedsave and start is the same on the target",
    "a host with TSC scaling": "neither this machine nor the emulator scales",
}


def cell(observer: Observer, scenario: Scenario, machine: str, prefix: str) -> str:
    """``right``, or what was not."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        tokens = MACHINE.set(machine), TRACES.set(directory)
        try:
            expected = scenario(directory, prefix)
        except (OSError, RuntimeError, QMPError) as error:  # the driver's failure is told
            return f"not run: {type(error).__name__}: {error}"
        finally:
            MACHINE.reset(tokens[0])
            TRACES.reset(tokens[1])
        unknown = 0
        for vm, places in expected.items():
            oracle = traced(directory / f"{vm}.strace")
            with suppress(TimeoutError):  # what was not seen is told below
                observer.wait_for_calls(vm, sum(map(len, oracle.values())))
            missed = unknowns(observer.places(vm), places)
            if missed is None or (missed and scenario not in ENDS_AT_ONCE):
                return f"WRONG: {vm}: {observer.places(vm)}, not {places}"
            unknown += missed
            if observer.by_thread(vm) != oracle:
                return f"WRONG: {vm}: {observer.by_thread(vm)}, but strace saw {oracle}"
    return f"{RIGHT}, {unknown} unknown" if unknown else RIGHT


def column(machine: str, source: str) -> dict[str, str]:
    """All scenarios under one daemon."""
    scenarios = (*LAB_SCENARIOS, *MORE) if lab_vm.inside() else HOST_SCENARIOS
    cells = {}
    with (
        tempfile.TemporaryDirectory() as name,
        Observer(Path(name), "--json", "--source", source) as observer,
    ):
        for scenario in scenarios:
            cells[scenario.__name__] = cell(observer, scenario, machine, f"{machine}-")
            print(f"{machine} {source} {scenario.__name__}: {cells[scenario.__name__]}", flush=True)
        lost = observer.losses()
        cells["(no event lost)"] = f"WRONG: {lost}" if lost else RIGHT
    return cells


def run() -> None:
    """The columns of this kernel; each is kept as soon as it is done."""
    machines = ("q35",) if lab_vm.inside() else ("q35", "pc")
    qemu = subprocess.run([QEMU, "--version"], capture_output=True, text=True, check=True).stdout
    kernel = ".".join(platform.release().split(".")[:2])
    where = f"Linux {kernel}, QEMU {qemu.split()[3].rpartition('.')[0]}"
    columns: dict[str, dict[str, str]] = {}
    CELLS.mkdir(exist_ok=True)
    for machine, source in product(machines, ("bcc", "ftrace")):
        columns[f"{machine}, {source}"] = column(machine, source)
        cells = json.dumps({"where": where, "columns": columns}, indent=1)
        (CELLS / f"linux-{kernel}.json").write_text(cells + "\n")


def render() -> bool:
    """Write the table; gives whether every cell is right."""
    parts = [
        "# What was run, and what was right\n\n"
        "Made by `make matrix`; see `tests/programs/matrix.py`.\n"
    ]
    faults = []
    for path in sorted(CELLS.glob("*.json")):
        run_ = json.loads(path.read_text())
        columns: dict[str, dict[str, str]] = run_["columns"]
        rows = list(dict.fromkeys(row for cells in columns.values() for row in cells))
        parts.append(f"\n## {run_['where']}\n\n| | {' | '.join(columns)} |")
        parts.append(f"\n|{' --- |' * (len(columns) + 1)}\n")
        for row in rows:
            marks = [cells.get(row, "") for cells in columns.values()]
            faults += [f"{run_['where']}, {row}: {mark}" for mark in marks if not _good(mark)]
            shown = (mark if _good(mark) else "**" + mark.split(":")[0] + "**" for mark in marks)
            parts.append(f"| `{row}` | {' | '.join(shown)} |\n")
    parts.append("\n## Not run\n\n| what | why |\n| --- | --- |\n")
    parts += [f"| {what} | {why} |\n" for what, why in NOT_RUN.items()]
    if faults:
        parts.append("\n## Not right\n\n" + "".join(f"- {fault}\n" for fault in faults))
    TABLE.write_text("".join(parts))
    print(TABLE.read_text())
    return not faults


def _good(mark: str) -> bool:
    return mark.startswith(RIGHT)


def main() -> int:
    run()
    if lab_vm.inside():
        return 0
    status = lab_vm.run([sys.executable, "-m", "tests.programs.matrix"])
    status |= lab_vm.run(["/usr/bin/python3", "-m", "tests.programs.matrix"], lab_vm.DEBIAN_13)
    return 0 if render() and status == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
