"""The observers to measure: tscwatch, and other tools that can trace KVM's TSC ioctls."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Callable, Optional

from tests.support.guests import PATIENCE_S, wait_for
from tests.support.observer import Observer
from tests.support.prometheus import free_port
from tscwatch.linux import compiler

KPROBES = Path("/sys/bus/event_source/devices/kprobe").exists()

# The equivalent of tscwatch's programs: each SET and GET with its result.
_BPFTRACE = (
    """
kprobe:kvm_vcpu_ioctl /arg1 == 0xaea2 || arg1 == 0xaea3/ { @call[tid] = arg2; @in[tid] = 1; }
kretprobe:kvm_vcpu_ioctl /@in[tid]/ {
    printf("%d %s %d %d\\n", tid, comm, @call[tid], retval);
    delete(@call[tid]); delete(@in[tid]);
}
"""
    if KPROBES
    else """
tracepoint:syscalls:sys_enter_ioctl /args->cmd == 0xaea2 || args->cmd == 0xaea3/ {
    @call[tid] = args->arg; @in[tid] = 1;
}
tracepoint:syscalls:sys_exit_ioctl /@in[tid]/ {
    printf("%d %s %d %d\\n", tid, comm, @call[tid], args->ret);
    delete(@call[tid]); delete(@in[tid]);
}
"""
)
_EMPTY = (
    "kprobe:kvm_vcpu_ioctl { } kretprobe:kvm_vcpu_ioctl { }"
    if KPROBES
    else "tracepoint:syscalls:sys_enter_ioctl { } tracepoint:syscalls:sys_exit_ioctl { }"
)
_TRACE = (
    'p::kvm_vcpu_ioctl(void *filp, unsigned int cmd) (cmd == 0xaea2 || cmd == 0xaea3) "%x", cmd'
    if KPROBES
    else 't:syscalls:sys_enter_ioctl (args->cmd == 0xaea2 || args->cmd == 0xaea3) "%x", args->cmd'
)
_CLIENT = (
    "import prometheus_client as p, time; s = p.start_http_server({port}, '127.0.0.1'); "
    "print('ready', flush=True); time.sleep(1e6)"
)


Running = AbstractContextManager[Optional[int]]
"""A running observer; yields its pid, or None if there is no process."""


@contextmanager
def _tscwatch(source: str, directory: Path, _target: int) -> Iterator[Optional[int]]:
    with Observer(directory, "--json", "--source", source) as observer:
        observer.metrics()
        yield observer.process.pid


@contextmanager
def _program(directory: Path, ready: str, *command: str) -> Iterator[Optional[int]]:
    output = directory / "observer.out"
    with output.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        wait_for(lambda: ready in output.read_text() or process.poll() is not None, command[0])
        time.sleep(1)  # the tools print this before they attach
        if process.poll() is not None:
            raise Unfit(f"{command[0]} does not run here: {output.read_text().strip()}")
        yield process.pid
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):  # bpftrace does not always react to SIGTERM
            process.wait(5)
        process.kill()
        process.wait(PATIENCE_S)


class Unfit(Exception):
    """The program does not run on this kernel."""


@contextmanager
def _trace(directory: Path, _target: int) -> Iterator[Optional[int]]:
    with compiler.headers_for_bcc(), _program(directory, "COMM", "trace-bpfcc", _TRACE) as pid:
        yield pid


def _strace(directory: Path, target: int) -> Running:
    options = ("-f", "-qq", "-e", "trace=ioctl", "-o", os.devnull, "-p", str(target))
    return _program(directory, "", "strace", *options)


def _bpftrace(text: str, directory: Path, _target: int) -> Running:
    return _program(directory, "Attaching", "bpftrace", "-B", "line", "-e", text)


def bare_client(directory: Path, _target: int) -> Running:
    """Run a prometheus_client that exports only its default metrics."""
    return _program(directory, "ready", sys.executable, "-c", _CLIENT.format(port=free_port()))


OBSERVERS: dict[str, Callable[[Path, int], Running]] = {
    "no observer": lambda _directory, _target: nullcontext(),
    "tscwatch, bcc": partial(_tscwatch, "bcc"),
    "tscwatch, ftrace": partial(_tscwatch, "ftrace"),
    "bpftrace": partial(_bpftrace, _BPFTRACE),
    "empty programs": partial(_bpftrace, _EMPTY),
    "bcc's trace": _trace,
    "perf trace": lambda directory, target: _program(
        directory, "", "perf", "trace", "-e", "ioctl", "-p", str(target)
    ),
    "strace": _strace,
}
