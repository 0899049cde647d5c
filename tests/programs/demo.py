"""Watches real guests: boot, prelaunch, hotplug, loadvm, and a migration that causes a skew.

``make demo`` runs this.  Exit status 0 means that tscwatch reported every call in order with the
right phase and step, and that it found the skew and exported it.  If tscwatch cannot run on this
machine, the demo installs what the lab VM needs, and runs there.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from tests.support import lab_vm
from tests.support.guests import Guest, make_disk, wait_for
from tests.support.machine import why_no_kvm
from tests.support.observer import Observer

_CALL = re.compile(r"\S+  (\S+) +vCPU (\d+) +(GET|SET) +(\d+) kHz  (\S+)")
_SKEW = re.compile(r"(?m)^\S+  db-target .* MISMATCH raised: vcpu_skew requested ([\d.]+) ppm")
_GUESTS = ("web", "db", "db-target")
"""The demo's own: the host can have others."""
PINNED_PPM = 135
"""Within the tolerance (250 ppm) of QEMU and KVM, so that the host needs no TSC scaling."""
LAB_MINUTES = 4


def _calls(lines: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the calls of the demo's guests: VM, vCPU, operation, kHz, and phase and step."""
    calls = [match.groups() for match in map(_CALL.match, lines) if match]
    return [call for call in calls if call[0] in _GUESTS]


class Wrong(Exception):
    """tscwatch did not report what happened."""


class Demo:
    """Prints what tscwatch prints, and compares it with the calls that each step must cause."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._shown = 0

    @contextmanager
    def step(self, title: str, *expected: str) -> Iterator[None]:
        """Expect the actions inside the context to cause exactly these calls.

        :param expected: calls in order, each as ``"web 2 GET hotplug/init"``.
        :raises Wrong: tscwatch reported other calls.
        """
        print(f"\n{title}", flush=True)
        yield
        with suppress(TimeoutError):  # the comparison below reports missing calls
            wait_for(lambda: len(_calls(self._new_lines())) >= len(expected), "tscwatch")
        lines = self._new_lines()
        for line in lines:
            print(f"  {line}", flush=True)
        self._shown += len(lines)
        seen = [" ".join((vm, vcpu, op, place)) for vm, vcpu, op, _, place in _calls(lines)]
        if seen != list(expected):
            raise Wrong(f"expected {list(expected)}, saw {seen}")

    def khz(self) -> int:
        """Return the frequency of the last call, in kHz."""
        return int(_calls(self._observer.lines())[-1][3])

    def _new_lines(self) -> list[str]:
        return self._observer.lines()[self._shown :]


def _init(vm: str, vcpu: int, phase: str, op: Sequence[str] = ("GET",)) -> list[str]:
    return [f"{vm} {vcpu} {each} {phase}/init" for each in op]


def _post_init(vm: str, vcpus: Sequence[int], phase: str) -> list[str]:
    return [f"{vm} {vcpu} {op} {phase}/post_init" for vcpu in vcpus for op in ("GET", "SET")]


def _life_of_one_guest(demo: Demo, directory: Path, guests: ExitStack) -> int:
    """Return the host's frequency in kHz."""
    disk = make_disk(directory / "web.qcow2")
    with demo.step(
        "A guest with two vCPUs is created:",
        *_init("web", 0, "boot"),
        *_init("web", 1, "boot"),
        *_post_init("web", (0, 1), "boot"),
    ):
        web = guests.enter_context(Guest(directory, "web", disk=disk))
    host_khz = demo.khz()
    with demo.step(
        "device_add before the guest has started:",
        *_init("web", 2, "prelaunch"),
        *_post_init("web", [2], "prelaunch"),
    ):
        web.plug()
    with demo.step("The guest starts, and a snapshot is saved; neither makes a call."):
        web.start()
        web.monitor("savevm before")
    with demo.step(
        "device_add while the guest runs:",
        *_init("web", 3, "hotplug"),
        *_post_init("web", [3], "hotplug"),
    ):
        web.plug()
        web.monitor("savevm after")
    with demo.step("loadvm:", *_post_init("web", (0, 1, 2, 3), "loadvm")):
        web.monitor("loadvm after")
    web.quit()
    return host_khz


def _skew_after_migration(demo: Demo, directory: Path, guests: ExitStack, host_khz: int) -> float:
    """Return the expected size of the skew in ppm."""
    pinned_khz = host_khz + host_khz * PINNED_PPM // 1_000_000
    with demo.step(
        f"A guest is pinned to {pinned_khz} kHz, {PINNED_PPM} ppm above this host:",
        *_init("db", 0, "boot", ("GET", "SET")),
        *_init("db", 1, "boot", ("GET", "SET")),
        *_post_init("db", (0, 1), "boot"),
    ):
        cpu = f"qemu64,tsc-frequency={pinned_khz * 1000}"
        source = guests.enter_context(Guest(directory, "db", cpu=cpu))
    source.start()
    with demo.step(
        "A target for its migration is created, which is not pinned:",
        *_init("db-target", 0, "boot"),
        *_init("db-target", 1, "boot"),
        *_post_init("db-target", (0, 1), "boot"),
    ):
        target = guests.enter_context(Guest(directory, "db-target", incoming="defer"))
    with demo.step("The guest migrates:", *_post_init("db-target", (0, 1), "incoming")):
        source.migrate_to(target, directory)
    with demo.step(
        "device_add on the target, where the new vCPU gets the host's frequency:",
        *_init("db-target", 2, "hotplug"),
        *_post_init("db-target", [2], "hotplug"),
    ):
        target.start()
        target.plug()
    return (pinned_khz - host_khz) / pinned_khz * 1e6


def _check_skew(observer: Observer, ppm: float) -> None:
    found = _SKEW.findall("\n".join(observer.lines()))
    if len(found) != 1 or abs(float(found[0]) - ppm) > 1:
        raise Wrong(f"expected one vcpu_skew of {ppm:.1f} ppm, saw {found}")
    metrics = observer.metrics()
    print("\nThe metrics of the target, and of lost events:")
    for line in metrics.splitlines():
        if 'vm="db-target"' in line or ("_lost_" in line and not line.startswith("#")):
            print(f"  {line}")
    ratio = re.findall(
        r'tscwatch_mismatch_deviation_ratio{kind="vcpu_skew",[^}]*vm="db-target"} (\S+)', metrics
    )
    if [float(each) for each in ratio] != [0]:
        raise Wrong(f"within KVM's tolerance all vCPUs tick alike, but the ratio is {ratio}")


@contextmanager
def _observing(directory: Path, source: str) -> Iterator[Observer]:
    """Observe this host, alone: the guests of another demo have the same names.

    :raises RuntimeError: tscwatch cannot run on this machine.
    """
    if reason := why_no_kvm():
        raise RuntimeError(reason)
    kvm = os.open("/sys/module/kvm", os.O_RDONLY)  # one for all, also for a container's /dev/kvm
    try:
        fcntl.flock(kvm, fcntl.LOCK_EX)
        with Observer(directory, "--source", source) as observer:
            yield observer
    finally:
        os.close(kvm)


def _run_in_lab(source: str, reason: str) -> int:
    """Install the lab VM, run the demo in it, and return its exit status.

    :param reason: why the demo cannot run on this machine.
    """
    print(
        f"The demo cannot run on this machine ({reason}), so it runs in the lab VM, an emulated "
        f"machine; that takes about {LAB_MINUTES} minutes.",
        flush=True,
    )
    installed = subprocess.run(["make", "-s", "setup-lab"], check=False, cwd=lab_vm.ROOT)
    command = [sys.executable, "-m", "tests.programs.demo", "--source", source]
    return installed.returncode or lab_vm.run(command)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", default="auto")
    source = parser.parse_args().source
    with tempfile.TemporaryDirectory(prefix="tscwatch-demo-") as name, ExitStack() as stack:
        directory = Path(name)
        try:
            observer = stack.enter_context(_observing(directory, source))
        except RuntimeError as error:
            if lab_vm.inside() or "Traceback" in str(error):
                raise
            reason = str(error).strip().splitlines()[-1].rpartition("tscwatch: ")[2]
            return _run_in_lab(source, reason)
        print(observer.log.read_text(), end="", flush=True)
        demo = Demo(observer)
        try:
            host_khz = _life_of_one_guest(demo, directory, stack)
            ppm = _skew_after_migration(demo, directory, stack, host_khz)
            _check_skew(observer, ppm)
        except Wrong as wrong:
            print(f"\nFAILED: {wrong}", file=sys.stderr)
            return 1
    print("\nEvery call was reported with the right phase and step, and the skew was found.")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main())
