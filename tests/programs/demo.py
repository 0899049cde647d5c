"""A real guest's life, watched: boot, prelaunch, hotplug, loadvm, and a migration gone skew.

``make demo`` runs this.  Exit status 0 means that every call was seen, in order, with the right
phase and step, and that the skew was found and exported.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from tests.support import lab_vm
from tests.support.guests import Guest, make_disk, wait_for
from tests.support.observer import Observer

_CALL = re.compile(r"\S+  (\S+) +vCPU (\d+) +(GET|SET) +(\d+) kHz  (\S+)")
_SKEW = re.compile(r"MISMATCH raised: vcpu_skew ([\d.]+) ppm")
PINNED_PPM = 135
"""Inside the tolerance (250 ppm) of QEMU and KVM, so that no host needs TSC scaling."""


class Wrong(Exception):
    """tscwatch did not see what happened."""


class Demo:
    """Prints what tscwatch prints, and holds it against what was done."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._shown = 0

    @contextmanager
    def step(self, title: str, *expected: str) -> Iterator[None]:
        """What is done inside must bring exactly these calls: ``"web 2 GET hotplug/init"``."""
        print(f"\n{title}", flush=True)
        yield
        with suppress(TimeoutError):  # then what is missing is shown
            wait_for(lambda: len(self._calls()) >= len(expected), "tscwatch", 60)
        seen = [" ".join((vm, vcpu, op, place)) for vm, vcpu, op, _, place in self._calls()]
        for line in self._new_lines():
            print(f"  {line}", flush=True)
        self._shown = len(self._observer.lines())
        if seen != list(expected):
            raise Wrong(f"expected {list(expected)}, saw {seen}")

    def khz(self) -> int:
        """The frequency of the last call."""
        return int(_CALL.findall("\n".join(self._observer.lines()))[-1][3])

    def _new_lines(self) -> list[str]:
        return self._observer.lines()[self._shown :]

    def _calls(self) -> list[tuple[str, ...]]:
        return [match.groups() for match in map(_CALL.match, self._new_lines()) if match]


def _init(vm: str, vcpu: int, phase: str, op: Sequence[str] = ("GET",)) -> list[str]:
    return [f"{vm} {vcpu} {each} {phase}/init" for each in op]


def _post_init(vm: str, vcpus: Sequence[int], phase: str) -> list[str]:
    return [f"{vm} {vcpu} {op} {phase}/post_init" for vcpu in vcpus for op in ("GET", "SET")]


def _life_of_one_guest(demo: Demo, directory: Path, guests: ExitStack) -> int:
    """Gives the host's frequency in kHz."""
    disk = make_disk(directory / "web.qcow2")
    with demo.step(
        "A guest with two vCPUs is made.",
        *_init("web", 0, "boot"),
        *_init("web", 1, "boot"),
        *_post_init("web", (0, 1), "boot"),
    ):
        web = Guest(directory, "web", disk=disk)
        guests.callback(web.quit)
    host_khz = demo.khz()
    with demo.step(
        "device_add before the guest has started:",
        *_init("web", 2, "prelaunch"),
        *_post_init("web", [2], "prelaunch"),
    ):
        web.plug()
    with demo.step("The guest starts, and a snapshot is saved: nothing is called."):
        web.start()
        web.monitor("savevm before")
    with demo.step(
        "device_add while it runs:",
        *_init("web", 3, "hotplug"),
        *_post_init("web", [3], "hotplug"),
    ):
        web.plug()
        web.monitor("savevm after")
    with demo.step("loadvm:", *_post_init("web", (0, 1, 2, 3), "loadvm")):
        web.monitor("loadvm after")
    web.quit()
    return host_khz


def _migration_gone_skew(demo: Demo, directory: Path, guests: ExitStack, host_khz: int) -> float:
    """Gives the skew's size in ppm as it must be."""
    pinned_khz = host_khz + host_khz * PINNED_PPM // 1_000_000
    with demo.step(
        f"A guest pinned to {pinned_khz} kHz, {PINNED_PPM} ppm above this host:",
        *_init("db", 0, "boot", ("GET", "SET")),
        *_init("db", 1, "boot", ("GET", "SET")),
        *_post_init("db", (0, 1), "boot"),
    ):
        source = Guest(directory, "db", cpu=f"qemu64,tsc-frequency={pinned_khz * 1000}")
        guests.callback(source.quit)
    source.start()
    with demo.step(
        "A target for its migration, not pinned:",
        *_init("db-target", 0, "boot"),
        *_init("db-target", 1, "boot"),
        *_post_init("db-target", (0, 1), "boot"),
    ):
        target = Guest(directory, "db-target", incoming="defer")
        guests.callback(target.quit)
    with demo.step("It migrates:", *_post_init("db-target", (0, 1), "incoming")):
        source.migrate_to(target, directory)
    with demo.step(
        "device_add on the target, which knows only its host's frequency:",
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
    print("\nWhat /metrics says of it:")
    for line in metrics.splitlines():
        if 'vm="db-target"' in line or ("_lost_" in line and not line.startswith("#")):
            print(f"  {line}")
    ratio = re.findall(
        r'tscwatch_mismatch_deviation_ratio{kind="vcpu_skew",[^}]*vm="db-target"} (\S+)', metrics
    )
    if len(ratio) != 1 or abs(float(ratio[0]) * 1e6 - ppm) > 1:
        raise Wrong(f"the deviation's metric says {ratio}")


def _observe(directory: Path, source: str) -> Observer:
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        raise RuntimeError("it has no usable /dev/kvm")
    return Observer(directory, "--source", source)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", default="auto")
    source = parser.parse_args().source
    with tempfile.TemporaryDirectory(prefix="tscwatch-demo-") as name, ExitStack() as stack:
        directory = Path(name)
        try:
            observer = stack.enter_context(_observe(directory, source))
        except RuntimeError as unfit:
            if lab_vm.inside():
                raise
            print(f"This machine cannot carry the demo, so it runs in the lab VM: {unfit}")
            return lab_vm.run([sys.executable, "-m", "tests.programs.demo", "--source", source])
        print(observer.log.read_text(), end="", flush=True)
        demo = Demo(observer)
        try:
            host_khz = _life_of_one_guest(demo, directory, stack)
            ppm = _migration_gone_skew(demo, directory, stack, host_khz)
            _check_skew(observer, ppm)
        except Wrong as wrong:
            print(f"\nFAILED: {wrong}", file=sys.stderr)
            return 1
    print("\nEvery call was seen and attributed as it happened.")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main())
