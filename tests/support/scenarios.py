"""Scenarios: lives of real guests, each with the calls that tscwatch must report.

A scenario drives QEMU and returns, for each VM, the TSC calls that QEMU 7.2 makes on its vCPUs.
The expected phases follow from the commands that the scenario issues, not from tscwatch.  The live
tests run the scenarios under each source; ``tests/programs/record.py`` records them for the pure
tests.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from pathlib import Path
from typing import Callable, Optional

from qemu.qmp import ExecInterruptedError

from tests.support import libvirt, tiny_vmm
from tests.support.guests import (
    Guest,
    ejecting,
    make_disk,
    qemu_version,
    wait_for,
)

Places = list[str]
"""Calls in order, each as ``"2 set hotplug/post_init"``: vCPU, operation, phase and step."""
Expected = dict[str, Places]
"""The calls of each VM, by its name."""
Scenario = Callable[[Path, str], Expected]
"""Takes a directory for its files and a prefix for the names of its guests."""

_SOCKETS = ",sockets=4,cores=1,threads=1"
TOLERANCE = Path("/sys/module/kvm/parameters/tsc_tolerance_ppm")


def init(vcpu: int, phase: str, ops: Sequence[str] = ("get",)) -> Places:
    return [f"{vcpu} {op} {phase}/init" for op in ops]


def post_init(vcpus: Sequence[int], phase: str) -> Places:
    return [f"{vcpu} {op} {phase}/post_init" for vcpu in vcpus for op in ("get", "set")]


def plug(vcpu: int, phase: str) -> Places:
    return [*init(vcpu, phase), *post_init([vcpu], phase)]


def boot(vcpus: int, ops: Sequence[str] = ("get",)) -> Places:
    """Each vCPU is initialised, then machine completion writes the state of all vCPUs."""
    indexes = range(vcpus)
    return [place for v in indexes for place in init(v, "boot", ops)] + post_init(indexes, "boot")


def life(directory: Path, prefix: str) -> Expected:
    """Boot, prelaunch, hotplug, reset (which makes no TSC call) and loadvm."""
    name = f"{prefix}life"
    disk = make_disk(directory / f"{name}.qcow2")
    with Guest(directory, name, disk=disk, uuid="6e0b1d3a-5a43-4a4c-9a0e-0d6a4c3f7b11") as it:
        it.plug()
        it.start()
        it.plug()
        it.execute("system_reset")
        it.monitor("savevm one")
        it.monitor("loadvm one")
    return {
        name: [
            *boot(2),
            *plug(2, "prelaunch"),
            *plug(3, "hotplug"),
            *post_init(range(4), "loadvm"),
        ]
    }


def one_vcpu(directory: Path, prefix: str) -> Expected:
    """With one vCPU, a write of all vCPUs' state looks like the write of a single one."""
    name = f"{prefix}single"
    disk = make_disk(directory / f"{name}.qcow2")
    with Guest(directory, name, disk=disk, smp=1) as it:
        it.start()
        it.monitor("savevm one")
        it.monitor("loadvm one")
        it.monitor("loadvm one")
    return {name: [*boot(1), *post_init([0], "loadvm"), *post_init([0], "loadvm")]}


def loadvm_at_start(directory: Path, prefix: str) -> Expected:
    """``-loadvm`` writes the state of all vCPUs once more, before the VM has ever run."""
    name = f"{prefix}saver"
    disk = make_disk(directory / f"{name}.qcow2")
    with Guest(directory, name, disk=disk) as it:
        it.start()
        it.monitor("savevm one")
    again = f"{prefix}loader"
    with Guest(directory, again, disk=disk, extra=("-loadvm", "one")) as it:
        it.start()
    return {name: boot(2), again: [*boot(2), *post_init(range(2), "loadvm")]}


@contextmanager
def skewed(directory: Path, prefix: str, uuid: Optional[str] = None) -> Iterator[Guest]:
    """Yield a guest with the bug: after a migration, a hotplugged vCPU got the host's frequency.

    The source is pinned to 135 ppm above the host's frequency, and both guests quit at the end.
    """
    source_name, target_name = f"{prefix}source", f"{prefix}target"
    pinned = tiny_vmm.khz_above_host(135)
    with (
        Guest(directory, source_name, cpu=f"qemu64,tsc-frequency={pinned}000", uuid=uuid) as source,
        Guest(directory, target_name, incoming="defer", uuid=uuid) as target,
    ):
        source.start()
        source.migrate_to(target, directory)
        target.start()
        target.plug()
        yield target


