"""What an observer costs the host it runs on: guests, memory, time, wake-ups.

All that is compared is of one run, in turns; what is printed is a ratio to the first line, or a
count.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from statistics import median, quantiles
from typing import Callable

from tests.programs.bench.other_tools import OBSERVERS, Running, Unfit, bare_client
from tests.support import lab_vm
from tests.support.guests import PATIENCE_S
from tests.support.observer import Observer, memory
from tests.support.tiny_vmm import Vmm, host_khz
from tscwatch.linux import compiler

ROUNDS = 3 if lab_vm.inside() else 7
RUNS = 20_000 if lab_vm.inside() else 50_000
CALLS = 200
IDLE_S = 30
_SLOW = 3
"""Times as slow as without an observer: then a few runs tell enough."""
_PROGRAM = re.compile(r"(?m)^prog_id:\s*(\d+)")
_BPF_STATS = Path("/proc/sys/kernel/bpf_stats_enabled")
_WATCHERS = ("tscwatch, bcc", "tscwatch, ftrace", "bpftrace")


class Guest:
    """A process whose one vCPU does nothing but enter and leave."""

    def __init__(self, directory: Path) -> None:
        program = directory / "kvm_run"
        source = Path(__file__).with_name("kvm_run.c")
        subprocess.run(["gcc", "-O2", "-o", str(program), str(source)], check=True)
        self.process = subprocess.Popen(
            [str(program)], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._to, self._from = self.process.stdin, self.process.stdout
        assert self._from.readline() == "ready\n"

    def run(self, times: int) -> float:
        """Nanoseconds of one KVM_RUN."""
        self._to.write(f"{times}\n")
        self._to.flush()
        return float(self._from.readline())

    def end(self) -> None:
        self._to.close()
        self.process.wait(PATIENCE_S)


def _ratio(value: float, base: float) -> str:
    return f"{value / base:.2f} x"


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(columns, *rows)]
    print(f"\n{title}")
    for row in (columns, *rows):
        cells = (text.rjust(width) for text, width in zip(row[1:], widths[1:]))
        print(f"  {row[0].ljust(widths[0])}   {'   '.join(cells)}", flush=True)


@contextmanager
def _bpf_stats() -> Iterator[None]:
    before = _BPF_STATS.read_text()
    _BPF_STATS.write_text("1")
    try:
        yield
    finally:
        _BPF_STATS.write_text(before)


def _programs(pid: int) -> list[str]:
    """What the kernel says of each of a process's BPF programs."""
    texts = (info.read_text() for info in Path(f"/proc/{pid}/fdinfo").iterdir())
    found = {match[1]: text for text in texts if (match := _PROGRAM.search(text))}
    return list(found.values())


def _work(pid: int) -> tuple[int, int]:
    """Runs of a process's BPF programs so far, and their nanoseconds."""
    programs = _programs(pid)
    runs, nanoseconds = (
        sum(int(re.findall(rf"(?m)^{name}:\s*(\d+)", text)[0]) for text in programs)
        for name in ("run_cnt", "run_time_ns")
    )
    return runs, nanoseconds


def _work_of_a_run(guest: Guest, pid: int) -> tuple[float, float]:
    """How many BPF programs of a process a KVM_RUN passes, and their nanoseconds."""
    with _bpf_stats():
        before = _work(pid)
        guest.run(RUNS)
        runs, nanoseconds = (b - a for a, b in zip(before, _work(pid)))
    return runs / RUNS, nanoseconds / RUNS


