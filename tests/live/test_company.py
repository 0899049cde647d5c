"""Several tscwatch on one host: none takes another one's calls for a guest's."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.support import tiny_vmm
from tests.support.guests import wait_for
from tests.support.observer import Observer

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


@pytest.mark.parametrize("source", ["bcc", "ftrace"])
@pytest.mark.parametrize("first", ["record", "run"])
@pytest.mark.parametrize("delay_s", [0, 0.02, 0.1, 0.3])
def test_another_tscwatch_is_no_guest(
    vms: set[str], source: str, first: str, delay_s: float, tmp_path: Path
) -> None:
    """Each reads the vCPUs that are older than itself, and so calls KVM_GET_TSC_KHZ on them."""
    recording = tmp_path / "recording"
    command = [sys.executable, "-m", "tscwatch", "record", "-o", str(recording)]
    wait_s = 0 if first == "record" else delay_s
    other = ["sh", "-c", f'sleep {wait_s}; exec "$@"', "sh", *command, "--source", source]
    with ExitStack() as stack:
        recorder = stack.enter_context(terminated(other))
        time.sleep(delay_s - wait_s)
        observer = stack.enter_context(Observer(tmp_path, "--json", "--source", source))
        wait_for(recording.exists, "the other tscwatch to be ready")
        time.sleep(1)
        found = names_and_pids(observer.metrics())
        assert {name for name, pid in found.items() if pid in vms} == vms
        others = {str(observer.process.pid), str(recorder.pid)}
        assert not others & {*found, *found.values()}
        assert not [m for m in observer.mismatches() if str(m["pid"]) in {*vms, *others}]
        calls = [call for call in observer.calls() if str(call["pid"]) in {*vms, *others}]
        # At its start, each reads the host's frequency from a VM of its own.
        assert {call["phase"] for call in calls} <= {"probe"}
        assert observer.losses() == []