def skewed_migration(directory: Path, prefix: str) -> Expected:
    """A skew appears, and ends with the guests."""
    with skewed(directory, prefix):
        pass
    return {
        f"{prefix}source": boot(2, ("get", "set")),
        f"{prefix}target": [*boot(2), *post_init(range(2), "incoming"), *plug(2, "hotplug")],
    }


def plugged_before_the_stream(directory: Path, prefix: str) -> Expected:
    """device_add under ``-incoming``, as libvirt migrates a guest with a hotplugged vCPU."""
    source_name, target_name = f"{prefix}from", f"{prefix}to"
    with (
        Guest(directory, source_name) as source,
        Guest(directory, target_name, incoming="defer") as target,
    ):
        source.start()
        source.plug()
        target.plug()
        source.migrate_to(target, directory)
        target.start()
    return {
        source_name: [*boot(2), *plug(2, "hotplug")],
        target_name: [*boot(2), *plug(2, "prelaunch"), *post_init(range(3), "incoming")],
    }


def interleaved(directory: Path, prefix: str) -> Expected:
    """Two guests whose boots and hotplugs alternate."""
    a, b = f"{prefix}a", f"{prefix}b"
    with Guest(directory, a) as first, Guest(directory, b, smp=1) as second:
        first.plug()
        second.start()
        second.plug()
        first.start()
        second.plug()
        first.plug()
    return {
        a: [*boot(2), *plug(2, "prelaunch"), *plug(3, "hotplug")],
        b: [*boot(1), *plug(1, "hotplug"), *plug(2, "hotplug")],
    }


def out_of_tolerance(directory: Path, prefix: str) -> Expected:
    """Without scaling and out of tolerance, QEMU calls GET twice, sets nothing and exits."""
    name = f"{prefix}withheld"
    Guest.that_fails(directory, name, cpu="qemu64,tsc-frequency=1000000000")
    return {name: init(0, "boot", ("get", "get"))}


def refused(directory: Path, prefix: str) -> Expected:
    """KVM's tolerance is below QEMU's own, so that QEMU tries a frequency that KVM refuses."""
    name = f"{prefix}refused"
    khz = tiny_vmm.khz_above_host(-100)
    before = TOLERANCE.read_text()
    TOLERANCE.write_text("50")
    try:
        # The second GET returns the refused value, so QEMU continues as if it were set.
        with Guest(directory, name, smp=1, cpu=f"qemu64,tsc-frequency={khz}000"):
            pass
    finally:
        TOLERANCE.write_text(before)
    return {
        name: [
            *init(0, "boot", ("get", "set", "get")),
            *(f"0 {op} boot/post_init" for op in ("get", "set", "get")),
        ]
    }


def preconfig(directory: Path, prefix: str) -> Expected:
    """``-preconfig``: the vCPUs are created after the QMP command x-exit-preconfig."""
    name = f"{prefix}preconfig"
    with Guest(directory, name, extra=("-preconfig",)) as it:
        it.execute("x-exit-preconfig")
        it.start()
    return {name: boot(2)}


def cpus_on_the_command_line(directory: Path, prefix: str) -> Expected:
    """A vCPU that comes from ``-device`` is a boot vCPU too."""
    name = f"{prefix}devices"
    device = "qemu64-x86_64-cpu,socket-id=1,core-id=0,thread-id=0,id=extra"
    with Guest(directory, name, topology=_SOCKETS, smp=1, extra=("-device", device)) as it:
        it.start()
    return {name: boot(2)}


def sparse_topology(directory: Path, prefix: str) -> Expected:
    """With three cores per socket the vCPU ids have a gap, because QEMU uses APIC ids."""
    name = f"{prefix}sparse"
    topology = ",sockets=2,cores=3,threads=1"
    with Guest(directory, name, smp=4, maxcpus=6, topology=topology) as it:
        it.start()
        it.plug()
    ids = (0, 1, 2, 4)
    return {
        name: [
            *(place for v in ids for place in init(v, "boot")),
            *post_init(ids, "boot"),
            *plug(5, "hotplug"),
        ]
    }


