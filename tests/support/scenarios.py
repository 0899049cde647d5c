"""Lives of real guests, each with the calls that it must bring.

A scenario drives QEMU and gives, for each VM, what QEMU 7.2 does on its vCPUs: the known moment
decides the phase, not tscwatch.  The live tests run them under each source;
``tests/programs/record.py`` keeps recordings of them for the pure tests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Optional

from qemu.qmp import ExecInterruptedError

from tests.support import libvirt, vmm
from tests.support.guests import Guest, make_cooperative, make_disk, wait_for

Places = list[str]
"""``"2 set hotplug/post_init"``: vCPU, operation, phase and step."""
Expected = dict[str, Places]
Scenario = Callable[[Path, str], Expected]
"""Takes a directory and a prefix for the names of its guests."""

_SOCKETS = ",sockets=4,cores=1,threads=1"
TOLERANCE = Path("/sys/module/kvm/parameters/tsc_tolerance_ppm")


def init(vcpu: int, phase: str, ops: Sequence[str] = ("get",)) -> Places:
    return [f"{vcpu} {op} {phase}/init" for op in ops]


def post_init(vcpus: Sequence[int], phase: str) -> Places:
    return [f"{vcpu} {op} {phase}/post_init" for vcpu in vcpus for op in ("get", "set")]


def plug(vcpu: int, phase: str) -> Places:
    return [*init(vcpu, phase), *post_init([vcpu], phase)]


def boot(vcpus: int, ops: Sequence[str] = ("get",)) -> Places:
    """All inits, then the wave of machine completion over all vCPUs."""
    indexes = range(vcpus)
    return [place for v in indexes for place in init(v, "boot", ops)] + post_init(indexes, "boot")


@contextmanager
def guest(directory: Path, name: str, **options: object) -> Iterator[Guest]:
    it = Guest(directory, name, **options)  # type: ignore[arg-type]
    try:
        yield it
    finally:
        it.quit()


def life(directory: Path, prefix: str) -> Expected:
    """Boot, prelaunch, hotplug, reset (which calls nothing) and loadvm."""
    name = f"{prefix}life"
    disk = make_disk(directory / f"{name}.qcow2")
    with guest(directory, name, disk=disk, uuid="6e0b1d3a-5a43-4a4c-9a0e-0d6a4c3f7b11") as it:
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
    """With one vCPU a wave and a single full-state write look alike."""
    name = f"{prefix}single"
    disk = make_disk(directory / f"{name}.qcow2")
    with guest(directory, name, disk=disk, smp=1) as it:
        it.start()
        it.monitor("savevm one")
        it.monitor("loadvm one")
        it.monitor("loadvm one")
    return {name: [*boot(1), *post_init([0], "loadvm"), *post_init([0], "loadvm")]}


def loadvm_at_start(directory: Path, prefix: str) -> Expected:
    """``-loadvm``: a second wave before the VM has ever run."""
    name = f"{prefix}saver"
    disk = make_disk(directory / f"{name}.qcow2")
    with guest(directory, name, disk=disk) as it:
        it.start()
        it.monitor("savevm one")
    again = f"{prefix}loader"
    with guest(directory, again, disk=disk, extra=("-loadvm", "one")) as it:
        it.start()
    return {name: boot(2), again: [*boot(2), *post_init(range(2), "loadvm")]}


@contextmanager
def skewed(directory: Path, prefix: str, uuid: Optional[str] = None) -> Iterator[Guest]:
    """The bug: after a migration, a hotplugged vCPU gets the new host's frequency."""
    source_name, target_name = f"{prefix}source", f"{prefix}target"
    pinned = vmm.host_khz() * 1_000_135 // 1_000_000
    with (
        guest(directory, source_name, cpu=f"qemu64,tsc-frequency={pinned}000", uuid=uuid) as source,
        guest(directory, target_name, incoming="defer", uuid=uuid) as target,
    ):
        source.start()
        source.migrate_to(target, directory)
        target.start()
        target.plug()
        yield target


