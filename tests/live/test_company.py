"""Several tscwatch on one host, in containers or not, and others who change its probes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Callable

import pytest

from tests.support import container, tiny_vmm
from tests.support.guests import Guest, wait_for
from tests.support.observer import Observer
from tests.support.scenarios import boot
from tscwatch.linux.files import read_text
from tscwatch.linux.process import start_time

VMS = 100
VCPUS = 8


@pytest.fixture(scope="module")
def vms() -> Iterator[set[str]]:
    """Yield the names of many VMs whose vCPUs have run and have one frequency."""
    steps = [
        f"{step}:{vcpu}" for vcpu in range(VCPUS) for step in ("create-vcpu", "regs", "get", "run")
    ]
    with tiny_vmm.herd(VMS, *steps) as pids:
        yield set(map(str, pids))


def names_and_pids(metrics: str) -> dict[str, str]:
    """Return the pid of each VM in ``tscwatch_vm_info``, by the VM's name."""
    return {
        re.findall(r'vm="([^"]*)"', line)[0]: re.findall(r'pid="(\d+)"', line)[0]
        for line in metrics.splitlines()
        if line.startswith("tscwatch_vm_info{")
    }


@contextmanager
def terminated(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process, and terminate it at the end."""
    process = subprocess.Popen(command)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def recorder(recording: Path, wait_s: float = 0) -> AbstractContextManager[subprocess.Popen[bytes]]:
    """Run another tscwatch; with bcc on any kernel, it calls KVM_GET_TSC_KHZ on older vCPUs."""
    command = [sys.executable, "-m", "tscwatch", "record", "-o", str(recording), "--source", "bcc"]
    return terminated(["sh", "-c", f'sleep {wait_s}; exec "$@"', "sh", *command])


def sees_foreign_calls(observer: Observer) -> bool:
    """Return whether the observer's source sees the calls of another tscwatch.

    ftrace's kprobe events do not: KVM refuses those calls before it reaches the probed functions.
    """
    (source,) = observer.series("source_info")
    return not {'source="ftrace"', 'attach="kprobe"'} <= set(source.split(","))


def wait_for_all_so_far(observer: Observer) -> None:
    """Wait until the metrics include all earlier calls: those of a new VM come after them."""
    with tiny_vmm.process("create-vcpu:0", "regs:0", "run:0", "get:0") as process:
        wait_for(lambda: f'vm="{process.pid}"' in observer.metrics(), "the last call")


@pytest.mark.parametrize("source", ["bcc", "ftrace"])
@pytest.mark.parametrize("first", ["record", "run"])
@pytest.mark.parametrize("delay_s", [0, 0.02, 0.1, 0.3])
def test_another_tscwatch_is_no_guest(
    vms: set[str], source: str, first: str, delay_s: float, tmp_path: Path
) -> None:
    """Each reads the vCPUs that are older than itself, and so calls KVM_GET_TSC_KHZ on them.

    Of one that starts together with the observer, the observer may see all of these calls or none;
    of one that starts later, it sees one call on each vCPU.
    """
    recording = tmp_path / "recording"
    wait_s = 0 if first == "record" else delay_s
    with ExitStack() as stack:
        together = stack.enter_context(recorder(recording, wait_s))
        time.sleep(delay_s - wait_s)
        observer = stack.enter_context(Observer(tmp_path, "--json", "--source", source))
        wait_for(recording.exists, "the other tscwatch to be ready")
        wait_for_all_so_far(observer)
        expected = observer.series("foreign_ioctls_total")[""]
        expected += VMS * VCPUS if sees_foreign_calls(observer) else 0
        later = stack.enter_context(recorder(tmp_path / "later"))
        wait_for(
            lambda: observer.series("foreign_ioctls_total")[""] >= expected,
            "the calls of a tscwatch that starts later",
        )
        wait_for((tmp_path / "later").exists, "it to be ready")
        wait_for_all_so_far(observer)
        found = names_and_pids(observer.metrics())
        assert {name for name, pid in found.items() if pid in vms} == vms
        others = {str(process.pid) for process in (observer.process, together, later)}
        assert not others & {*found, *found.values()}
        assert not [m for m in observer.mismatches() if str(m["pid"]) in {*vms, *others}]
        calls = [call for call in observer.calls() if str(call["pid"]) in {*vms, *others}]
        # At its start, each reads the host's frequency from a VM of its own.
        assert {call["phase"] for call in calls} <= {"probe"}
        assert observer.losses() == []


def probes(observer: Observer) -> set[float]:
    return set(observer.series("probe_attached").values())


def test_in_a_process_namespace_of_its_own_it_refuses_to_start(tmp_path: Path) -> None:
    """There, each pid is another process's, and the host's tscwatch would look dead."""
    (tmp_path / "host").mkdir()
    with Observer(tmp_path / "host", "--json", "--source", "ftrace") as observer:
        inside = container.within(tmp_path / "container", "--own-processes")
        result = subprocess.run(
            [*inside, sys.executable, "-m", "tscwatch", "run"],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert result.returncode == 13
        (line,) = result.stderr.splitlines()
        assert "hostPID" in line
        with Guest(tmp_path, "beside"):
            observer.wait_for_calls("beside", len(boot(2)))
        assert probes(observer) == {1}


def test_in_the_hosts_process_namespace_a_container_works(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    inside = container.within(tmp_path / "container")
    with (
        Observer(tmp_path / "inside", "--json", within=inside) as observer,
        Guest(tmp_path, "outside") as guest,
    ):
        observer.wait_for_calls("outside", len(boot(2)))
        assert observer.places("outside") == boot(2)
        assert names_and_pids(observer.metrics())["outside"] == str(guest.pid)


def test_a_device_cgroup_that_denies_kvm_is_named(tmp_path: Path) -> None:
    """Calls are seen all the same: only the host's frequency is not known."""
    (tmp_path / "inside").mkdir()
    inside = container.within(tmp_path / "container", "--no-devices")
    with (
        Observer(tmp_path / "inside", "--json", within=inside) as observer,
        Guest(tmp_path, "outside"),
    ):
        observer.wait_for_calls("outside", len(boot(2)))
        assert observer.log.read_text().count("DeviceAllow=/dev/kvm") == 1
        assert observer.series("host_tsc_hertz") == {}
    inside = container.within(tmp_path / "doctor", "--no-devices")
    doctor = [*inside, sys.executable, "-m", "tscwatch", "doctor", "--json"]
    result = subprocess.run(doctor, capture_output=True, text=True, check=False)
    checks = {check["what"]: check for check in map(json.loads, result.stdout.splitlines())}
    assert checks["KVM"]["state"] == checks["TSC frequency"]["state"] == "warning"
    assert "DeviceAllow=/dev/kvm" in checks["KVM"]["remedy"]
    assert result.stderr == ""


def instances_of(pid: int) -> list[Path]:
    return sorted(Path("/sys/kernel/tracing/instances").glob(f"tscwatch-*-{pid}"))


def append(file: Path, line: str) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND)
    os.write(descriptor, line.encode())
    os.close(descriptor)


