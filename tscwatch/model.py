"""The vocabulary: the types that pass from the kernel to the scrape.

A source in :mod:`tscwatch.capture` yields an :class:`Event` for each thing that it sees.
:mod:`tscwatch.analysis.attribute` turns events into facts, above all into a :class:`Call` with its
lifecycle phase and step.  :mod:`tscwatch.analysis.judge` turns facts into findings: the state of
each vCPU, and every :class:`Mismatch` that begins, changes or ends.  :mod:`tscwatch.publish` shows
facts and findings and derives nothing from them.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Optional, Union, get_args

Op = Literal[
    "vm_create",  # a VM was created while tscwatch was running
    "vm_found",  # a VM that is older than tscwatch
    "vm_started",  # KVM_SET_CLOCK: QEMU's vm_start (kvmclock_vm_state_change)
    "vm_end",
    "vcpu_create",
    "vcpu_found",  # a vCPU that is older than tscwatch
    "vcpu_setup",  # the first cold command on a vCPU that is going to run
    "vcpu_unplugged",  # its thread has ended; QEMU keeps ("parks") its file descriptor
    "get",  # KVM_GET_TSC_KHZ
    "set",  # KVM_SET_TSC_KHZ
    "tsc_tracked",  # kvm_track_tsc: KVM compared a vCPU's TSC, just written, with the others'
    "clock_updated",  # kvm_update_master_clock
    "tsc_lines",  # the offsets and ratios of a VM's vCPUs were read from the kernel
    "entered",  # QEMU entered a function that a uprobe sits on
    "lost",  # the source lost events before this one
]
After = Literal["create", "cpuid", "sregs", "regs"]
Phase = Literal["boot", "prelaunch", "hotplug", "reset", "incoming", "loadvm", "probe", "unknown"]
Step = Literal["init", "post_init", "unknown"]
Kind = Literal[
    "desync",
    "vcpu_skew",
    "refused",
    "withheld",
    "configured",
    "readback",
    "unscaled",
    "changed",
]
Change = Literal["raised", "updated", "cleared"]
Severity = Literal["info", "warning", "critical"]
Scope = Literal["vcpu", "vm"]
Claim = Literal["desync", "no_desync", "phase"]
Limited = Literal["vm", "vcpu"]
Platform = Literal["kubevirt", "openstack", "proxmox", "firecracker"]
SourceName = Literal["auto", "bcc", "ftrace"]
PerVcpu = Literal["all", "differing", "none"]

PHASES: tuple[Phase, ...] = get_args(Phase)
STEPS: tuple[Step, ...] = get_args(Step)
KINDS: tuple[Kind, ...] = get_args(Kind)
SEVERITIES: tuple[Severity, ...] = get_args(Severity)
SCOPES: tuple[Scope, ...] = get_args(Scope)
CLAIMS: tuple[Claim, ...] = get_args(Claim)
LIMITED: tuple[Limited, ...] = get_args(Limited)
PLATFORMS: tuple[Platform, ...] = get_args(Platform)

VM_SCOPE = -1
"""Stands among a VM's vCPUs for the VM itself, whose frequency is its later vCPUs' default."""
KVM_TOLERANCE_PPM = 250
"""Default of the module parameter ``kvm.tsc_tolerance_ppm``."""
TSC_CLOCKSOURCES = ("tsc", "hyperv_clocksource_tsc_page")
"""The kernel's clocksources that are the TSC to KVM (``gtod_is_based_on_tsc``)."""
SECONDS_A_DAY = 86_400


class Host(NamedTuple):
    """What decides at which frequency this host's guests tick."""

    tsc_khz: Optional[int] = None
    """The kernel's ``tsc_khz``; None if KVM is not there to report it."""
    scaling: Optional[bool] = None
    """The hardware scales a guest's TSC (``KVM_CAP_TSC_CONTROL``)."""
    kvm_tolerance_ppm: int = KVM_TOLERANCE_PPM
    """KVM accepts a frequency within this distance of ``tsc_khz`` and does not scale
    (``kvm_set_tsc_khz``)."""
    clocksource: str = ""
    """The kernel's clocksource; KVM's master clock needs ``tsc``."""
    stable: bool = True
    """The kernel considers its own TSC stable.  If not, KVM moves a vCPU's offset whenever the
    vCPU is loaded (``kvm_arch_vcpu_load``), and no line can be believed."""
    shows_lines: bool = False
    """KVM's debugfs can be read, and has the line of each vCPU: ``tsc_lines`` will come."""


