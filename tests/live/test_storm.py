"""More calls than can be processed: each is reported or counted as lost, at no other VM's cost."""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import lab_vm
from tests.support.guests import PATIENCE_S, Guest, wait_for
from tests.support.observer import EACH_VCPU, Observer, memory
from tests.support.scenarios import boot, plug

SOURCES = ["bcc", "ftrace"]
CALLS = {"bcc": 1_000, "ftrace": 750} if lab_vm.inside() else dict.fromkeys(SOURCES, 20_000)
"""Per vCPU.  In the lab, the daemon processes a few hundred per second."""
GROWTH = 2
"""The factor by which memory may grow."""
DROPPED = "tscwatch_tracking_dropped_total"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("storm") / "storm"
    source = str(Path(__file__).parents[1] / "support/storm.c")
    subprocess.run(["gcc", "-O2", "-Wall", "-pthread", "-o", str(path), source], check=True)
    return path


class Storm:
    """The program ``storm``, once each of its vCPUs has made one call."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process = process
        self._to, self._from = process.stdin, process.stdout
        assert self._from.readline() == "ready\n"

    def begin(self) -> None:
        self._to.write("go\n")
        self._to.flush()

    def kill(self) -> None:
        self._process.kill()

    def calls(self) -> int:
        """Wait until all calls are made, and return their number."""
        return int(self._from.readline())


@contextmanager
def storm(program: Path, vms: int, vcpus: int, calls: int) -> Iterator[Storm]:
    on_one_cpu = ["taskset", "--cpu-list", "0"] if lab_vm.inside() else []
    command = [*on_one_cpu, str(program), str(vms), str(vcpus), str(calls)]
    process = subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        yield Storm(process)
    finally:
        process.communicate(timeout=PATIENCE_S)


@contextmanager
def behind(observer: Observer, source: str) -> Iterator[None]:
    """Stop a daemon with ftrace in the lab, where a storm is too slow for ftrace's buffers.

    All calls of the storm are made on one CPU there, whose buffer holds some 16,000 records.
    """
    stops = lab_vm.inside() and source == "ftrace"
    if stops:
        observer.process.send_signal(signal.SIGSTOP)
    yield
    if stops:
        observer.process.send_signal(signal.SIGCONT)


def total(metrics: str, name: str, labels: str = "") -> int:
    """Return the sum of a metric's series whose labels contain a text."""
    values = re.findall(rf"(?m)^{name}{{[^}}]*{labels}[^}}]*}} (\S+)$", metrics)
    return int(sum(map(float, values)))


def reported(metrics: str) -> int:
    return total(metrics, "tscwatch_tsc_ioctls_total")


def lost(metrics: str) -> int:
    return total(metrics, "tscwatch_events_lost_total")


def records(metrics: str) -> int:
    """Count ftrace's records, read or lost; with kprobe events a call has two, entry and return."""
    read = total(metrics, "tscwatch_events_total", 'stage="kernel"')
    return read + total(metrics, "tscwatch_events_lost_total", 'reason="ring_full"')


@pytest.mark.also_in_lab
@pytest.mark.parametrize("source", SOURCES)
def test_each_call_is_reported_or_counted_as_lost(
    source: str, program: Path, tmp_path: Path
) -> None:
    with (
        Observer(tmp_path, "--source", source, config=EACH_VCPU) as observer,
        storm(program, vms=2, vcpus=8, calls=CALLS[source]) as running,
    ):
        wait_for(lambda: reported(observer.metrics()) == 16, "the vCPUs' first calls")
        assert lost(observer.metrics()) == 0
        first = records(observer.metrics())
        before, _ = memory(observer.process.pid)
        with behind(observer, source):
            running.begin()
            calls = running.calls()
        assert calls == 16 * CALLS[source]
        wait_for(lambda: reported(observer.metrics()) + lost(observer.metrics()) >= calls, "all")
        # Elsewhere ftrace uses syscall events, which also record the returns of other ioctls.
        if lab_vm.inside() and source == "ftrace":
            wait_for(lambda: records(observer.metrics()) >= first + 2 * (calls - 16), "the records")
            assert records(observer.metrics()) == first + 2 * (calls - 16)
        with Guest(tmp_path, "after"):  # its calls are reported after all earlier ones
            wait_for(lambda: 'vcpu="1",vm="after"' in observer.metrics(), "the guest after it")
        calls += len(boot(2))
        # The storm's VMs still exist; their end would be another event that can be lost.
        after = observer.metrics()
        assert lost(after) > 0  # otherwise the storm was too slow to test anything
        if source == "bcc":
            assert reported(after) + lost(after) == calls
        else:  # one record of a call may be lost and the other one read
            assert reported(after) < calls <= reported(after) + lost(after)
        assert memory(observer.process.pid)[0] < GROWTH * before


def test_a_storm_hides_no_other_guest(program: Path, tmp_path: Path) -> None:
    """The BPF programs limit how many events a process may send per second."""
    with (
        Observer(tmp_path, "--json", "--source", "bcc") as observer,
        storm(program, vms=1, vcpus=2, calls=10**9) as running,
    ):
        running.begin()
        wait_for(lambda: lost(observer.metrics()) > 0, "the storm")
        with Guest(tmp_path, "quiet") as quiet:
            quiet.start()
            quiet.plug()
            observer.wait_for_calls("quiet", len(boot(2)) + len(plug(2, "hotplug")))
        assert observer.places("quiet") == [*boot(2), *plug(2, "hotplug")]
        running.kill()
        reasons = "|".join(observer.losses())
        assert 'reason="throttled"' in reasons
        assert 'reason="ring_full"' not in reasons


@pytest.mark.parametrize("source", SOURCES)
def test_vms_without_end_push_no_other_guest_out(
    source: str, program: Path, tmp_path: Path
) -> None:
    few = f"{EACH_VCPU}limits: {{vms: 10, vcpus: 20}}\n"
    with (
        Observer(tmp_path, "--json", "--source", source, config=few) as observer,
        storm(program, vms=100, vcpus=2, calls=1),
    ):
        wait_for(lambda: total(observer.metrics(), DROPPED) == 90, "the limit")
        assert len(set(re.findall(r'vm="([^"]+)"', observer.metrics()))) <= 10
        with Guest(tmp_path, "late") as late:
            late.start()
            late.plug()
            observer.wait_for_calls("late", len(boot(2)) + len(plug(2, "hotplug")))
            assert 'vcpu="2",vm="late"' in observer.metrics()
            # A VM of the storm has made room for the guest, another for its third vCPU.
            assert total(observer.metrics(), DROPPED) == 92
        assert observer.places("late") == [*boot(2), *plug(2, "hotplug")]