def kvm_run_path(directory: Path) -> None:
    """The time of a KVM_RUN that returns at once, which every exit of every guest pays.

    Each is a ratio to the same guest's right before: this host has other work too.
    """
    guest = Guest(directory)
    times: dict[str, list[float]] = {}
    works: dict[str, list[tuple[float, float]]] = {}
    for number, (name, observer) in product(range(ROUNDS), OBSERVERS.items()):
        alone = guest.run(RUNS)
        try:
            with observer(directory, guest.process.pid) as pid:
                one_run = guest.run(RUNS // 10)
                if one_run < _SLOW * alone:
                    one_run = guest.run(RUNS)
                times.setdefault(name, []).append(one_run / alone)
                if pid is not None and _programs(pid):
                    works.setdefault(name, []).append(_work_of_a_run(guest, pid))
        except Unfit as error:
            if number == 0:
                print(error)
    guest.end()
    _show_kvm_run(times, {name: tuple(map(median, zip(*each))) for name, each in works.items()})


def _show_kvm_run(times: dict[str, list[float]], work: dict[str, tuple[float, ...]]) -> None:
    low, base, high = quantiles(times["nothing"], n=4, method="inclusive")
    other = median(times["bpftrace"]) - base
    is_clear = other > high - low  # else it drowns in what this host does besides
    empty = work["empty programs"][1] / work["empty programs"][0]
    own = {name: nanoseconds - runs * empty for name, (runs, nanoseconds) in work.items()}
    rows = []
    for name, taken in times.items():
        low, middle, high = quantiles(taken, n=4, method="inclusive")
        runs, nanoseconds = work.get(name, (0, 0))
        rows.append(
            (
                name,
                _ratio(middle, base),
                f"{(high - low) / middle:.0%}",
                _ratio(middle - base, other) if is_clear and name != "nothing" else "",
                f"{runs:.0f}" if runs else "",
                _ratio(nanoseconds, work["bpftrace"][1]) if nanoseconds else "",
                _ratio(own[name], own["bpftrace"]) if nanoseconds else "",
            )
        )
    columns = ("", "time", "spread", "added", "BPF programs", "time in BPF", "above empty ones")
    _table("KVM_RUN (added, and time in BPF: of bpftrace's)", columns, rows)


def _idle(pid: int) -> tuple[int, int]:
    """Times that its threads have slept, and clock ticks of CPU they have taken."""
    slept = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        slept += int(
            re.findall(r"(?m)^voluntary_ctxt_switches:\s*(\d+)", (task / "status").read_text())[0]
        )
    stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    ticks = int(stat[11]) + int(stat[12])
    return slept, ticks


def footprint(directory: Path) -> None:
    """Memory and wake-ups of each when nothing happens."""
    rows = []
    base = (1, 1)
    for name in ("prometheus_client", *_WATCHERS):
        start: Callable[[Path, int], Running] = OBSERVERS.get(name, bare_client)
        with start(directory, 0) as pid:
            assert pid is not None
            time.sleep(5)
            taken, before = memory(pid), _idle(pid)
            threads = len(list(Path(f"/proc/{pid}/task").iterdir()))
            time.sleep(IDLE_S)
            slept, ticks = (b - a for a, b in zip(before, _idle(pid)))
        if name == "prometheus_client":
            base = taken
        cpu = ticks / os.sysconf("SC_CLK_TCK") / IDLE_S
        rows.append(
            (
                name,
                _ratio(taken[0], base[0]),
                _ratio(taken[1], base[1]),
                str(threads),
                f"{slept * 60 / IDLE_S:.0f}",
                f"{cpu:.2%}",
            )
        )
    columns = ("", "anonymous", "resident", "threads", "wake-ups a minute", "CPU")
    _table("Memory, and idle", columns, rows)


def startup(directory: Path) -> None:
    """Until the metrics are served: with the compiler, and with what it made before."""
    taken: dict[str, list[float]] = {"compiled": [], "kept": [], "ftrace": []}
    for _ in range(min(ROUNDS, 3)):
        for name, times in taken.items():
            if name == "compiled":
                for file in compiler.CACHE.glob("*.json"):
                    file.unlink()
            began = time.perf_counter()
            with Observer(directory, "--source", "ftrace" if name == "ftrace" else "bcc"):
                times.append(time.perf_counter() - began)
    base = median(taken["compiled"])
    rows = [(name, _ratio(median(times), base)) for name, times in taken.items()]
    _table("Start to first event", ("", "time"), rows)


def latency(directory: Path) -> None:
    """From a GET's return to its line, which is written when the metrics have it."""
    khz = str(host_khz())
    delays: dict[str, list[float]] = {}
    for name in _WATCHERS:
        output = directory / ("observer.out" if name == "bpftrace" else "tscwatch.out")
        with OBSERVERS[name](directory, 0):
            vmm = Vmm()
            vmm.new_vm()
            vmm.create_vcpu("0")
            vmm.set("0", khz)  # so that nobody takes it for one that only asks
            vmm.run("0")
            time.sleep(2)
            delays[name] = [_delay(vmm, output) for _ in range(CALLS)]
            vmm.close()
    base = median(delays["bpftrace"])
    rows = [
        (name, _ratio(median(times), base), _ratio(quantiles(times, n=100)[98], base))
        for name, times in delays.items()
    ]
    _table("From the ioctl to the metric", ("", "median", "99th percentile"), rows)


def _delay(vmm: Vmm, output: Path) -> float:
    before = output.stat().st_size
    vmm.get("0")
    began = time.perf_counter()
    deadline = began + PATIENCE_S
    while output.stat().st_size == before:
        if time.perf_counter() > deadline:
            raise TimeoutError("no line came")
    return time.perf_counter() - began


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        for measure in (kvm_run_path, footprint, startup, latency):
            measure(Path(name))


if __name__ == "__main__":
    main()
