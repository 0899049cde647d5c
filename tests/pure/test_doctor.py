"""The checks of ``tscwatch doctor``, on a host that consists of files."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from tscwatch import doctor
from tscwatch.capture import ebpf
from tscwatch.host import tsc
from tscwatch.model import Host

HEALTHY = {
    "proc/self/status": "Name:\tx\nCapEff:\t000001ffffffffff\n",
    "proc/cpuinfo": "processor: 0\nflags\t\t: fpu constant_tsc nonstop_tsc\n\n",
    "dev/kvm": "",
    "sys/module/kvm_amd/version": "",
    "sys/module/kvm/version": "",
    "sys/bus/event_source/devices/kprobe/type": "6",
    "sys/kernel/btf/vmlinux": "",
    "sys/kernel/security/lockdown": "none [integrity] confidentiality\n",
    "sys/kernel/tracing/events/kvm/kvm_track_tsc/id": "1",
    "sys/kernel/debug/kvm/exits": "0",
}


@pytest.fixture
def host(tmp_path: Path) -> Path:
    for name, text in HEALTHY.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def report(root: Path) -> dict[str, doctor.Check]:
    return {check.what: check for check in doctor.checks(root)}


def test_a_host_that_has_everything(host: Path) -> None:
    found = report(host)
    for what in ("KVM", "kprobes", "BTF", "lockdown", "tracefs", "debugfs", "TSC"):
        assert found[what].state == "ok", found[what]
        assert found[what].remedy == ""
    assert found["KVM"].found == "/dev/kvm, kvm_amd"


@pytest.mark.parametrize(
    ("missing", "what", "state", "remedy"),
    [
        ("dev/kvm", "KVM", "warning", "modprobe"),
        ("sys/bus/event_source/devices/kprobe/type", "kprobes", "warning", "CONFIG_KPROBES"),
        ("sys/kernel/btf/vmlinux", "BTF", "failure", "CONFIG_DEBUG_INFO_BTF"),
        ("proc/cpuinfo", "TSC", "warning", "invtsc"),
        ("proc/self/status", "privileges", "failure", "sudo"),
    ],
)
def test_something_is_missing(host: Path, missing: str, what: str, state: str, remedy: str) -> None:
    (host / missing).unlink()
    check = report(host)[what]
    assert check.state == state
    assert remedy in check.remedy


@pytest.mark.parametrize(
    ("release", "machine", "state", "remedy"),
    [
        ("6.1.0-57-amd64", "x86_64", "ok", ""),
        ("5.8.0", "x86_64", "ok", ""),
        ("5.10.0-28-amd64", "x86_64", "ok", ""),
        ("10.0-rc1", "x86_64", "ok", ""),
        ("5.7.19", "x86_64", "warning", "5.8 or newer"),
        ("4.18.0-553.el8_10.x86_64", "x86_64", "warning", "5.8 or newer"),
        ("6.1.0-57-arm64", "aarch64", "failure", "x86-64"),
        ("4.19.0", "i686", "failure", "x86-64"),
    ],
)
def test_the_kernel_and_the_architecture(
    monkeypatch: pytest.MonkeyPatch, release: str, machine: str, state: str, remedy: str
) -> None:
    """Only x86 has a TSC, and bcc's programs need the ring buffer of Linux 5.8."""
    monkeypatch.setattr(platform, "release", lambda: release)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    check = doctor._machine()
    assert (check.what, check.state) == ("kernel", state)
    assert check.found == f"Linux {release}, {machine}"
    assert remedy in check.remedy
    assert bool(check.remedy) == (state != "ok")


def test_lockdown_that_does_not_let_bpf_read(host: Path) -> None:
    (host / "sys/kernel/security/lockdown").write_text("none integrity [confidentiality]\n")
    found = report(host)
    assert found["lockdown"].state == "failure"
    for what in ("kprobes", "tracefs", "debugfs"):
        assert found[what].state != "ok"
        assert "lockdown" in found[what].found


def test_without_securityfs_lockdown_is_not_known(host: Path) -> None:
    file = host / "sys/kernel/security/lockdown"
    file.rename(file.with_name("lsm"))
    assert report(host)["lockdown"].found == "not part of this kernel"
    file.with_name("lsm").unlink()
    assert report(host)["lockdown"].found.startswith("not known")


@pytest.mark.parametrize(
    ("clocksource", "state", "remedy"),
    [
        ("tsc", "ok", ""),
        ("hyperv_clocksource_tsc_page", "ok", ""),
        ("hyperv_clocksource_msr", "warning", "invtsc"),
        ("kvm-clock", "warning", "invtsc"),
        ("hpet", "warning", "dmesg"),
        ("", "warning", "dmesg"),
    ],
)
def test_what_helps_depends_on_the_clocksource(clocksource: str, state: str, remedy: str) -> None:
    """A nested host keeps its own guest clock, although its TSC is good."""
    check = doctor._clocksource(Host(clocksource=clocksource))
    assert check.state == state
    assert remedy in check.remedy


@pytest.mark.parametrize(
    ("unknown", "ioctl"),
    [(Host(), "KVM_CREATE_VM"), (Host(scaling=False), "KVM_GET_TSC_KHZ")],
)
def test_the_ioctl_is_named_if_the_device_can_be_opened(
    host: Path, monkeypatch: pytest.MonkeyPatch, unknown: Host, ioctl: str
) -> None:
    monkeypatch.setattr(tsc, "read", lambda: unknown)
    check = report(host)["TSC frequency"]
    assert (check.state, check.found) == ("warning", f"not known: {ioctl} failed")
    assert "dmesg" in check.remedy
    (host / "dev/kvm").unlink()
    assert "/dev/kvm" in report(host)["TSC frequency"].remedy


@pytest.mark.parametrize(("inode", "state"), [(0xEFFFFFFC, "ok"), (4026532999, "failure")])
def test_the_process_namespace(host: Path, inode: int, state: str) -> None:
    """The host's has a number of its own (``PROC_PID_INIT_INO``)."""
    (host / "proc/self/ns").mkdir()
    (host / "proc/self/ns/pid").symlink_to(f"pid:[{inode}]")
    check = report(host)["process namespace"]
    assert check.state == state
    assert ("hostPID" in check.remedy) == (state == "failure")


def test_with_packaged_bytecode_no_compiler_is_needed(
    host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ebpf, "is_packaged", lambda: True)
    found = report(host)
    assert found["bytecode"].state == "ok"
    assert found["bytecode"].found.startswith("packaged")
    assert not {"bcc", "headers"} & set(found)


def test_every_check_that_is_not_ok_has_a_remedy(tmp_path: Path) -> None:
    for check in doctor.checks(tmp_path):  # the directory is empty
        assert (check.state == "ok") == (check.remedy == ""), check


def test_the_worst_check_determines_the_exit_status() -> None:
    ok, failure = doctor.Check("a", "ok", ""), doctor.Check("b", "failure", "", "fix it")
    assert doctor.STATUS[doctor.worst([ok])] == 0
    assert doctor.STATUS[doctor.worst([ok, ok._replace(state="warning")])] == 1
    assert doctor.STATUS[doctor.worst([ok, failure, ok])] == 2