def without_debug_threads(directory: Path, prefix: str) -> Expected:
    """The names of the threads do not identify the vCPUs."""
    name = f"{prefix}plain"
    with Guest(directory, name, debug_threads=False) as it:
        it.start()
        it.plug()
    return {name: [*boot(2), *plug(2, "hotplug")]}


def pinned(directory: Path, prefix: str) -> Expected:
    """``tsc-frequency`` on the command line: QEMU sets it on every vCPU, also on plugged ones."""
    name = f"{prefix}pinned"
    khz = tiny_vmm.khz_above_host(100)
    with Guest(directory, name, cpu=f"qemu64,tsc-frequency={khz}000") as it:
        it.plug()
        it.start()
        it.plug()
    return {
        name: [
            *boot(2, ("get", "set")),
            *init(2, "prelaunch", ("get", "set")),
            *post_init([2], "prelaunch"),
            *init(3, "hotplug", ("get", "set")),
            *post_init([3], "hotplug"),
        ]
    }


def several_at_once(directory: Path, prefix: str) -> Expected:
    name = f"{prefix}several"
    with Guest(directory, name, smp=1, maxcpus=6) as it:
        it.start()
        for _ in range(5):
            it.plug()
    return {name: [*boot(1), *(place for v in range(1, 6) for place in plug(v, "hotplug"))]}


def _migration(
    directory: Path, prefix: str, capabilities: Sequence[str] = (), postcopy: bool = False
) -> Expected:
    with (
        Guest(directory, f"{prefix}source") as source,
        Guest(directory, f"{prefix}target", incoming="defer") as target,
    ):
        source.start()
        for each in (source, target):
            each.enable(*capabilities)
        uri = f"unix:{directory / 'migration.sock'}"
        target.execute("migrate-incoming", uri=uri)
        source.execute("migrate", uri=uri)
        if postcopy:
            source.execute("migrate-start-postcopy")
        wait_for(lambda: source.migrated() and target.migrated(), "the migration's end")
        target.start()
        target.plug()
    return {
        f"{prefix}source": boot(2),
        f"{prefix}target": [*boot(2), *post_init(range(2), "incoming"), *plug(2, "hotplug")],
    }


def multifd(directory: Path, prefix: str) -> Expected:
    return _migration(directory, f"{prefix}multifd-", ("multifd",))


def postcopy(directory: Path, prefix: str) -> Expected:
    """A bottom half writes the state of all vCPUs, before the pages have arrived."""
    return _migration(directory, f"{prefix}postcopy-", ("postcopy-ram",), postcopy=True)


def incoming_on_the_command_line(directory: Path, prefix: str) -> Expected:
    uri = f"unix:{directory / 'cmdline.sock'}"
    with (
        Guest(directory, f"{prefix}out") as source,
        Guest(directory, f"{prefix}in", incoming=uri) as target,
    ):
        source.start()
        source.execute("migrate", uri=uri)
        wait_for(lambda: source.migrated() and target.migrated(), "the migration's end")
    return {
        f"{prefix}out": boot(2),
        f"{prefix}in": [*boot(2), *post_init(range(2), "incoming")],
    }


def failed_incoming(directory: Path, prefix: str) -> Expected:
    """Source and target are pinned differently: the load fails halfway.

    QEMU then writes the state that it has loaded so far, and exits.
    """
    cpus = [f"qemu64,tsc-frequency={tiny_vmm.khz_above_host(ppm)}000" for ppm in (100, 200)]
    uri = f"unix:{directory / 'failed.sock'}"
    with (
        Guest(directory, f"{prefix}sends", cpu=cpus[0]) as source,
        Guest(directory, f"{prefix}fails", cpu=cpus[1], incoming="defer") as target,
    ):
        source.start()
        target.execute("migrate-incoming", uri=uri)
        source.execute("migrate", uri=uri)
        target.wait()
    return {
        f"{prefix}sends": boot(2, ("get", "set")),
        f"{prefix}fails": [*boot(2, ("get", "set")), *post_init(range(2), "incoming")],
    }


