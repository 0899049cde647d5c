"""Measure what an observer costs its host: time in KVM_RUN, memory, CPU use, start-up, latency.

Each table answers one question.  It has absolute figures, to budget with, and beside each the ratio
to another line of the table, to compare hosts by.  All figures of a table are from one run.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, product
from pathlib import Path
from statistics import median, quantiles
from typing import Callable, TextIO

from tests.programs.bench import table
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
"""An observer that makes KVM_RUN this many times slower is measured with a tenth of the runs."""
_PROGRAM = re.compile(r"(?m)^prog_id:\s*(\d+)")
_BPF_STATS = Path("/proc/sys/kernel/bpf_stats_enabled")
_WATCHERS = ("tscwatch, bcc", "tscwatch, ftrace", "bpftrace")


class Guest:
    """A process with one vCPU, whose KVM_RUN returns at once."""

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
        """Issue KVM_RUN that many times, and return the mean time of one in ns."""
        self._to.write(f"{times}\n")
        self._to.flush()
        return float(self._from.readline())

    def end(self) -> None:
        self._to.close()
        self.process.wait(PATIENCE_S)


def _ratio(value: float, base: float) -> str:
    return f"{value / base:.2f} x"


def _middle(values: Sequence[float]) -> tuple[float, float]:
    """Return the median and the spread, which is the width of the middle half."""
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return middle, high - low


@contextmanager
def _bpf_stats() -> Iterator[None]:
    before = _BPF_STATS.read_text()
    _BPF_STATS.write_text("1")
    try:
        yield
    finally:
        _BPF_STATS.write_text(before)


def _programs(pid: int) -> list[str]:
    """Return the kernel's fdinfo of each BPF program that a process has open."""
    texts = (info.read_text() for info in Path(f"/proc/{pid}/fdinfo").iterdir())
    found = {match[1]: text for text in texts if (match := _PROGRAM.search(text))}
    return list(found.values())


def _work(pid: int) -> tuple[int, int]:
    """Return how often a process's BPF programs have run, and their total time in ns."""
    programs = _programs(pid)
    runs, nanoseconds = (
        sum(int(re.findall(rf"(?m)^{name}:\s*(\d+)", text)[0]) for text in programs)
        for name in ("run_cnt", "run_time_ns")
    )
    return runs, nanoseconds


def _work_of_a_run(guest: Guest, pid: int) -> tuple[float, float]:
    """Return how many BPF programs of a process run in a KVM_RUN, and their time in ns."""
    with _bpf_stats():
        before = _work(pid)
        guest.run(RUNS)
        runs, nanoseconds = (b - a for a, b in zip(before, _work(pid)))
    return runs / RUNS, nanoseconds / RUNS


