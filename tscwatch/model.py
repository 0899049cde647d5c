"""The vocabulary: what travels from the kernel to the scrape.

An :class:`Event` is what a source captured; :mod:`tscwatch.attribute` turns it into a
:class:`Call` with its phase and step; :mod:`tscwatch.judge` turns calls into
:class:`Mismatch` changes; everything after that only shows them.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Optional, Union, get_args

Op = Literal[
    "vm_create",  # a VM was made while we watched
    "vm_found",  # a VM that was there before us
    "vm_started",  # KVM_SET_CLOCK: QEMU's vm_start (kvmclock_vm_state_change)
    "vm_end",
    "vcpu_create",
    "vcpu_found",
    "vcpu_setup",  # the first thing done to a vCPU that is meant to run
    "vcpu_unplugged",  # its thread is gone; QEMU keeps (parks) its file
    "get",  # KVM_GET_TSC_KHZ
    "set",  # KVM_SET_TSC_KHZ
    "tsc_tracked",  # kvm_track_tsc: KVM compared a vCPU's TSC, just written, with the others'
    "clock_updated",  # kvm_update_master_clock
    "entered",  # a function of QEMU's, where its executable has symbols
    "lost",  # the source lost ``arg`` events before this one; of a process, where it knows
]
After = Literal["create", "cpuid", "sregs", "regs"]
Phase = Literal["boot", "prelaunch", "hotplug", "incoming", "loadvm", "probe", "unknown"]
Step = Literal["init", "post_init", "unknown"]
Kind = Literal["refused", "withheld", "vcpu_skew", "configured", "readback", "unscaled", "changed"]
State = Literal["raised", "updated", "cleared"]
Severity = Literal["warning", "critical"]
Scope = Literal["vcpu", "vm"]
SourceName = Literal["auto", "bcc", "ftrace"]
Claim = Literal["vcpu_skew", "no_vcpu_skew", "phase"]

OPS: tuple[Op, ...] = get_args(Op)
AFTERS: tuple[After, ...] = get_args(After)
PHASES: tuple[Phase, ...] = get_args(Phase)
STEPS: tuple[Step, ...] = get_args(Step)
KINDS: tuple[Kind, ...] = get_args(Kind)
SCOPES: tuple[Scope, ...] = get_args(Scope)
CLAIMS: tuple[Claim, ...] = get_args(Claim)

KVM_TOLERANCE_PPM = 250
"""Default of the module parameter ``kvm.tsc_tolerance_ppm``."""
SECONDS_A_DAY = 86_400


class Host(NamedTuple):
    """What decides the frequency that a guest of this host really gets."""

    tsc_khz: Optional[int] = None
    """The kernel's ``tsc_khz``; None where KVM is not there to say it."""
    scaling: Optional[bool] = None
    """The hardware scales a guest's TSC (``KVM_CAP_TSC_CONTROL``)."""
    kvm_tolerance_ppm: int = KVM_TOLERANCE_PPM
    """Inside it KVM takes a frequency and does not scale (``kvm_set_tsc_khz``)."""
    clocksource: str = ""
    """The kernel's own clock; KVM needs ``tsc`` for its master clock."""


class Guest(NamedTuple):
    """Who a VM is, as its process says."""

    pid: int
    vmm: str
    """``qemu``, or the executable's name."""
    name: Optional[str] = None
    uuid: Optional[str] = None
    machine: Optional[str] = None
    tsc_khz: Optional[int] = None
    """What the command line's ``tsc-frequency`` asks for, in kHz."""
    incoming: bool = False
    """Started with ``-incoming``; true for the process's whole life."""
    restored: bool = False
    """Started from a snapshot (Cloud Hypervisor's ``--restore``)."""


class Event(NamedTuple):
    """One thing a source saw, in the order in which it happened."""

    ts: int
    """Unix time in nanoseconds, from the monotonic clock: it never steps back."""
    op: Op
    vm: str
    """The VM's identity in the kernel. Opaque; unique while the VM lives; empty where only the
    process and its thread are known."""
    pid: int
    tid: int
    comm: str
    vcpu: Optional[int] = None
    """KVM's ``vcpu_id`` (on x86 the APIC id); None for what is done to the VM itself."""
    arg: int = 0
    """kHz that a ``set`` asked for; the count of a ``lost``; how many vCPUs match the first one
    of a ``tsc_tracked`` (``nr_vcpus_matched_tsc``)."""
    result: int = 0
    """kHz or -errno of a ``get``; 0 or -errno of a ``set``; kHz of a ``vcpu_found``, or 0; the
    ``online_vcpus`` of a ``tsc_tracked``."""
    after: Optional[After] = None
    """The last cold command on this vCPU before the call; None where it was not seen."""
    sync: int = 0
    """How many writes of special registers this vCPU has seen: tells one write from the next."""
    runner: Optional[int] = None
    """The thread of this vCPU's last ``KVM_RUN`` (``vcpu->pid``); 0: never; None: not known."""
    ran: Optional[bool] = None
    """Whether the VM has run; None: the source cannot tell."""
    fd: Optional[int] = None
    """The VM's file descriptor in its process, where known; of a ``vcpu_found`` the vCPU's."""
    guest: Optional[Guest] = None
    scale: Optional[float] = None
    """The vCPU's ``tsc-scaling-ratio`` over 2^frac-bits; None where the host does not scale."""
    master_clock: Optional[bool] = None
    """KVM uses its master clock for the VM, as a ``tsc_tracked`` or a ``clock_updated`` says."""
    function: Optional[str] = None
    """What was ``entered``."""


