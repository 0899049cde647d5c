"""What goes wrong around tscwatch, or is made to: it neither falls, nor lies, nor keeps silent."""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from tests.support import vmm
from tests.support.guests import PATIENCE_S, wait_for
from tests.support.observer import TSCWATCH, Observer
from tests.support.scenarios import boot, guest, plug, unknowns
from tscwatch.linux import compiler, syscall

SOURCES = ["bcc", "ftrace"]
TRACING = Path("/sys/kernel/tracing")
LAST_PID = Path("/proc/sys/kernel/ns_last_pid")
HAS_KPROBES = Path("/sys/bus/event_source/devices/kprobe").exists()


def connected(observer: Observer) -> socket.socket:
    host, _, port = observer.target.partition(":")
    return socket.create_connection((host, int(port)), PATIENCE_S)


def threads(observer: Observer) -> int:
    return len(list(Path(f"/proc/{observer.process.pid}/task").iterdir()))


# The kernel's side


@pytest.mark.parametrize("source", SOURCES)
def test_a_call_that_kvm_does_not_take_is_no_other_calls_result(
    source: str, tmp_path: Path
) -> None:
    """By a child of the VM's process, whose memory is not the guest's: EIO, before KVM looks."""
    steps = ("create-vcpu:0", "regs:0", "run:0", "set:0:2000000", "get-by-a-child:0", "get:0")
    with (
        Observer(tmp_path, "--json", "--source", source) as observer,
        vmm.process(*steps) as process,
    ):
        metrics = observer.metrics()
        if 'attach="tracepoint"' in metrics:
            refused = 'op="get",phase="unknown",result="EIO",scope="vcpu",step="unknown"} 2.0'
            wait_for(lambda: refused in observer.metrics(), "both calls")
        elif 'source="bcc"' in metrics:  # their entry was seen, their return was not
            wait_for(lambda: "no_return" in "".join(observer.losses()), "the loss to be counted")
        vm = str(process.pid)
        wait_for(lambda: len(observer.calls(vm)) >= 2, "the process's own calls")
        assert [(call["op"], call["result"]) for call in observer.calls(vm)][-1] == ("get", 0)


def test_a_pid_that_comes_again_is_another_vm(observer: Observer) -> None:
    """The kernel gives the same process id to the next VMM."""
    with vmm.process("create-vcpu:0", "regs:0", "run:0", "set:0:2000000") as first:
        pid = first.pid
        wait_for(lambda: bool(observer.calls(str(pid))), "its calls")
    calls = len(observer.calls(str(pid)))
    for _ in range(100):
        LAST_PID.write_text(str(pid - 1))
        with vmm.process("create-vcpu:1", "regs:1", "run:1", "set:1:2100000") as second:
            if second.pid == pid:
                wait_for(lambda: len(observer.calls(str(pid))) > calls, "the next one's calls")
                break
    else:
        pytest.fail("the pid did not come again")
    assert {call["vcpu"] for call in observer.calls(str(pid))[calls:]} == {1}
    skewed = [m for m in observer.mismatches() if m["vm"] == str(pid) and m["kind"] == "vcpu_skew"]
    assert skewed == []


@pytest.mark.parametrize("name", ['a"b\\c\nd{e="f"}', "caf\udce9", "\x1b[31mred"])
def test_a_guest_may_be_called_anything(observer: Observer, tmp_path: Path, name: str) -> None:
    with guest(tmp_path, name):
        shown = os.fsencode(name).decode(errors="backslashreplace")
        wait_for(lambda: shown in vm_labels(observer), "it to be shown")


def vm_labels(observer: Observer) -> set[str]:
    """As Prometheus reads them."""
    families = text_string_to_metric_families(observer.metrics())  # type: ignore[no-untyped-call]
    return {
        sample.labels["vm"]
        for family in families
        for sample in family.samples
        if "vm" in sample.labels
    }


@pytest.mark.parametrize("source", SOURCES)
def test_without_kvms_debugfs(source: str, tmp_path: Path) -> None:
    """As where it is not mounted, or locked down."""
    hidden = ("unshare", "--mount", "sh", "-c", 'umount -l /sys/kernel/debug; exec "$@"', "sh")
    with Observer(tmp_path, "--json", "--source", source, within=hidden) as observer:
        with guest(tmp_path, "dark") as dark:
            dark.start()
            dark.plug()
            expected = [*boot(2), *plug(2, "hotplug")]
            observer.wait_for_calls("dark", len(expected))
        if source == "bcc":
            assert observer.places("dark") == expected
        else:
            assert unknowns(observer.places("dark"), expected) is not None


# Its own end


@pytest.mark.parametrize("source", SOURCES)
def test_killed_at_any_moment_it_leaves_nothing_that_the_next_does_not_clear(
    source: str, tmp_path: Path
) -> None:
    others = ours_in_tracefs()
    config = tmp_path / "port.yaml"
    config.write_text("listen: {port: 0}\n")
    chance = random.Random(source)
    for _ in range(8):
        command = [TSCWATCH, "run", "--config", str(config), "--source", source]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as killed:
            time.sleep(chance.uniform(0.1, 1.2))
            killed.kill()
    with Observer(tmp_path, "--json", "--source", source) as observer:
        with guest(tmp_path, "after"):
            observer.wait_for_calls("after", len(boot(2)))
        ours = str(observer.process.pid)
        left = set(ours_in_tracefs()) - set(others)
        assert {path.name.rpartition("-")[2] for path in left} == {ours}
    assert ours_in_tracefs() == others
    assert f"tscwatch_{ours}/" not in probes_in_tracefs()