def cancelled_incoming(directory: Path, prefix: str) -> Expected:
    """A migration is cancelled before it is complete.

    The limit on the bandwidth is not enough, because QEMU exceeds so low a limit by far, and an
    empty guest's migration is complete within a second.  So the migration also pauses at its end.
    """
    uri = f"unix:{directory / 'cancelled.sock'}"
    with (
        Guest(directory, f"{prefix}cancels") as source,
        Guest(directory, f"{prefix}waits", incoming="defer") as target,
    ):
        source.start()
        source.execute("migrate-set-parameters", **{"max-bandwidth": 4096})
        source.enable("pause-before-switchover")
        target.execute("migrate-incoming", uri=uri)
        source.execute("migrate", uri=uri)
        wait_for(lambda: source.transferred() > 0, "the stream to have begun")
        source.execute("migrate_cancel")
        wait_for(lambda: source.migration() == "cancelled", "the migration's end")
        target.wait()
        source.plug()
    return {
        f"{prefix}cancels": [*boot(2), *plug(2, "hotplug")],
        f"{prefix}waits": [*boot(2), *post_init(range(2), "incoming")],
    }


def failed_loadvm(directory: Path, prefix: str) -> Expected:
    """A snapshot of three vCPUs cannot be loaded into a machine of two.

    QEMU then writes the state that it has loaded so far, and goes on.
    """
    disk = make_disk(directory / f"{prefix}failed.qcow2")
    with Guest(directory, f"{prefix}three", disk=disk, smp=3) as it:
        it.start()
        it.monitor("savevm three")
    with Guest(directory, f"{prefix}two", disk=disk) as it:
        it.start()
        it.monitor("loadvm three")
        it.plug()
    return {
        f"{prefix}three": boot(3),
        f"{prefix}two": [*boot(2), *post_init(range(2), "loadvm"), *plug(2, "hotplug")],
    }


def unplug_and_replug(directory: Path, prefix: str) -> Expected:
    """QEMU parks an unplugged vCPU's file descriptor, and uses it again on a new thread.

    A snapshot is loaded in between.  Some kernels refuse KVM_SET_CPUID2 on the parked descriptor
    (seen on Linux 6.18); QEMU then exits.
    """
    name = f"{prefix}replug"
    disk = make_disk(directory / f"{name}.qcow2")
    with Guest(directory, name, disk=disk, extra=ejecting(directory)) as it:
        it.start()
        it.plug()
        it.unplug("cpu2")
        it.monitor("savevm two")
        it.monitor("loadvm two")
        again = plug(2, "hotplug")
        try:
            it.plug()
        except ExecInterruptedError:
            it.wait()
            assert "kvm_arch_init_vcpu failed" in it.errors()
            again = init(2, "hotplug")
    places = [*boot(2), *plug(2, "hotplug"), *post_init(range(2), "loadvm"), *again]
    return {name: places}


def under_libvirt(directory: Path, prefix: str) -> Expected:
    """virsh start, setvcpus --live, managedsave and start.

    For the last, libvirt runs QEMU with ``-incoming defer`` and issues device_add.
    """
    name = f"{prefix}libvirt"
    with libvirt.daemons(directory), libvirt.domain(directory, name):
        libvirt.virsh("start", name)
        libvirt.virsh("setvcpus", name, "3", "--live")
        libvirt.virsh("managedsave", name)
        libvirt.virsh("start", name)
        wait_for(lambda: "running" in libvirt.virsh("domstate", name), "the guest to run")
    return {
        name: [
            *boot(2),
            *plug(2, "hotplug"),
            *boot(2),
            *plug(2, "prelaunch"),
            *post_init(range(3), "incoming"),
        ]
    }


def snapshot_load(directory: Path, prefix: str) -> Expected:
    """The QMP commands for snapshots, which run as jobs."""
    name = f"{prefix}job"
    disk = make_disk(directory / f"{name}.qcow2")
    with Guest(directory, name, disk=disk) as it:
        it.start()
        node = it.execute("query-block")[0]["inserted"]["node-name"]
        for command in ("snapshot-save", "snapshot-load"):
            it.run_job(command, tag="one", vmstate=node, devices=[node])
    return {name: [*boot(2), *post_init(range(2), "loadvm")]}