class Owner(NamedTuple):
    """Whose guest a VM is, in the platform's own names; empty if the platform has no such name."""

    platform: Platform
    namespace: str = ""
    """KubeVirt's namespace."""
    name: str = ""
    """The VMI, the instance's display name, or the microVM's id."""
    project: str = ""
    """Nova's project."""
    vmid: str = ""
    """Proxmox' VMID."""
    flavor: str = ""
    """Nova's flavor, which is no label of a metric."""

    def facts(self) -> dict[str, str]:
        """Return what is not empty, by its name."""
        return {name: value for name, value in self._asdict().items() if value}


class Guest(NamedTuple):
    """The identity of a VM, from its process's command line."""

    pid: int
    vmm: str
    """The name of one of :data:`tscwatch.vmm.VMMS`, else the executable's name."""
    name: Optional[str] = None
    uuid: Optional[str] = None
    machine: Optional[str] = None
    tsc_khz: Optional[int] = None
    """``tsc-frequency`` of the command line, in kHz."""
    incoming: bool = False
    """Started with ``-incoming``; stays true for the life of the process."""
    restored: bool = False
    """Started from a snapshot (Cloud Hypervisor's ``--restore``)."""
    max_vcpus: Optional[int] = None
    """How many vCPUs the machine has room for (QEMU's ``-smp``); None if not known."""
    protected: bool = False
    """Its TSC is out of KVM's hands (TDX, SEV-SNP Secure TSC)."""
    vmid: Optional[str] = None
    """The VM's number in Proxmox VE, whose QEMU has an option for it (``-id``)."""
    owner: Optional[Owner] = None
    """None if not known; as it was when the VM was first seen."""


class Line(NamedTuple):
    """Which value a vCPU's TSC has: the host's TSC times the ratio, plus the offset."""

    vcpu: int
    offset: int
    """In cycles (``vcpu->arch.l1_tsc_offset``)."""
    ratio: float = 1.0
    """The scaling ratio; 1.0 where KVM does not scale."""


class Event(NamedTuple):
    """One thing that a source saw.  Events come in the order in which they happened."""

    ts: int
    """Unix time in nanoseconds, derived from CLOCK_MONOTONIC: it never steps back."""
    op: Op
    vm: str
    """The VM's identity in the kernel: opaque, and unique while the VM lives.  Empty if only the
    process and the thread are known."""
    pid: int
    tid: int
    comm: str
    vcpu: Optional[int] = None
    """KVM's ``vcpu_id``, on x86 the APIC id; None for an operation on the VM itself."""
    khz: Optional[int] = None
    """The argument of a ``set`` (0 means the host's frequency), the result of a ``get`` that
    succeeded, or what KVM reports for a ``vcpu_found``."""
    status: int = 0
    """0 or -errno of a ``get`` or ``set``."""
    lost_events: int = 0
    """How many events a ``lost`` stands for; of one process, if ``pid`` is not 0."""
    matched_vcpus: int = 0
    """``nr_vcpus_matched_tsc`` of a ``tsc_tracked``: the vCPUs whose TSCs match that of the first
    vCPU in their generation, which is not counted itself."""
    online_vcpus: int = 0
    """``online_vcpus`` of a ``tsc_tracked``."""
    after: Optional[After] = None
    """The last cold command on this vCPU before the call; None if it was not seen."""
    sync: int = 0
    """How many writes of special registers this vCPU has seen: distinguishes one full-state
    write from the next."""
    runner: Optional[int] = None
    """The thread of this vCPU's last ``KVM_RUN`` (``vcpu->pid``); 0: it has never run; None: not
    known."""
    ran: Optional[bool] = None
    """Whether the VM has run; None if the source cannot determine it."""
    fd: Optional[int] = None
    """The VM's file descriptor in its process, if known; for a ``vcpu_found`` the vCPU's."""
    guest: Optional[Guest] = None
    lines: tuple[Line, ...] = ()
    """Of a ``tsc_lines``: the vCPUs that could be read, in ascending order."""
    host_tsc: Optional[int] = None
    """The host's TSC when the lines were read; None if not known or not needed, because all ratios
    are equal."""
    master_clock: Optional[bool] = None
    """``use_master_clock`` of a ``tsc_tracked`` or a ``clock_updated``."""
    function: Optional[str] = None
    """The function of an ``entered``."""

    @classmethod
    def lost(cls, ts: int, events: int) -> Event:
        """Return the event for ``events`` lost ones whose process is not known."""
        return cls(ts, "lost", "", 0, 0, "", lost_events=events)

    @classmethod
    def vm_ended(cls, ts: int, vm: str, pid: int) -> Event:
        """Return the event for the end of a VM that no probe reported."""
        return cls(ts, "vm_end", vm, pid, 0, "")

    @classmethod
    def vcpu_unplugged(cls, ts: int, vm: str, pid: int, tid: int, vcpu: int) -> Event:
        """Return the event for a vCPU whose thread has ended while its VM lives on."""
        return cls(ts, "vcpu_unplugged", vm, pid, tid, "", vcpu)