def kvm_run_path(directory: Path) -> None:
    """How much time does an observer add to a KVM_RUN, and how much of it is in BPF programs?

    Each measurement is paired with one of the same guest just before the observer starts, since the
    load of the host varies.
    """
    guest = Guest(directory)
    times: dict[str, list[tuple[float, float]]] = {}
    work: dict[str, list[tuple[float, float]]] = {}
    for number, (name, observer) in product(range(ROUNDS), OBSERVERS.items()):
        alone = guest.run(RUNS)
        try:
            with observer(directory, guest.process.pid) as pid:
                observed = guest.run(RUNS // 10)
                if observed < _SLOW * alone:
                    observed = guest.run(RUNS)
                times.setdefault(name, []).append((alone, observed))
                if pid is not None and _programs(pid):
                    work.setdefault(name, []).append(_work_of_a_run(guest, pid))
        except Unfit as error:
            if number == 0:
                print(error)
    guest.end()
    _show_kvm_run(times)
    _show_bpf({name: tuple(map(median, zip(*each))) for name, each in work.items()})


def _show_kvm_run(times: dict[str, list[tuple[float, float]]]) -> None:
    middles = {
        name: (
            [median(column) for column in zip(*pairs)],
            _middle([observed / alone for alone, observed in pairs]),
            _middle([observed - alone for alone, observed in pairs]),
        )
        for name, pairs in times.items()
    }
    _, (base_ratio, _), (base_added, noise) = middles["no observer"]
    added = {
        name: ns - base_added
        for name, (_, _, (ns, spread)) in middles.items()
        if abs(ns - base_added) > max(spread, noise)
    }
    rows = []
    for name, ((alone, observed), (ratio, spread), _) in middles.items():
        cells = (
            name,
            f"{alone:.0f}",
            f"{observed:.0f}",
            _ratio(ratio, base_ratio),
            f"{spread / ratio:.0%}",
        )
        if name == "no observer":
            rows.append((*cells, "", ""))
        elif name not in added:
            rows.append((*cells, "within the spread", ""))
        else:
            of = _ratio(added[name], added["bpftrace"]) if "bpftrace" in added else ""
            rows.append((*cells, f"{added[name]:.0f}", of))
    columns = ("", "ns before", "ns with it", "to no observer", "spread", "added ns", "to bpftrace")
    table.show("Time of a KVM_RUN, round trip", columns, rows)


def _show_bpf(work: dict[str, tuple[float, ...]]) -> None:
    empty = work["empty programs"][1] / work["empty programs"][0]
    own = {name: ns - programs * empty for name, (programs, ns) in work.items()}
    rows = [
        (
            name,
            f"{programs:.0f}",
            f"{ns:.0f}",
            _ratio(ns, work["bpftrace"][1]),
            f"{own[name]:.0f}",
            _ratio(own[name], own["bpftrace"]),
        )
        for name, (programs, ns) in work.items()
    ]
    columns = ("", "programs", "ns", "to bpftrace", "ns above empty programs", "to bpftrace")
    table.show("Time in BPF programs per KVM_RUN, as the kernel counts it", columns, rows)


def _activity(pid: int) -> tuple[int, int, int]:
    """Return the time, and a process's CPU time, both in ns, and how often its threads slept.

    Threads that have exited are not counted.
    """
    cpu = slept = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        cpu += int((task / "schedstat").read_text().split()[0])
        status = (task / "status").read_text()
        slept += int(re.findall(r"(?m)^voluntary_ctxt_switches:\s*(\d+)", status)[0])
    return time.monotonic_ns(), cpu, slept


def footprint(directory: Path) -> None:
    """How much memory does an observer take, and how busy is it without guests?

    The activity is idle only if the host is: other guests add to it, and on a kernel without
    kprobes each ioctl that fails anywhere on the host wakes the ftrace source.
    """
    memory_rows = []
    idle_rows = []
    base = (1, 1)
    for name in ("prometheus_client", *_WATCHERS):
        start: Callable[[Path, int], Running] = OBSERVERS.get(name, bare_client)
        with start(directory, 0) as pid:
            assert pid is not None
            time.sleep(5)
            kib, before = memory(pid), _activity(pid)
            threads = len(list(Path(f"/proc/{pid}/task").iterdir()))
            time.sleep(IDLE_S)
            elapsed, cpu, slept = (b - a for a, b in zip(before, _activity(pid)))
        if name == "prometheus_client":
            base = kib
        cells = ((f"{value / 1024:.1f}", _ratio(value, of)) for value, of in zip(kib, base))
        memory_rows.append((name, *chain(*cells)))
        idle_rows.append(
            (name, str(threads), f"{slept * 60e9 / elapsed:.0f}", f"{cpu / elapsed:.3%}")
        )
    memory_columns = ("", "anonymous MiB", "to the client", "resident MiB", "to the client")
    table.show("Memory", memory_columns, memory_rows)
    idle_columns = ("", "threads", "wake-ups a minute", "of one CPU")
    table.show(f"Idle activity over {IDLE_S} s", idle_columns, idle_rows)


def startup(directory: Path) -> None:
    """How long does tscwatch take to start, with and without the BPF programs in its cache?

    The end of the start is polled every 50 ms.
    """
    taken: dict[str, list[float]] = {"bcc, compiling": [], "bcc, from its cache": [], "ftrace": []}
    for _ in range(min(ROUNDS, 3)):
        for name, times in taken.items():
            if name == "bcc, compiling":
                for file in compiler.CACHE.glob("*.json"):
                    file.unlink()
            began = time.perf_counter()
            with Observer(directory, "--source", name.partition(",")[0]):
                times.append(time.perf_counter() - began)
    base = median(taken["bcc, compiling"])
    rows = [
        (name, f"{median(times):.2f}", _ratio(median(times), base)) for name, times in taken.items()
    ]
    table.show("From the start until metrics are served", ("", "s", "to compiling"), rows)


def latency(directory: Path) -> None:
    """How long after an ioctl is called is it published?

    Measured is the line in the observer's output; tscwatch updates its metrics before it prints.
    The time begins before the ioctl, since an observer may run before the caller does again.
    """
    khz = str(host_khz())
    delays: dict[str, list[float]] = {}
    for name in _WATCHERS:
        path = directory / ("observer.out" if name == "bpftrace" else "tscwatch.out")
        with OBSERVERS[name](directory, 0), path.open() as output:
            vmm = Vmm()
            vmm.new_vm()
            vmm.create_vcpu("0")
            vmm.set("0", khz)  # tscwatch would hold the first GET back, as the VM could be a probe
            vmm.run("0")
            time.sleep(2)
            delays[name] = [_delay(vmm, output) for _ in range(CALLS)]
            vmm.close()
    base = median(delays["bpftrace"])
    rows = []
    for name, times in delays.items():
        figures = (median(times), quantiles(times, n=100)[98])
        cells = ((f"{value * 1000:.3f}", _ratio(value, base)) for value in figures)
        rows.append((name, *chain(*cells)))
    columns = ("", "median ms", "to bpftrace", "99th percentile ms", "to bpftrace's median")
    table.show("From an ioctl to its line", columns, rows)


def _delay(vmm: Vmm, output: TextIO) -> float:
    """Call GET, and return the time in s until the output has a complete line of this process."""
    own_line = re.compile(rf"(?m)(^|:){os.getpid()}[ ,].*\n")
    output.read()
    began = time.perf_counter()
    vmm.get("0")
    text = ""
    while not own_line.search(text):
        if time.perf_counter() > began + PATIENCE_S:
            raise TimeoutError(f"no line within {PATIENCE_S} s")
        text += output.read()
    return time.perf_counter() - began


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        for measure in (kvm_run_path, footprint, startup, latency):
            measure(Path(name))


if __name__ == "__main__":
    main()