def disable_all(pid: int) -> None:
    """Disable the events of a tscwatch, and remove its dynamic events, as ``clear_stale`` did."""
    for instance in instances_of(pid):
        (instance / "events/enable").write_text("0")
    file = Path("/sys/kernel/tracing/kprobe_events")
    for name in re.findall(rf":(tscwatch_\d+_{pid}/\w+)", read_text(file)):
        append(file, f"-:{name}\n")


def remove_entry(pid: int) -> None:
    """Disable the event of a call's entry, and remove it if it is a dynamic one."""
    for instance in instances_of(pid):
        for pattern in f"tscwatch_*_{pid}/enter", "syscalls/sys_enter_ioctl":
            for file in instance.glob(f"events/{pattern}/enable"):
                file.write_text("0")
    file = Path("/sys/kernel/tracing/kprobe_events")
    for name in re.findall(rf":(tscwatch_\d+_{pid}/enter) ", read_text(file)):
        append(file, f"-:{name}\n")


def change_filters(pid: int) -> None:
    for instance in instances_of(pid):
        for pattern in "tscwatch_*/*", "syscalls/sys_*_ioctl":
            for file in instance.glob(f"events/{pattern}/filter"):
                if file.read_text().strip() != "none":
                    file.write_text("common_pid == 1")


def stop_tracing(pid: int) -> None:
    for instance in instances_of(pid):
        (instance / "tracing_on").write_text("0")


def change_clock(pid: int) -> None:
    for instance in instances_of(pid):
        (instance / "trace_clock").write_text("local")


def trace_one_process(pid: int) -> None:
    for instance in instances_of(pid):
        (instance / "set_event_pid").write_text("1")


@pytest.fixture(scope="module")
def disturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Observer]:
    with Observer(tmp_path_factory.mktemp("disturbed"), "--json", "--source", "ftrace") as observer:
        yield observer


@pytest.mark.also_in_lab
@pytest.mark.parametrize(
    "disable",
    [disable_all, remove_entry, change_filters, stop_tracing, change_clock, trace_one_process],
)
def test_what_others_disable_is_noticed_and_restored(
    disable: Callable[[int], None], disturbed: Observer, tmp_path: Path
) -> None:
    def gaps() -> float:
        return disturbed.series("events_lost_total").get('reason="disabled",stage="kernel"', 0)

    assert probes(disturbed) == {1}
    (source,) = disturbed.series("source_info")
    (function,) = re.findall('function="(.*?)"', source)
    probe, before = f'probe="{function}"', gaps()
    messages = disturbed.log.read_text().count("restored")
    disable(disturbed.process.pid)
    wait_for(
        lambda: disturbed.series("probe_attached")[probe] == 0,
        "the probe to be reported as missing",
    )
    assert not disturbed.is_ready()
    wait_for(lambda: probes(disturbed) == {1}, "the probe to be restored")
    assert disturbed.is_ready()
    assert disturbed.log.read_text().count("restored") > messages
    assert gaps() == before + 1
    name = f"after-{disable.__name__}"
    with Guest(tmp_path, name):
        disturbed.wait_for_calls(name, len(boot(2)))
        assert disturbed.places(name) == boot(2)


def test_only_the_instances_of_dead_processes_are_removed(tmp_path: Path) -> None:
    """A pid alone is no proof: another process may have it now."""
    with tiny_vmm.process("create-vcpu:0") as process:
        start = start_time(process.pid)
        assert start is not None
        root = Path("/sys/kernel/tracing/instances")
        living = root / f"tscwatch-calls-{start}-{process.pid}"
        dead = root / f"tscwatch-calls-{start - 1}-{process.pid}"
        for instance in (living, dead):
            instance.mkdir()
        try:
            with Observer(tmp_path, "--source", "ftrace"):
                assert (living.exists(), dead.exists()) == (True, False)
        finally:
            living.rmdir()
