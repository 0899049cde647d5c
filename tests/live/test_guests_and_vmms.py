"""VMs of any kind: probes, other VMMs, several VMs per process, refused calls, killed guests."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.support import tiny_vmm
from tests.support.guests import QEMU, Guest, ejecting, wait_for
from tests.support.observer import EACH_VCPU, Observer
from tests.support.prometheus import faults
from tests.support.scenarios import boot, plug


def of_process(observer: Observer, pid: int) -> list[tuple[str, str, str]]:
    """Return operation, phase and step of each call of a process."""
    return [(c["op"], c["phase"], c["step"]) for c in observer.calls() if c["pid"] == pid]


def test_a_capability_check_is_a_probe_and_leaves_no_series(observer: Observer) -> None:
    """The calls are those of libvirt's virHostCPUGetTscInfo."""
    with tiny_vmm.process("create-vcpu:0", "get:0", "close") as process:
        wait_for(lambda: bool(of_process(observer, process.pid)), "the probe")
        assert of_process(observer, process.pid) == [("get", "probe", "init")]
        assert f'pid="{process.pid}"' not in observer.metrics()
        assert f'vm="{process.pid}"' not in observer.metrics()


def test_another_vmm_is_seen_with_phase_unknown_and_judged(observer: Observer) -> None:
    khz = tiny_vmm.host_khz()
    steps = ("create-vcpu:0", "create-vcpu:1", "get:0", f"set:0:{khz}", f"set:1:{khz + 26}")
    with tiny_vmm.process(*steps) as process:

        def skew_states() -> list[str]:
            return [m["state"] for m in observer.mismatches_of(process.pid, "vcpu_skew")]

        wait_for(lambda: len(of_process(observer, process.pid)) >= 3, "its calls")
        assert {call[1:] for call in of_process(observer, process.pid)} == {("unknown", "unknown")}
        wait_for(lambda: "raised" in skew_states(), "its skew")
    wait_for(lambda: "cleared" in skew_states(), "the end of its skew")


@pytest.mark.parametrize(
    ("program", "step", "expected"),
    [
        ("cloud-hypervisor", "get:0", ("get", "boot", "init")),
        ("firecracker", "set:0:0", ("set", "loadvm", "unknown")),
    ],
)
def test_a_vmm_is_known_by_its_name(
    observer: Observer, program: str, step: str, expected: tuple[str, str, str]
) -> None:
    with tiny_vmm.process("create-vcpu:0", step, "regs:0", program=program) as process:
        wait_for(lambda: bool(of_process(observer, process.pid)), "its call")
        assert of_process(observer, process.pid) == [expected]
        assert f'vmm="{program}"' in observer.metrics()


def test_the_first_vcpu_shows_whether_a_vm_has_run(tmp_path: Path) -> None:
    """One that is plugged has not, and not every VMM calls KVM_SET_CLOCK when it starts a VM."""
    steps = ("create-vcpu:0", "get:0", "regs:0", "run:0", "create-vcpu:1", "get:1", "regs:1")
    with (
        Observer(tmp_path, "--json", "--source", "bcc") as observer,
        tiny_vmm.process(*steps, program="cloud-hypervisor") as process,
    ):
        wait_for(lambda: len(of_process(observer, process.pid)) == 2, "its calls")
        calls = of_process(observer, process.pid)
    assert calls == [("get", "boot", "init"), ("get", "hotplug", "init")]


@pytest.mark.parametrize("source", ["bcc", "ftrace"])
def test_a_vmm_that_polls_costs_few_lines_and_each_call_is_counted(
    source: str, tmp_path: Path
) -> None:
    series = 'op="get",phase="unknown",scope="vcpu",step="unknown"'
    with Observer(tmp_path, "--json", "--source", source) as observer:
        before = observer.series("tsc_ioctls_total")[series]
        with tiny_vmm.process("create-vcpu:0", "regs:0", *["get:0"] * 500) as process:
            wait_for(
                lambda: observer.series("tsc_ioctls_total")[series] >= before + 500, "its calls"
            )
            assert len(of_process(observer, process.pid)) == 3
        assert observer.stop() == 0
        calls = [call for call in observer.calls() if call["pid"] == process.pid]
        assert [call["times"] for call in calls] == [1, 1, 1, 497]


def test_two_vms_in_one_process_are_two(observer: Observer) -> None:
    """Their frequencies differ, which is not a skew between vCPUs."""
    khz = tiny_vmm.host_khz()
    one = ("create-vcpu:0", "regs:0", f"set:0:{khz}")
    other = ("new-vm", "create-vcpu:0", "regs:0", f"set:0:{khz + 26}")
    with tiny_vmm.process(*one, *other) as process:
        wait_for(lambda: len(of_process(observer, process.pid)) == 2, "its calls")
        calls = [c for c in observer.calls() if c["pid"] == process.pid]
        names = [str(process.pid), f"{process.pid}-2"]
        assert [(c["vm"], c["khz"]) for c in calls] == [(names[0], khz), (names[1], khz + 26)]
        assert all(f'vcpu="0",vm="{name}"' in observer.metrics() for name in names)
    assert {m["kind"] for m in observer.mismatches() if m["pid"] == process.pid} == {"unscaled"}


