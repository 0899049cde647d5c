"""Compares tscwatch with strace in every scenario, machine type and source: ``make matrix``.

On this machine's kernels it runs the checkout, which bcc compiles.  In the other Debians of
``.lab``, which have neither bcc nor kernel headers, it runs the files of one package.

A cell of the table is right if tscwatch reported, for each thread of the guests, the same calls,
values and results as strace, and each with the phase and step that the scenario expects.  If QEMU
exits right after a call, the ftrace source may report its phase as unknown; the cell then counts
such calls.  Each kernel's cells are stored in ``tests/matrix_results/``, and ``tests/MATRIX.md`` is
the table of them all.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from itertools import product
from pathlib import Path

from qemu.qmp import QMPError

from tests.support import lab_vm
from tests.support.guests import MACHINE, QEMU, TRACES
from tests.support.observer import Observer
from tests.support.scenarios import (
    FTRACE_MAY_MISS_PHASE,
    LAB_SCENARIOS,
    LIVE_SCENARIOS,
    SCALING_SCENARIOS,
    VARIANT_SCENARIOS,
    Scenario,
    unknowns,
)
from tests.support.strace import traced
from tscwatch.capture import ebpf

TESTS = Path(__file__).parents[1]
RESULTS = TESTS / "matrix_results"
TABLE = TESTS / "MATRIX.md"
_RUN = ("-m", "tests.programs.matrix")
RIGHT = "right"
NOT_RUN = {
    "pc in the lab": "the kernel cannot distinguish machine types; emulation is slow",
    "COLO": "needs a replicated pair of guests; one_vcpu has repeated loads, as COLO does",
    "libvirt in the lab": "QEMU makes the same calls on every kernel; emulation is slow",
    "virsh migrate": "needs two hosts; managedsave and start cause the same calls on the target",
    "a guest that sees a scaled rate": "no CPU here scales; in the columns with scaling, only KVM "
    "believes that it does",
}


def cell(observer: Observer, scenario: Scenario, machine: str, prefix: str) -> str:
    """Run a scenario; return ``right``, or what went wrong."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        tokens = MACHINE.set(machine), TRACES.set(directory)
        try:
            expected = scenario(directory, prefix)
        except (OSError, RuntimeError, QMPError) as error:  # QEMU or libvirt failed
            return f"not run: {type(error).__name__}: {error}"
        finally:
            MACHINE.reset(tokens[0])
            TRACES.reset(tokens[1])
        unknown = 0
        for vm, places in expected.items():
            oracle = traced(directory / f"{vm}.strace")
            with suppress(TimeoutError):  # the comparison below reports missing calls
                observer.wait_for_calls(vm, sum(map(len, oracle.values())))
            missed = unknowns(observer.places(vm), places)
            if missed is None or (missed and scenario not in FTRACE_MAY_MISS_PHASE):
                return f"WRONG: {vm}: {observer.places(vm)}, not {places}"
            unknown += missed
            if observer.by_thread(vm) != oracle:
                return f"WRONG: {vm}: {observer.by_thread(vm)}, but strace saw {oracle}"
    return f"{RIGHT}, {unknown} unknown" if unknown else RIGHT


def column(machine: str, source: str, scenarios: Iterable[Scenario]) -> dict[str, str]:
    """Run scenarios under one daemon; return the cells by the scenario's name."""
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
        contradictions = observer.contradictions()
        cells["(no contradiction)"] = f"WRONG: {contradictions}" if contradictions else RIGHT
    return cells


def run() -> None:
    """Fill the columns of this kernel; store each as soon as it is done."""
    machines = ("q35",) if lab_vm.inside() else ("q35", "pc")
    bytecode = ", packaged" if ebpf.is_packaged() else ""
    qemu = subprocess.run([QEMU, "--version"], capture_output=True, text=True, check=True).stdout
    kernel = ".".join(platform.release().split(".")[:2])
    where = f"Linux {kernel}, QEMU {qemu.split()[3].rpartition('.')[0]}"
    columns: dict[str, dict[str, str]] = {}
    RESULTS.mkdir(exist_ok=True)
    scenarios = (*LAB_SCENARIOS, *VARIANT_SCENARIOS) if lab_vm.inside() else LIVE_SCENARIOS

    def fill(title: str, machine: str, source: str, scenarios: Iterable[Scenario]) -> None:
        columns[title] = column(machine, source, scenarios)
        cells = json.dumps({"where": where, "columns": columns}, indent=1)
        (RESULTS / f"linux-{kernel}.json").write_text(cells + "\n")

    for machine, source in product(machines, ("bcc", "ftrace")):
        title = f"{machine}, {source}{bytecode if source == 'bcc' else ''}"
        fill(title, machine, source, scenarios)
    if lab_vm.can_scale():
        with lab_vm.scaling():
            for source in ("bcc", "ftrace"):
                fill(f"q35, {source}, scaling", "q35", source, SCALING_SCENARIOS)


def render() -> bool:
    """Write the table; return whether every cell is right."""
    parts = [
        "# Scenarios that were compared with strace\n\n"
        "Generated by `make matrix`; `tests/programs/matrix.py` describes what a cell means.\n"
    ]
    wrong = []
    for path in sorted(RESULTS.glob("*.json")):
        run_ = json.loads(path.read_text())
        columns: dict[str, dict[str, str]] = run_["columns"]
        rows = list(dict.fromkeys(row for cells in columns.values() for row in cells))
        parts.append(f"\n## {run_['where']}\n\n| | {' | '.join(columns)} |")
        parts.append(f"\n|{' --- |' * (len(columns) + 1)}\n")
        for row in rows:
            marks = [cells.get(row, "") for cells in columns.values()]
            wrong += [f"{run_['where']}, {row}: {mark}" for mark in marks if not _good(mark)]
            shown = (mark if _good(mark) else "**" + mark.split(":")[0] + "**" for mark in marks)
            parts.append(f"| `{row}` | {' | '.join(shown)} |\n")
    parts.append("\n## Not run\n\n| case | reason |\n| --- | --- |\n")
    parts += [f"| {what} | {why} |\n" for what, why in NOT_RUN.items()]
    if wrong:
        parts.append("\n## Wrong\n\n" + "".join(f"- {each}\n" for each in wrong))
    TABLE.write_text("".join(parts))
    print(TABLE.read_text())
    return not wrong


def _good(mark: str) -> bool:
    """Return whether a cell is right, or empty: its column does not have that scenario."""
    return not mark or mark.startswith(RIGHT)


def main(package: str) -> int:
    """Fill all columns and write the table; return the exit status.

    :param package: path of the Debian package, from the project's root directory.
    """
    run()
    status = lab_vm.run([sys.executable, *_RUN])
    for root in (lab_vm.DEBIAN_11, lab_vm.DEBIAN_13, lab_vm.DEBIAN_SID):
        status |= lab_vm.run_package(package, ["/usr/bin/python3", *_RUN], root)
    return 0 if render() and status == 0 else 1


if __name__ == "__main__":
    if lab_vm.inside():
        run()
    else:
        sys.exit(main(sys.argv[1]))