class Call(NamedTuple):
    """A KVM_GET_TSC_KHZ or KVM_SET_TSC_KHZ with its place in the VM's life."""

    event: Event
    vm: str
    """The VM's label: unique on the host."""
    guest: Guest
    phase: Phase
    step: Step
    evidence: tuple[str, ...]
    tracked: bool = True
    """False if a limit was reached: the call is logged and counted, but not judged."""
    block: int = 0
    """Calls of one run of QEMU's ``kvm_arch_set_tsc_khz`` on a vCPU share this number."""
    write_round: int = 0
    """How many times QEMU has begun to write the full state of all vCPUs."""
    vcpu_written: bool = True
    """This vCPU's frequency will not be written again in the same round or plug."""
    all_written: bool = True
    """No vCPU of the VM is still to be written."""

    @property
    def khz(self) -> Optional[int]:
        """The argument of a ``set``, or the result of a ``get``; None if the ``get`` failed."""
        return self.event.khz

    @property
    def status(self) -> int:
        """0 or -errno."""
        return self.event.status

    @property
    def target(self) -> int:
        """The vCPU's id, or :data:`VM_SCOPE` for a call on the VM."""
        return VM_SCOPE if self.event.vcpu is None else self.event.vcpu

    @property
    def scope(self) -> Scope:
        """``vm`` for a call on the VM, whose frequency is its later vCPUs' default."""
        return "vm" if self.event.vcpu is None else "vcpu"


class VmSeen(NamedTuple):
    """A VM that is more than a probe."""

    vm: str
    guest: Guest


class VcpuFound(NamedTuple):
    """A vCPU that is older than tscwatch, and the frequency that KVM reports for it."""

    ts: int
    vm: str
    guest: Guest
    vcpu: int
    khz: int
    present: int = 0
    """How many vCPUs the VM has."""


class VcpuPlugged(NamedTuple):
    """A vCPU is being added to a complete machine; its first call is still to come."""

    ts: int
    vm: str
    guest: Guest
    all_written: bool
    """See :class:`Call`."""


class VcpuUnplugged(NamedTuple):
    """A vCPU was unplugged; QEMU may plug it again."""

    ts: int
    vm: str
    guest: Guest
    vcpu: int
    all_written: bool
    """See :class:`Call`."""


class VmStarted(NamedTuple):
    """A VM starts or resumes: a load or a reset is over, also for vCPUs that were not written."""

    ts: int
    vm: str
    guest: Guest


class KvmTscState(NamedTuple):
    """KVM's own view of a VM's TSCs, from ``kvm_track_tsc`` and ``kvm_update_master_clock``."""

    ts: int
    vm: str
    guest: Guest
    vcpu: Optional[int]
    """The vCPU whose TSC has just been written; None if only the clock was updated."""
    synchronised: Optional[int]
    """How many vCPUs KVM considers synchronised; None if it has not compared them yet."""
    online: Optional[int]
    """How many vCPUs KVM compared."""
    master_clock: bool

    @property
    def text(self) -> str:
        """A clause for a sentence."""
        return (
            f"KVM considers {self.synchronised} of {self.online} vCPUs synchronised and its master "
            f"clock is {'on' if self.master_clock else 'off'}"
        )


class TscLines(NamedTuple):
    """The lines of a VM's vCPUs, as the kernel held them at one moment."""

    ts: int
    vm: str
    guest: Guest
    lines: tuple[Line, ...]
    host_tsc: Optional[int]
    """See :class:`Event`."""


class Contradiction(NamedTuple):
    """tscwatch and KVM, or tscwatch and QEMU's own functions, disagree about a VM."""

    ts: int
    vm: str
    guest: Guest
    claim: Claim
    """tscwatch's side."""
    detail: str


class VmEnded(NamedTuple):
    """A VM that was seen has ended."""

    vm: str
    ts: int


class Dropped(NamedTuple):
    """A VM or a vCPU that is not tracked because a limit was reached."""

    what: Limited


Fact = Union[
    Call,
    VmSeen,
    VcpuFound,
    VcpuPlugged,
    VcpuUnplugged,
    VmStarted,
    KvmTscState,
    TscLines,
    Contradiction,
    VmEnded,
    Dropped,
]