class Call(NamedTuple):
    """A TSC call with its place in the VM's life."""

    event: Event
    vm: str
    """The VM's label: unique on the host."""
    guest: Guest
    phase: Phase
    step: Step
    evidence: tuple[str, ...]
    tracked: bool = True
    """False past the limits: shown and counted, not judged."""
    block: int = 0
    """Calls of one run of QEMU's ``kvm_arch_set_tsc_khz`` on a vCPU share this number."""
    wave: int = 0
    """How many times a whole-VM state write has begun."""
    vcpu_written: bool = True
    """This vCPU's frequency is not about to be written again in the same wave or plug."""
    whole: bool = True
    """No vCPU of the VM is still to be written."""

    @property
    def khz(self) -> Optional[int]:
        """What a ``set`` asked for, or what a ``get`` returned; None where it failed."""
        if self.event.op == "set":
            return self.event.arg
        return self.event.result if self.event.result >= 0 else None

    @property
    def status(self) -> int:
        """0 or -errno."""
        return min(self.event.result, 0)

    @property
    def scope(self) -> Scope:
        """``vm``: the default of the vCPUs to come (``KVM_CAP_VM_TSC_CONTROL``)."""
        return "vm" if self.event.vcpu is None else "vcpu"


class VmSeen(NamedTuple):
    """A VM that is more than a probe."""

    vm: str
    guest: Guest


class VcpuFound(NamedTuple):
    """A vCPU that was there before us, and what KVM reports for it."""

    ts: int
    vm: str
    guest: Guest
    vcpu: int
    khz: int


class VcpuUnplugged(NamedTuple):
    """A vCPU that its guest has no more; QEMU may plug it again."""

    ts: int
    vm: str
    guest: Guest
    vcpu: int
    whole: bool
    """As a :class:`Call`'s."""


class VmStarted(NamedTuple):
    """A VM runs on: whatever load there was is over, also for vCPUs that it did not reach."""

    ts: int
    vm: str
    guest: Guest


class KvmTscState(NamedTuple):
    """What KVM itself holds of a VM's TSCs."""

    ts: int
    vm: str
    guest: Guest
    vcpu: Optional[int]
    """Whose TSC was written just now; None: only the clock changed."""
    synchronised: Optional[int]
    """vCPUs whose TSCs KVM takes for one; None where it did not compare them."""
    online: Optional[int]
    """vCPUs that there are."""
    master_clock: bool

    @property
    def text(self) -> str:
        """As part of a sentence."""
        return (
            f"KVM takes {self.synchronised} of {self.online} vCPUs for synchronised, its master "
            f"clock is {'on' if self.master_clock else 'off'}"
        )


class Contradiction(NamedTuple):
    """We say one thing of a VM, and who should know says another."""

    ts: int
    vm: str
    guest: Guest
    claim: Claim
    """What we say."""
    detail: str


class VmEnded(NamedTuple):
    """A VM that was seen is gone."""

    vm: str
    ts: int


class Dropped(NamedTuple):
    """A VM or a vCPU past the limits."""

    what: Literal["vm", "vcpu"]


Fact = Union[
    Call, VmSeen, VcpuFound, VcpuUnplugged, VmStarted, KvmTscState, Contradiction, VmEnded, Dropped
]


class Mismatch(NamedTuple):
    """A mismatch that begins, changes or is over."""

    ts: int
    state: State
    kind: Kind
    vm: str
    guest: Guest
    vcpus: tuple[int, ...]
    ppm: Optional[float]
    """Size; None where the frequency that was wanted is not known."""
    severity: Severity
    phase: Phase
    """Of the call that brought it in."""
    detail: str
    verdict: Optional[KvmTscState] = None
    """What KVM holds of the VM, where it has said so."""

    @property
    def whole_detail(self) -> str:
        """The detail, and KVM's word on it."""
        return self.detail if self.verdict is None else f"{self.detail}; {self.verdict.text}"

    @property
    def seconds_a_day(self) -> Optional[float]:
        """How far two clocks that differ so much are apart after a day."""
        return None if self.ppm is None else self.ppm * SECONDS_A_DAY / 1e6


class Effective(NamedTuple):
    """What a vCPU's TSC really ticks at."""

    vm: str
    vcpu: int
    khz: Optional[int]
    """None: not known, as in KVM's catch-up mode."""


class Risk(NamedTuple):
    """Whether a VM's next hotplugged vCPU would tick differently, before it happens."""

    ts: int
    vm: str
    guest: Guest
    at_risk: bool
    detail: str

    @property
    def state(self) -> State:
        """As a mismatch's."""
        return "raised" if self.at_risk else "cleared"


Finding = Union[Mismatch, Effective, Risk, Contradiction]
Item = Union[Host, Fact, Finding]
"""What the pipeline makes of events."""


class SourceInfo(NamedTuple):
    """How a source sees the calls."""

    source: str
    attach: str
    function: str


@dataclass
class Health:
    """What a source knows of itself; counts only rise."""

    probes: dict[str, bool] = field(default_factory=dict)
    """Attached or not, by the probe's name."""
    sent: int = 0
    """Events that left the kernel."""
    received: int = 0
    lost: dict[tuple[str, str], int] = field(default_factory=dict)
    """By (stage, reason)."""


def errno_name(status: int) -> str:
    """``ok`` or the errno's name, from a bounded list (it is a metric's label).

    The list is what ``kvm_vcpu_ioctl`` and ``kvm_arch_vcpu_ioctl`` can return for the two
    calls, and what the syscall layer adds.
    """
    if status >= 0:
        return "ok"
    name = errno.errorcode.get(-status, "")
    return name if name in RESULTS else "other"


RESULTS = ("ok", "EINVAL", "EIO", "EINTR", "ENOTTY", "EPERM", "EBADF", "other")