def ours_in_tracefs() -> list[Path]:
    return list((TRACING / "instances").glob("tscwatch-*"))


def probes_in_tracefs() -> str:
    files = [TRACING / name for name in ("kprobe_events", "uprobe_events")]
    return "".join(file.read_text() for file in files if file.exists())


# What it may do


def capabilities(thread: Path) -> set[int]:
    (held,) = re.findall(r"(?m)^CapEff:\s*(\w+)$", (thread / "status").read_text())
    (permitted,) = re.findall(r"(?m)^CapPrm:\s*(\w+)$", (thread / "status").read_text())
    assert held == permitted
    return {bit for bit in range(64) if int(held, 16) >> bit & 1}


def test_each_thread_holds_what_it_needs_and_no_more(observer: Observer) -> None:
    pid = observer.process.pid
    held = {int(task.name): capabilities(task) for task in Path(f"/proc/{pid}/task").iterdir()}
    needs = {syscall.CAP_SYS_PTRACE, syscall.CAP_DAC_READ_SEARCH}
    if 'source="bcc"' in observer.metrics():
        needs |= {syscall.CAP_BPF, syscall.CAP_PERFMON, syscall.CAP_SYS_ADMIN}
    had = capabilities(Path("/proc/self"))
    assert held.pop(pid) == needs & had
    assert list(held.values()) == [set()]  # it answers the port


def test_the_compiler_reads_nothing_that_others_can_write(tmp_path: Path) -> None:
    """bcc 0.12 unpacked headers under a name in /tmp that could be guessed."""
    trace = tmp_path / "trace"
    options = ("-f", "-y", "-qq", "-e", "trace=openat", "-e", "signal=none", "-o", str(trace))
    hidden = 'mount -t tmpfs -o mode=700 none /var/cache/tscwatch; exec "$@"'
    within = ["unshare", "--mount", "sh", "-c", hidden, "sh", "strace", *options]
    compiler.CACHE.mkdir(exist_ok=True)
    with Observer(tmp_path, "--source", "bcc", within=within) as observer:
        tracer = observer.process.pid
        (traced,) = Path(f"/proc/{tracer}/task/{tracer}/children").read_text().split()
        os.kill(int(traced), signal.SIGTERM)
        wait_for(lambda: observer.ended, "its end")
    calls = [line for line in trace.read_text().splitlines() if "O_EXCL" not in line]
    opened = set(re.findall(r" = \d+<(/[^>]+)>$", "\n".join(calls), re.M))
    assert any(name.endswith("autoconf.h") for name in opened)
    ours = ("/proc/", "/sys/", "/dev/", str(tmp_path))
    for name in (name for name in opened if not name.startswith(ours)):
        assert not untrusted(Path(name)), name


def untrusted(path: Path) -> bool:
    """Whether others than root could have put it there; in a private directory they could not."""
    for each in (path, *path.parents):
        if not each.exists() or each.is_symlink():
            if each.parts[:2] == ("/", "tmp") and each.parts[2].startswith("tscwatch-headers-"):
                return False  # mkdtemp's, gone by now
            continue
        status = each.stat()
        if status.st_uid != 0 or status.st_mode & 0o002:
            return True
    return False


# The network's side


@contextmanager
def silent_clients(observer: Observer, count: int) -> Iterator[list[socket.socket]]:
    with ExitStack() as stack:
        yield [stack.enter_context(connected(observer)) for _ in range(count)]


def test_a_thousand_scrapes_at_once_keep_nobody_waiting_for_long(observer: Observer) -> None:
    with silent_clients(observer, 1000) as clients:
        for client in clients:
            with suppress(OSError):  # it was hung up on
                client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        assert threads(observer) <= 128 + 2
    wait_for(lambda: threads(observer) == 2, "the threads to end")
    assert "tscwatch_build_info" in observer.metrics()


def test_scrapers_that_never_read_their_answer(observer: Observer) -> None:
    with silent_clients(observer, 100) as clients:
        for client in clients:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n" * 50)
        assert "tscwatch_build_info" in observer.metrics()


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.one_of(st.binary(max_size=2000), st.text().map(lambda t: f"GET /{t} HTTP/1.1".encode())))
def test_no_request_breaks_it(observer: Observer, request_: bytes) -> None:
    with connected(observer) as client, suppress(ConnectionError):
        client.sendall(request_ + b"\r\n\r\n")
        client.shutdown(socket.SHUT_WR)
        answer = client.recv(1 << 16)
        assert b"Traceback" not in answer
    assert not observer.ended


def test_after_all_that_it_lives(observer: Observer) -> None:
    assert "tscwatch_build_info" in observer.metrics()
    assert not re.search("Traceback|Exception", observer.log.read_text())