def skewed_migration(directory: Path, prefix: str) -> Expected:
    """A skew from its beginning to the guests' end."""
    with skewed(directory, prefix):
        pass
    return {
        f"{prefix}source": boot(2, ("get", "set")),
        f"{prefix}target": [*boot(2), *post_init(range(2), "incoming"), *plug(2, "hotplug")],
    }


def plugged_before_the_stream(directory: Path, prefix: str) -> Expected:
    """libvirt's way to migrate a guest with a hotplugged vCPU: device_add under -incoming."""
    source_name, target_name = f"{prefix}from", f"{prefix}to"
    with (
        guest(directory, source_name) as source,
        guest(directory, target_name, incoming="defer") as target,
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
    """Two guests, step by step in turn."""
    a, b = f"{prefix}a", f"{prefix}b"
    with guest(directory, a) as first, guest(directory, b, smp=1) as second:
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
    """QEMU asks twice, sets nothing and exits: no scaling, and the frequency is too far off."""
    name = f"{prefix}withheld"
    Guest.that_fails(directory, name, cpu="qemu64,tsc-frequency=1000000000")
    return {name: init(0, "boot", ("get", "get"))}


def refused(directory: Path, prefix: str) -> Expected:
    """KVM's tolerance lowered below QEMU's own: QEMU dares to set what KVM refuses."""
    name = f"{prefix}refused"
    khz = vmm.host_khz() * 999_900 // 1_000_000
    before = TOLERANCE.read_text()
    TOLERANCE.write_text("50")
    try:
        # Its second GET echoes the refused value, so QEMU believes that it was set.
        with guest(directory, name, smp=1, cpu=f"qemu64,tsc-frequency={khz}000"):
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
    """-preconfig: the vCPUs are made once QMP says so."""
    name = f"{prefix}preconfig"
    with guest(directory, name, extra=("-preconfig",)) as it:
        it.execute("x-exit-preconfig")
        it.start()
    return {name: boot(2)}


def cpus_on_the_command_line(directory: Path, prefix: str) -> Expected:
    """-device: a boot vCPU, however it was asked for."""
    name = f"{prefix}devices"
    device = "qemu64-x86_64-cpu,socket-id=1,core-id=0,thread-id=0,id=extra"
    with guest(directory, name, topology=_SOCKETS, smp=1, extra=("-device", device)) as it:
        it.start()
    return {name: boot(2)}


def sparse_topology(directory: Path, prefix: str) -> Expected:
    """Three cores a socket: KVM's vCPU id is the APIC id, and skips one."""
    name = f"{prefix}sparse"
    topology = ",sockets=2,cores=3,threads=1"
    with guest(directory, name, smp=4, maxcpus=6, topology=topology) as it:
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
    """All threads bear QEMU's own name."""
    name = f"{prefix}plain"
    with guest(directory, name, debug_threads=False) as it:
        it.start()
        it.plug()
    return {name: [*boot(2), *plug(2, "hotplug")]}


def pinned(directory: Path, prefix: str) -> Expected:
    """Every vCPU, the plugged ones too, is set to what the command line says."""
    name = f"{prefix}pinned"
    khz = vmm.host_khz() * 1_000_100 // 1_000_000
    with guest(directory, name, cpu=f"qemu64,tsc-frequency={khz}000") as it:
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
    with guest(directory, name, smp=1, maxcpus=6) as it:
        it.start()
        for _ in range(5):
            it.plug()
    return {name: [*boot(1), *(place for v in range(1, 6) for place in plug(v, "hotplug"))]}


def _migration(
    directory: Path, prefix: str, capabilities: Sequence[str] = (), postcopy: bool = False
) -> Expected:
    with (
        guest(directory, f"{prefix}source") as source,
        guest(directory, f"{prefix}target", incoming="defer") as target,
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
    """The wave comes from a bottom half, before the pages."""
    return _migration(directory, f"{prefix}postcopy-", ("postcopy-ram",), postcopy=True)


def incoming_on_the_command_line(directory: Path, prefix: str) -> Expected:
    uri = f"unix:{directory / 'cmdline.sock'}"
    with (
        guest(directory, f"{prefix}out") as source,
        guest(directory, f"{prefix}in", incoming=uri) as target,
    ):
        source.start()
        source.execute("migrate", uri=uri)
        wait_for(lambda: source.migrated() and target.migrated(), "the migration's end")
    return {
        f"{prefix}out": boot(2),
        f"{prefix}in": [*boot(2), *post_init(range(2), "incoming")],
    }


def failed_incoming(directory: Path, prefix: str) -> Expected:
    """Two pinned frequencies: the load fails in its middle, and QEMU writes what it has."""
    khz = vmm.host_khz()
    cpus = [f"qemu64,tsc-frequency={khz * ppm // 1_000_000}000" for ppm in (1_000_100, 1_000_200)]
    uri = f"unix:{directory / 'failed.sock'}"
    with (
        guest(directory, f"{prefix}sends", cpu=cpus[0]) as source,
        guest(directory, f"{prefix}fails", cpu=cpus[1], incoming="defer") as target,
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
    uri = f"unix:{directory / 'cancelled.sock'}"
    with (
        guest(directory, f"{prefix}cancels") as source,
        guest(directory, f"{prefix}waits", incoming="defer") as target,
    ):
        source.start()
        source.execute("migrate-set-parameters", **{"max-bandwidth": 4096})
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
    """A snapshot of three vCPUs for a machine of two: it fails, and QEMU writes what it has."""
    disk = make_disk(directory / f"{prefix}failed.qcow2")
    with guest(directory, f"{prefix}three", disk=disk, smp=3) as it:
        it.start()
        it.monitor("savevm three")
    with guest(directory, f"{prefix}two", disk=disk) as it:
        it.start()
        it.monitor("loadvm three")
        it.plug()
    return {
        f"{prefix}three": boot(3),
        f"{prefix}two": [*boot(2), *post_init(range(2), "loadvm"), *plug(2, "hotplug")],
    }


def unplug_and_replug(directory: Path, prefix: str) -> Expected:
    """QEMU parks the vCPU's file, and takes it up again on a new thread; in between, a load.

    Some KVMs refuse KVM_SET_CPUID2 on the file that was parked (seen on Linux 6.18): QEMU exits.
    """
    name = f"{prefix}replug"
    disk = make_cooperative(directory / f"{name}.qcow2")
    with guest(directory, name, disk=disk) as it:
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
    """Start, setvcpus --live, managedsave, start; the last is -incoming defer with a device_add."""
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


SCENARIOS: tuple[Scenario, ...] = (
    life,
    one_vcpu,
    loadvm_at_start,
    skewed_migration,
    plugged_before_the_stream,
    interleaved,
    out_of_tolerance,
)
MORE: tuple[Scenario, ...] = (
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
)
"""Those that the lab, which is slow, runs only for the matrix."""
HOST_SCENARIOS: tuple[Scenario, ...] = (*SCENARIOS, *MORE, under_libvirt)
"""All that run on this machine's own kernel."""
ENDS_AT_ONCE: tuple[Scenario, ...] = (failed_incoming, cancelled_incoming)
"""QEMU exits after its last call.  ftrace asks debugfs whether a VM has run, and may come too late:
then a call is unknown, and never anything else."""
LAB_SCENARIOS: tuple[Scenario, ...] = (*SCENARIOS, refused)
"""Those that change a module parameter of KVM's too."""


def unknowns(places: Places, expected: Places) -> Optional[int]:
    """How many calls are unknown where a phase was expected; None where anything else differs."""
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