def test_a_process_that_becomes_another_program_has_another_vm(observer: Observer) -> None:
    """execve keeps the pid and closes the VM; the next VM gets the same file descriptor."""
    khz = tiny_vmm.host_khz()
    one = ("create-vcpu:0", "regs:0", f"set:0:{khz}")
    other = ("create-vcpu:0", "create-vcpu:1", "regs:0", f"set:0:{khz + 26}", f"set:1:{khz + 26}")
    with tiny_vmm.process(*one, "exec", *other) as process:
        wait_for(lambda: len(of_process(observer, process.pid)) == 3, "its calls")
        kinds = {m["kind"] for m in observer.mismatches() if m["pid"] == process.pid}
        assert kinds == {"unscaled"}  # no skew with the vCPU of the first VM
        calls = [c for c in observer.calls() if c["pid"] == process.pid]
        assert len({c["vm"] for c in calls[1:]}) == 1


def test_a_set_that_kvm_refuses(observer: Observer) -> None:
    """KVM returns EINVAL for a lower frequency without scaling, yet GET reports that frequency."""
    khz = tiny_vmm.host_khz()
    with tiny_vmm.process("create-vcpu:0", f"set:0:{khz}", "set:0:1000000", "get:0") as process:
        wait_for(lambda: len(of_process(observer, process.pid)) >= 3, "its calls")
        calls = [c for c in observer.calls() if c["pid"] == process.pid]
        assert [(c["op"], c["khz"], c["result"]) for c in calls] == [
            ("set", khz, 0),
            ("set", 1_000_000, -22),
            ("get", 1_000_000, 0),
        ]
        kinds = {m["kind"] for m in observer.mismatches() if m["pid"] == process.pid}
        assert kinds == {"refused", "readback"}


def test_the_number_alone_is_no_call(observer: Observer, tmp_path: Path) -> None:
    """The same ioctl on files that are not KVM's, one of which has a vCPU's name."""
    forged = tmp_path / "kvm-vcpu:0"
    forged.touch()
    with (
        tiny_vmm.process("set-on-no-vcpu:/dev/null", f"set-on-no-vcpu:{forged}") as process,
        tiny_vmm.process("create-vcpu:0", "create-vcpu:1", "get:0") as marker,
    ):
        wait_for(lambda: bool(of_process(observer, marker.pid)), "the later call")
        assert of_process(observer, process.pid) == []


def test_a_guest_killed_in_the_middle_of_its_boot(observer: Observer, tmp_path: Path) -> None:
    for attempt in range(3):
        name = f"killed-{attempt}"
        options = [
            "-M",
            "q35,accel=kvm",
            "-cpu",
            "qemu64",
            "-display",
            "none",
            "-nodefaults",
            "-smp",
            "8",
        ]
        process = subprocess.Popen(
            [QEMU, *options, "-name", f"guest={name}"], stderr=subprocess.DEVNULL
        )
        wait_for(lambda name=name: bool(observer.calls(name)), "its first call")  # type: ignore[misc]
        process.kill()
        process.wait()
        wait_for(
            lambda name=name: f'vm="{name}"' not in observer.metrics(),  # type: ignore[misc]
            "its series to go",
        )
        assert {call["phase"] for call in observer.calls(name)} == {"boot"}
    with Guest(tmp_path, "after-the-killed"):
        pass
    observer.wait_for_calls("after-the-killed", 6)
    assert observer.places("after-the-killed") == boot(2)


def test_series_go_after_the_end(observer: Observer, tmp_path: Path) -> None:
    with Guest(tmp_path, "short"):
        observer.wait_for_calls("short", 6)
        assert 'tscwatch_vm_info{machine="q35"' in observer.metrics()
        assert 'vm="short"' in observer.metrics()
    wait_for(lambda: 'vm="short"' not in observer.metrics(), "the series to go")


def test_promtool_finds_no_fault_in_the_metrics_of_an_odd_name(
    observer: Observer, tmp_path: Path
) -> None:
    with Guest(tmp_path, 'na"me\\'):
        observer.wait_for_calls('na"me\\', 6)
        assert faults(observer.metrics()) == (0, "", "")


@pytest.mark.parametrize("source", ["bcc", "ftrace"])
def test_a_guest_that_ran_before(source: str, tmp_path: Path) -> None:
    with Guest(tmp_path, "older") as older, Guest(tmp_path, "paused") as paused:
        older.start()
        with Observer(tmp_path, "--json", "--source", source) as observer:
            wait_for(lambda: 'vm="older"' in observer.metrics(), "it to appear")
            older.plug()
            paused.plug()
            observer.wait_for_calls("older", 3)
            observer.wait_for_calls("paused", 3)
            assert observer.places("older") == plug(2, "hotplug")
            assert observer.places("paused") == plug(2, "unknown")
            paused.start()
            paused.plug()
            observer.wait_for_calls("paused", 6)
            # The daemon may not have noticed the start when the plug came.
            assert observer.places("paused")[3:] in (plug(3, "hotplug"), plug(3, "unknown"))


def test_an_unplugged_vcpu_leaves_the_metrics(tmp_path: Path) -> None:
    with (
        Observer(tmp_path, "--source", "ftrace", config=EACH_VCPU) as observer,
        Guest(tmp_path, "shrinks", extra=ejecting(tmp_path)) as shrinks,
    ):
        shrinks.start()
        shrinks.plug()
        of_third = 'tscwatch_vcpu_tsc_reported_hertz{vcpu="2",vm="shrinks"}'
        wait_for(lambda: of_third in observer.metrics(), "the third vCPU")
        shrinks.unplug("cpu2")
        wait_for(lambda: of_third not in observer.metrics(), "the end of its series")
        assert 'vcpu="1",vm="shrinks"' in observer.metrics()