def mapped_ram(directory: Path, prefix: str) -> Expected:
    """A migration to a file, in which each page has its place, and from it."""
    source_name, target_name = f"{prefix}saved", f"{prefix}restored"
    uri = f"file:{directory / 'mapped-ram'}"
    with (
        Guest(directory, source_name) as source,
        Guest(directory, target_name, incoming="defer") as target,
    ):
        source.start()
        for each in (source, target):
            each.enable("mapped-ram", "multifd")
        source.execute("migrate", uri=uri)
        wait_for(source.migrated, "the file to be written")
        target.execute("migrate-incoming", uri=uri)
        wait_for(target.migrated, "the file to be read")
        target.start()
    return {source_name: boot(2), target_name: [*boot(2), *post_init(range(2), "incoming")]}


_SHARED = ",memory-backend=ram,aux-ram-share=on"
_MEMORY = ("-object", "memory-backend-memfd,id=ram,size=64M,share=on")


def cpr_exec(directory: Path, prefix: str) -> Expected:
    """A new QEMU takes the guest over in the same process, with a VM of its own."""
    name = f"{prefix}anew"
    with Guest(directory, name, machine=_SHARED, extra=_MEMORY) as it:
        it.start()
        it.execute_anew(directory)
        it.start()
        it.plug()
    return {name: [*boot(2), *boot(2), *post_init(range(2), "incoming"), *plug(2, "hotplug")]}


def cpr_transfer(directory: Path, prefix: str) -> Expected:
    """A new QEMU on the same host takes the guest over, and its memory as it is."""
    source_name, target_name = f"{prefix}before", f"{prefix}after"
    sockets = {channel: directory / f"{channel}.sock" for channel in ("main", "cpr")}
    channels = [
        {
            "channel-type": channel,
            "addr": {"transport": "socket", "type": "unix", "path": str(path)},
        }
        for channel, path in sockets.items()
    ]

    def successor() -> Guest:
        incoming = (word for channel in channels for word in ("-incoming", json.dumps(channel)))
        return Guest(directory, target_name, machine=_SHARED, extra=(*_MEMORY, *incoming))

    with (
        Guest(directory, source_name, machine=_SHARED, extra=_MEMORY) as source,
        ThreadPoolExecutor() as pool,
    ):
        source.start()
        source.execute("migrate-set-parameters", mode="cpr-transfer")
        starting = pool.submit(copy_context().run, successor)  # answers after it has got the memory
        wait_for(sockets["cpr"].exists, "the new QEMU to listen")
        source.execute("migrate", channels=channels)
        with starting.result() as target:
            wait_for(lambda: source.migrated() and target.migrated(), "the migration's end")
            target.start()
            target.plug()
    return {
        source_name: boot(2),
        target_name: [*boot(2), *post_init(range(2), "incoming"), *plug(2, "hotplug")],
    }


def rebuilt(vcpus: int) -> Places:
    """Each vCPU of the new VM is initialised, and then the state of all vCPUs is written."""
    indexes = range(vcpus)
    inits = [place for v in indexes for place in init(v, "reset", ("get", "set"))]
    return [*inits, *post_init(indexes, "reset")]


def vm_rebuilt_at_reset(directory: Path, prefix: str) -> Expected:
    """QEMU 11 replaces the VM at each reset, as it does for confidential guests.

    The main thread initialises the new vCPUs, and then each one's thread writes its state.
    """
    name = f"{prefix}rebuilt"
    firmware = directory / f"{name}.bin"
    firmware.write_bytes(b"\xf4" * 0x10000)  # hlt: SeaBIOS resets again when it was reset
    machine, extra = ",x-change-vmfd-on-reset=on", ("-bios", str(firmware))
    with Guest(directory, name, machine=machine, extra=extra) as it:
        it.start()
        it.execute("system_reset")
        it.plug()
        it.execute("system_reset")
    return {name: [*boot(2), *rebuilt(2), *plug(2, "hotplug"), *rebuilt(3)]}


_SLOWER = 0.96
"""Times the host's frequency; takes a host that scales."""
_LINES_ARE_READ_S = 1
"""A guest that lives on for this long leaves its lines in a recording."""


