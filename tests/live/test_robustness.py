"""Failures around tscwatch and attacks on it.

It must not crash, report anything false, or drop anything without counting it.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import parser

from tests.support import tiny_vmm
from tests.support.guests import PATIENCE_S, Guest, wait_for
from tests.support.observer import Observer
from tests.support.scenarios import boot, plug, unknowns
from tscwatch.linux import compiler, syscall

SOURCES = ["bcc", "ftrace"]
LAST_PID = Path("/proc/sys/kernel/ns_last_pid")


def connected(observer: Observer) -> socket.socket:
    """Connect to the daemon's port."""
    host, _, port = observer.target.partition(":")
    return socket.create_connection((host, int(port)), PATIENCE_S)


def threads(observer: Observer) -> int:
    """Count the daemon's threads."""
    return len(list(Path(f"/proc/{observer.process.pid}/task").iterdir()))


# Calls, processes and names


@pytest.mark.also_in_lab
def test_a_call_by_another_process_is_only_counted(observer: Observer) -> None:
    """A child of the VM's process calls; KVM returns EIO at once, as the memory is another's."""
    before = observer.series("foreign_ioctls_total")[""]
    steps = ("create-vcpu:0", "regs:0", "run:0", "set:0:2000000", "get-by-a-child:0", "get:0")
    with tiny_vmm.process(*steps) as process:
        vm = str(process.pid)
        wait_for(lambda: len(observer.calls(vm)) >= 2, "the process's own calls")
        assert [call["op"] for call in observer.calls(vm)] == ["set", "get"]
        assert errno.EIO not in {-call["result"] for call in observer.calls()}
        if 'function="kvm_arch_vcpu_ioctl"' not in observer.metrics():
            # Another tscwatch on this host may make such calls too.  Losses and this count are
            # published after the calls' lines.
            wait_for(
                lambda: observer.series("foreign_ioctls_total")[""] >= before + 2,
                "the refused calls",
            )
        assert observer.losses() == []


def test_a_pid_that_comes_again_is_another_vm(observer: Observer) -> None:
    """The kernel gives the process id of one VMM to the next."""
    with tiny_vmm.process("create-vcpu:0", "regs:0", "run:0", "set:0:2000000") as first:
        pid = first.pid
        wait_for(lambda: bool(observer.calls(str(pid))), "its calls")
    calls = len(observer.calls(str(pid)))
    for _ in range(100):
        LAST_PID.write_text(str(pid - 1))
        with tiny_vmm.process("create-vcpu:1", "regs:1", "run:1", "set:1:2100000") as second:
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
    with Guest(tmp_path, name):
        shown = os.fsencode(name).decode(errors="backslashreplace")
        wait_for(lambda: shown in vm_labels(observer), "its name in the metrics")


def vm_labels(observer: Observer) -> set[str]:
    """Return the names of VMs in the metrics, as Prometheus parses them."""
    parse = cast(Any, parser).text_string_to_metric_families  # old releases have no types
    return {
        sample.labels["vm"]
        for family in parse(observer.metrics())
        for sample in family.samples
        if "vm" in sample.labels
    }


@pytest.mark.parametrize("source", SOURCES)
def test_without_kvms_debugfs(source: str, tmp_path: Path) -> None:
    """debugfs may not be mounted, or be closed by lockdown."""
    hidden = ("unshare", "--mount", "sh", "-c", 'umount -l /sys/kernel/debug; exec "$@"', "sh")
    with Observer(tmp_path, "--json", "--source", source, within=hidden) as observer:
        with Guest(tmp_path, "dark") as dark:
            dark.start()
            dark.plug()
            expected = [*boot(2), *plug(2, "hotplug")]
            observer.wait_for_calls("dark", len(expected))
        if source == "bcc":
            assert observer.places("dark") == expected
        else:
            assert unknowns(observer.places("dark"), expected) is not None


# Privileges


def capabilities(thread: Path) -> set[int]:
    """Return the effective capabilities of a thread, which must be its permitted ones."""
    (held,) = re.findall(r"(?m)^CapEff:\s*(\w+)$", (thread / "status").read_text())
    (permitted,) = re.findall(r"(?m)^CapPrm:\s*(\w+)$", (thread / "status").read_text())
    assert held == permitted
    return {bit for bit in range(64) if int(held, 16) >> bit & 1}


def test_each_thread_holds_what_it_needs_and_no_more(observer: Observer) -> None:
    pid = observer.process.pid
    held = {int(task.name): capabilities(task) for task in Path(f"/proc/{pid}/task").iterdir()}
    needs = {syscall.CAP_SYS_PTRACE, syscall.CAP_DAC_READ_SEARCH}
    if re.search('attach="kprobe.*source="bcc"', observer.metrics()):
        needs |= {syscall.CAP_BPF, syscall.CAP_PERFMON, syscall.CAP_SYS_ADMIN}
    had = capabilities(Path("/proc/self"))
    assert held.pop(pid) == needs & had
    assert list(held.values()) == [set()]  # the HTTP thread


def test_the_compiler_reads_nothing_that_others_can_write(tmp_path: Path) -> None:
    """bcc 0.12 unpacked kernel headers into a predictable directory in /tmp."""
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
    """Return whether others than root could have created or changed a file.

    In a directory that is private to root they could not.
    """
    for each in (path, *path.parents):
        if not each.exists() or each.is_symlink():
            if each.parts[:2] == ("/", "tmp") and each.parts[2].startswith("tscwatch-headers-"):
                return False  # made by mkdtemp, and already removed
            continue
        status = each.stat()
        if status.st_uid != 0 or status.st_mode & 0o002:
            return True
    return False


# HTTP clients


@contextmanager
def silent_clients(observer: Observer, count: int) -> Iterator[list[socket.socket]]:
    """Yield connections on which nothing has been sent."""
    with ExitStack() as stack:
        yield [stack.enter_context(connected(observer)) for _ in range(count)]


def test_a_thousand_scrapes_at_once_keep_nobody_waiting_for_long(observer: Observer) -> None:
    with silent_clients(observer, 1000) as clients:
        for client in clients:
            with suppress(OSError):  # the daemon has closed the connection
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


def test_after_all_that_the_daemon_lives(observer: Observer) -> None:
    assert "tscwatch_build_info" in observer.metrics()
    assert not re.search("Traceback|Exception", observer.log.read_text())
