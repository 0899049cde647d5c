"""Measure what an observer costs its host: time in KVM_RUN, memory, CPU use, start-up, latency.

Each table answers one question.  It has absolute figures, to budget with, and beside each the ratio
to another line of the table, to compare hosts by.  All figures of a table are from one run.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import chain, product
from pathlib import Path
from statistics import median, quantiles
from typing import Callable, Optional, TextIO

from tests.programs.bench import table
from tests.programs.bench.other_tools import OBSERVERS, Running, Unfit, bare_client
from tests.support import lab_vm
from tests.support.guests import PATIENCE_S
from tests.support.observer import Observer, memory
from tests.support.tiny_vmm import Vmm, herd, host_khz
from tscwatch.capture import ebpf
from tscwatch.linux import compiler
from tscwatch.linux.files import read_text

ROUNDS = 3 if lab_vm.inside() else 7
RUNS = 20_000 if lab_vm.inside() else 50_000
EVICTING_RUNS = RUNS // 10
EVICTING = 1 << 20
"""Bytes that a guest writes before each KVM_RUN to evict the programs from the caches."""
CALLS = 300
_CALLS_OF_A_VCPU = 3
"""tscwatch folds more than three equal calls (:mod:`tscwatch.publish.repeats`)."""
IDLE_S = 30
VMS = (10,) if lab_vm.inside() else (10, 300, 1000)
VCPUS = 8
SCRAPES = 11
_SLOW = 3
"""An observer that makes KVM_RUN this many times slower is measured with a tenth of the runs."""
_PROGRAM = re.compile(r"(?m)^prog_id:\s*(\d+)")
_BPF_STATS = Path("/proc/sys/kernel/bpf_stats_enabled")
_TSCWATCH = ("tscwatch, bcc", "tscwatch, ftrace")
_WATCHERS = (*_TSCWATCH, "bpftrace")
_WITH_BPF = ("tscwatch, bcc", "bpftrace", "empty programs", "bcc's trace")


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

    def run(self, times: int, write: int = 0) -> float:
        """Issue KVM_RUN that many times, and return the mean time of one in ns.

        :param write: how many bytes to write before each.
        """
        self._to.write(f"{times} {write}\n")
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
    texts = map(read_text, Path(f"/proc/{pid}/fdinfo").iterdir())  # "" of one that was closed
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


def kvm_run_path(directory: Path) -> None:
    """How much time does an observer add to a KVM_RUN?

    Each measurement is paired with one of the same guest just before the observer starts, since the
    load of the host varies.
    """
    guest = Guest(directory)
    times: dict[str, list[tuple[float, float]]] = {}
    for number, (name, observer) in product(range(ROUNDS), OBSERVERS.items()):
        alone = guest.run(RUNS)
        try:
            with observer(directory, guest.process.pid):
                observed = guest.run(RUNS // 10)
                if observed < _SLOW * alone:
                    observed = guest.run(RUNS)
                times.setdefault(name, []).append((alone, observed))
        except Unfit as error:
            if number == 0:
                print(error)
    guest.end()
    _show_kvm_run(times)


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


def bpf_programs(directory: Path) -> None:
    """How much of a KVM_RUN's time is in an observer's BPF programs?

    All observers are attached to the same KVM_RUNs, so that other load on the host affects them
    alike.  Each round starts them in another order, in which the programs then run.  The kernel
    counts the programs for ioctls of other processes too, so their number must be a whole one.
    """
    guest = Guest(directory)
    loads = {
        "in a loop": (RUNS, 0),
        f"after writing {EVICTING >> 20} MB": (EVICTING_RUNS, EVICTING),
    }
    rounds: dict[str, list[dict[str, tuple[float, float]]]] = {load: [] for load in loads}
    for number in range(ROUNDS):
        first = number % len(_WITH_BPF)
        with ExitStack() as stack:
            pids = {}
            for name in (*_WITH_BPF[first:], *_WITH_BPF[:first]):
                own = directory / name
                own.mkdir(exist_ok=True)
                pids[name] = stack.enter_context(OBSERVERS[name](own, guest.process.pid))
            for load, (times, write) in loads.items():
                guest.run(times // 10, write)
                rounds[load].append(_work_of_a_run(guest, pids, times, write))
    guest.end()
    for load, work in rounds.items():
        _show_bpf(f"Time in BPF programs per KVM_RUN {load}, as the kernel counts it", work)


def _work_of_a_run(
    guest: Guest, pids: Mapping[str, Optional[int]], times: int, write: int
) -> dict[str, tuple[float, float]]:
    """Return how many BPF programs of each process run in a KVM_RUN, and their time in ns."""
    with _bpf_stats():
        before = {name: _work(pid) for name, pid in pids.items() if pid is not None}
        guest.run(times, write)
        after = {name: _work(pid) for name, pid in pids.items() if pid is not None}
    return {
        name: ((after[name][0] - runs) / times, (after[name][1] - ns) / times)
        for name, (runs, ns) in before.items()
    }


def _show_bpf(title: str, rounds: Sequence[Mapping[str, tuple[float, float]]]) -> None:
    own: dict[str, list[float]] = {name: [] for name in _WITH_BPF}
    for work in rounds:
        empty = work["empty programs"][1] / work["empty programs"][0]
        for name, (programs, ns) in work.items():
            own[name].append(ns - programs * empty)
    rows = []
    for name in _WITH_BPF:
        programs, ns = map(median, zip(*(work[name] for work in rounds)))
        ratios = [work[name][1] / work["bpftrace"][1] for work in rounds]
        cells = (name, f"{programs:.1f}", f"{ns:.0f}", _range(ratios))
        if name == "empty programs":
            rows.append((*cells, "", ""))
        else:
            ratios = [mine / its for mine, its in zip(own[name], own["bpftrace"])]
            rows.append((*cells, f"{median(own[name]):.0f}", _range(ratios)))
    columns = ("", "programs", "ns", "to bpftrace", "ns above empty programs", "to bpftrace")
    table.show(title, columns, rows)


def _range(ratios: Sequence[float]) -> str:
    return f"{median(ratios):.2f} x ({min(ratios):.2f} to {max(ratios):.2f})"


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
        cells = ((_mib(value), _ratio(value, of)) for value, of in zip(kib, base))
        memory_rows.append((name, *chain(*cells)))
        a_minute = 60e9 / elapsed
        idle_rows.append(
            (name, str(threads), f"{slept * a_minute:.0f}", f"{cpu * a_minute / 1e6:.0f}")
        )
    memory_columns = ("", "anonymous MiB", "to the client", "resident MiB", "to the client")
    table.show("Memory", memory_columns, memory_rows)
    idle_columns = ("", "threads", "wake-ups a minute", "ms of CPU time a minute")
    table.show(f"Idle activity over {IDLE_S} s", idle_columns, idle_rows)


def _mib(kib: float) -> str:
    return f"{kib / 1024:.1f}"


def startup(directory: Path) -> None:
    """How long does tscwatch take to start, by where the bytecode of its BPF programs comes from?

    The memory is the most that the daemon, or the compiler's process, has had resident.
    """
    package = directory / "packaged"
    shutil.copytree(Path(ebpf.__file__).parents[1], package / "tscwatch")
    ebpf.precompile(str(package / "tscwatch/bpf"))
    taken: dict[str, list[tuple[float, float]]] = {
        name: [] for name in ("bcc, compiling", "bcc, stored", "bcc, packaged", "ftrace")
    }
    for _ in range(min(ROUNDS, 3)):
        for name, starts in taken.items():
            if name == "bcc, compiling":
                for file in compiler.CACHE.glob("*.json"):
                    file.unlink()
            path = package if name == "bcc, packaged" else None
            starts.append(_start(directory, name.partition(",")[0], path))
    base = taken["bcc, compiling"]
    rows = []
    for name, starts in taken.items():
        pairs = [*zip(map(median, zip(*starts)), map(median, zip(*base)))]
        cells = (
            (f"{value:.{digits}f}", _ratio(value, of)) for (value, of), digits in zip(pairs, (2, 1))
        )
        rows.append((name, *chain(*cells)))
    columns = ("", "s", "to compiling", "most MiB", "to compiling")
    table.show("From the start until metrics are served", columns, rows)


def _start(directory: Path, source: str, package: Optional[Path]) -> tuple[float, float]:
    """Start tscwatch, and return its time in s and the most memory that it had resident in MiB.

    :param package: a directory from which to import tscwatch.
    """
    within = () if package is None else ("env", f"PYTHONPATH={package}")
    began = time.time()
    with Observer(directory, "--source", source, within=within) as observer:
        taken = _ready_at(observer) - began
        observer.process.terminate()
        _, _, usage = os.wait4(observer.process.pid, 0)
    return taken, usage.ru_maxrss / 1024


def _ready_at(observer: Observer) -> float:
    """Return the Unix time at which a daemon that has just become ready logged that."""
    return observer.log.stat().st_mtime


def guests(directory: Path) -> None:
    """What does tscwatch take on a host with many VMs that are older than it?"""
    steps = [
        f"{step}:{vcpu}" for vcpu in range(VCPUS) for step in ("create-vcpu", "regs", "get", "run")
    ]
    rows = []
    for vms in VMS:
        with herd(vms, *steps):
            rows += [(name, str(vms), *_with_guests(directory, name)) for name in _TSCWATCH]
    columns = (
        *("", f"VMs of {VCPUS} vCPUs", "s to ready", "ms of a scrape", "kB of it"),
        *("anonymous MiB", "ms of CPU time a minute"),
    )
    table.show("With guests that do nothing", columns, rows)


def _with_guests(directory: Path, name: str) -> Iterator[str]:
    began = time.time()
    with Observer(directory, "--json", "--source", name.rpartition(" ")[2]) as observer:
        yield f"{_ready_at(observer) - began:.2f}"
        pid = observer.process.pid
        time.sleep(2)
        scrapes = []
        for _ in range(SCRAPES):
            began = time.perf_counter()
            page = observer.metrics()
            scrapes.append(time.perf_counter() - began)
        yield f"{median(scrapes) * 1000:.1f}"
        yield f"{len(page) / 1000:.0f}"
        yield _mib(memory(pid)[0])
        before = _activity(pid)
        time.sleep(11)  # the lines of each VM are read every 10 s
        elapsed, cpu, _ = (b - a for a, b in zip(before, _activity(pid)))
        yield f"{cpu * 60e3 / elapsed:.0f}"


def calls(directory: Path) -> None:
    """How long after an ioctl is called is it published, and how much CPU time does that take?

    Measured is the line in the observer's output; tscwatch updates its metrics before it prints.
    The time begins before the ioctl, since an observer may run before the caller does again.  The
    caller is not the main thread, as in QEMU.
    """
    with ThreadPoolExecutor(1) as pool:
        measured = {name: pool.submit(_calls, directory, name).result() for name in _WATCHERS}
    base_delays, base_cpu = measured["bpftrace"]
    base = median(base_delays)
    rows = []
    for name, (delays, cpu) in measured.items():
        figures = (quantiles(delays, n=4)[0], median(delays), quantiles(delays, n=100)[98])
        cells = ((f"{value * 1000:.3f}", _ratio(value, base)) for value in figures)
        rows.append((name, *chain(*cells), f"{cpu:.0f}", _ratio(cpu, base_cpu)))
    columns = (
        *("", "first quartile ms", "to bpftrace's median", "median ms", "to it"),
        *("99th percentile ms", "to it", "ms of CPU time per 1,000", "to bpftrace"),
    )
    table.show("From an ioctl to its line", columns, rows)


def _calls(directory: Path, name: str) -> tuple[list[float], float]:
    """Return the delay of each call in s, and the observer's CPU time in ms per 1,000 calls."""
    vcpus = [str(vcpu) for vcpu in range(CALLS // _CALLS_OF_A_VCPU)]
    path = directory / ("observer.out" if name == "bpftrace" else "tscwatch.out")
    with OBSERVERS[name](directory, 0) as pid, path.open() as output:
        assert pid is not None
        vmm = Vmm()
        vmm.new_vm()
        for vcpu in vcpus:
            vmm.create_vcpu(vcpu)
        vmm.set("0", str(host_khz()))  # tscwatch would hold the first GET back: it could be a probe
        vmm.run("0")
        time.sleep(2)
        _, before, _ = _activity(pid)
        delays = [_delay(vmm, vcpu, output) for vcpu in vcpus for _ in range(_CALLS_OF_A_VCPU)]
        _, after, _ = _activity(pid)
        vmm.close()
    return delays, (after - before) / len(delays) / 1000


def _delay(vmm: Vmm, vcpu: str, output: TextIO) -> float:
    """Call GET, and return the time in s until the output has a complete line of this thread."""
    own_line = re.compile(rf"(?m)(^|:){threading.get_native_id()}[ ,].*\n")
    output.read()
    began = time.perf_counter()
    vmm.get(vcpu)
    text = ""
    while not own_line.search(text):
        if time.perf_counter() > began + PATIENCE_S:
            raise TimeoutError(f"no line within {PATIENCE_S} s")
        text += output.read()
    return time.perf_counter() - began


def main() -> None:
    """Print all tables; in the emulated lab, only those of KVM_RUN, whose ratios hold there too."""
    measures = [kvm_run_path, bpf_programs]
    if not lab_vm.inside():
        measures += [footprint, startup, guests, calls]
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        for measure in measures:
            measure(Path(name))


if __name__ == "__main__":
    main()