def slowed_pinned(directory: Path, prefix: str) -> Expected:
    """A vCPU is plugged into a guest that is pinned 4 % below its host."""
    name = f"{prefix}slowed"
    khz = round(tiny_vmm.host_khz() * _SLOWER)
    with Guest(directory, name, cpu=f"qemu64,tsc-frequency={khz}000") as it:
        it.start()
        it.plug()
        time.sleep(_LINES_ARE_READ_S)
        it.execute("system_reset")
    return {
        name: [
            *boot(2, ("get", "set")),
            *init(2, "hotplug", ("get", "set")),
            *post_init([2], "hotplug"),
        ]
    }


def slowed_migration(directory: Path, prefix: str) -> Expected:
    """A vCPU is plugged into a guest that came from a host 4 % slower."""
    source_name, target_name = f"{prefix}slow-source", f"{prefix}fast-target"
    khz = round(tiny_vmm.host_khz() * _SLOWER)
    with (
        Guest(directory, source_name, cpu=f"qemu64,tsc-frequency={khz}000") as source,
        Guest(directory, target_name, incoming="defer") as target,
    ):
        source.start()
        source.migrate_to(target, directory)
        target.start()
        target.plug()
        time.sleep(_LINES_ARE_READ_S)
    return {
        source_name: boot(2, ("get", "set")),
        target_name: [*boot(2), *post_init(range(2), "incoming"), *plug(2, "hotplug")],
    }


CORE_SCENARIOS: tuple[Scenario, ...] = (
    life,
    one_vcpu,
    loadvm_at_start,
    skewed_migration,
    plugged_before_the_stream,
    interleaved,
    out_of_tolerance,
)
"""These run in the live and in the lab tests."""
_SINCE: dict[Scenario, tuple[int, int]] = {
    snapshot_load: (6, 0),
    mapped_ram: (9, 0),
    cpr_transfer: (10, 0),
    cpr_exec: (10, 2),
    vm_rebuilt_at_reset: (11, 0),
}
"""The first QEMU that has what a scenario needs."""
NEW_SCENARIOS: tuple[Scenario, ...] = tuple(
    scenario for scenario, version in _SINCE.items() if qemu_version() >= version
)
"""Those of them that this machine's QEMU can run."""
VARIANT_SCENARIOS: tuple[Scenario, ...] = (
    preconfig,
    cpus_on_the_command_line,
    sparse_topology,
    without_debug_threads,
    pinned,
    several_at_once,
    multifd,
    postcopy,
    incoming_on_the_command_line,
    failed_incoming,
    cancelled_incoming,
    failed_loadvm,
    unplug_and_replug,
    *NEW_SCENARIOS,
)
"""Other options of QEMU, and failures.  In the lab, which is slow, only the matrix runs them."""
LIVE_SCENARIOS: tuple[Scenario, ...] = (
    *CORE_SCENARIOS,
    *VARIANT_SCENARIOS,
    under_libvirt,
)
"""All that run on this machine's own kernel."""
LAB_SCENARIOS: tuple[Scenario, ...] = (*CORE_SCENARIOS, refused)
"""Those of the lab tests; ``refused`` changes a parameter of the kvm module."""
SCALING_SCENARIOS: tuple[Scenario, ...] = (life, slowed_pinned, slowed_migration)
"""These run in the lab while it scales."""
FTRACE_MAY_MISS_PHASE: tuple[Scenario, ...] = (failed_incoming, cancelled_incoming)
"""QEMU exits right after its last call.  The ftrace source reads from debugfs whether a VM has run;
if the VM is gone by then, the phase of these calls is ``unknown``, and never a wrong one."""


def unknowns(places: Places, expected: Places) -> Optional[int]:
    """Count the calls whose phase is ``unknown`` instead of the expected one.

    :return: None if the calls differ in any other way.
    """
    if len(places) != len(expected):
        return None
    count = 0
    for place, wanted in zip(places, expected):
        if place != wanted:
            call, phase_and_step = wanted.rsplit(" ", 1)
            if place != f"{call} unknown/{phase_and_step.partition('/')[2]}":
                return None
            count += 1
    return count