class VcpuState(NamedTuple):
    """The frequencies of a vCPU in kHz, each None while it is not known, and its last call."""

    vm: str
    vcpu: int
    requested: Optional[int] = None
    """The last KVM_SET_TSC_KHZ that succeeded."""
    reported: Optional[int] = None
    """What KVM_GET_TSC_KHZ would return now."""
    effective: Optional[int] = None
    """What the vCPU's TSC ticks at; None in KVM's catch-up mode."""
    phase: Optional[Phase] = None
    step: Optional[Step] = None


class TscSpread(NamedTuple):
    """How far apart the TSCs of a VM's vCPUs are now; None if that is not known."""

    ts: int
    vm: str
    seconds: Optional[float]
    rate_ppm: Optional[float]
    """How far their rates are apart."""
    lags: tuple[tuple[int, float], ...] = ()
    """The vCPUs that are off, and by how many seconds each is behind most others."""


class Mismatch(NamedTuple):
    """A mismatch that begins, changes or ends."""

    ts: int
    state: Change
    kind: Kind
    vm: str
    guest: Guest
    vcpus: tuple[int, ...]
    ppm: Optional[float]
    """How far rates are off; None if not known, or if the kind is not about rates."""
    severity: Severity
    phase: Phase
    """The phase of the call that caused it."""
    detail: str
    requested_ppm: Optional[float] = None
    """Of a ``vcpu_skew``: how far the requested frequencies differ."""
    apart_seconds: Optional[float] = None
    """Of a ``desync``: how far the TSCs are apart; None if not known."""
    kvm_state: Optional[KvmTscState] = None
    """KVM's view of the VM; None until KVM has compared its TSCs."""

    @property
    def full_detail(self) -> str:
        """The detail, followed by KVM's view."""
        return self.detail if self.kvm_state is None else f"{self.detail}; {self.kvm_state.text}"

    @property
    def seconds_a_day(self) -> Optional[float]:
        """How far two clocks that differ by ``ppm`` drift apart in a day."""
        return None if self.ppm is None else self.ppm * SECONDS_A_DAY / 1e6


class Risk(NamedTuple):
    """Whether a vCPU plugged into a VM now would start at another frequency than the others."""

    ts: int
    vm: str
    guest: Guest
    at_risk: bool
    detail: str

    @property
    def state(self) -> Change:
        """As for a mismatch."""
        return "raised" if self.at_risk else "cleared"


Finding = Union[Mismatch, VcpuState, TscSpread, Risk, Contradiction]
Item = Union[Host, Fact, Finding]
"""What the pipeline yields."""


class SourceInfo(NamedTuple):
    """How a source sees the calls."""

    source: str
    attach: str
    function: str
    program: str = ""
    """Where the bytecode of a BPF program comes from: ``packaged``, ``stored`` or ``compiled``."""

    @property
    def text(self) -> str:
        """As in ``bcc, kprobe on kvm_vcpu_ioctl (packaged bytecode)``."""
        bytecode = f" ({self.program} bytecode)" if self.program else ""
        return f"{self.source}, {self.attach} on {self.function}{bytecode}"


@dataclass
class Health:
    """The state of a source; counts only rise."""

    probes: dict[str, bool] = field(default_factory=dict)
    """Attached or not, by the probe's name."""
    sent: int = 0
    """Events that the kernel program sent."""
    received: int = 0
    lost: dict[tuple[str, str], int] = field(default_factory=dict)
    """By (stage, reason)."""
    foreign: int = 0
    """Calls by a process other than the VM's, which KVM refuses with EIO; they are no events."""
    skipped: int = 0
    """Runs of BPF programs that the kernel skipped, as another program was active on their CPU."""


ERRORS = ("EINVAL", "EIO", "EINTR", "ENOTTY", "EPERM", "EBADF", "other")
"""How the two calls can fail: the errors of ``kvm_vcpu_ioctl``, ``kvm_arch_vcpu_ioctl`` and the
ioctl syscall.  A closed list, because the names are values of a metric's label."""


def duration(seconds: float) -> str:
    """Return a length of time with its unit, as in ``9.1 s`` or ``30.0 days``."""
    for unit, length in (("days", 86_400.0), ("h", 3600.0), ("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds * 1e9:.0f} ns"


def errno_name(status: int) -> str:
    """Return ``ok`` or the errno's name, from :data:`ERRORS`.

    :param status: 0 or -errno.
    """
    if status >= 0:
        return "ok"
    name = errno.errorcode.get(-status, "")
    return name if name in ERRORS else "other"
