"""The VMMs that tscwatch can tell apart: one :class:`Vmm` for each, and the guest it runs.

A VMM is recognised by its executable, and the guest is read from the command line as the VMM
itself reads it.  Pure: :mod:`tscwatch.host.inventory` reads ``/proc``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Callable, NamedTuple, Optional

from tscwatch.model import Guest, Phase, Step

_METRIC = {"": 1, "k": 1_000, "m": 1_000_000, "g": 1_000_000_000, "t": 1_000_000_000_000}
_MAX_LABEL = 200


class Vmm(NamedTuple):
    """What the rest of tscwatch needs to know about one VMM."""

    name: str
    """As in :attr:`Guest.vmm`."""
    executable: re.Pattern[str]
    """Matches the beginning of the executable's name."""
    parse: Callable[[int, str, Sequence[str]], Guest]
    """Returns the guest for a pid, the VMM's name and the arguments after the executable."""
    can_hotplug: bool = False
    """Whether vCPUs can be added to a VM that exists."""
    has_vcpu_threads: bool = False
    """Whether each vCPU has a thread of its own, which makes the vCPU's calls and ends when the
    vCPU is unplugged."""
    is_sandbox: bool = False
    """Its VMs isolate processes of the host.  There is no guest that keeps time, and the sandbox
    plays with the frequency of its vCPUs as it likes."""
    steps: Mapping[str, Step] = {}
    """Functions that a vCPU's thread enters right before a TSC call, with the step of that call."""
    causes: Mapping[str, tuple[Phase, ...]] = {}
    """Functions that the main thread enters some time before, with the phases they lead to."""

    @property
    def functions(self) -> tuple[str, ...]:
        """The functions to put uprobes on, if the executable has symbols."""
        return (*self.steps, *self.causes)

    def confirms(
        self, phase: Phase, step: Step, cause: Optional[str], function: str
    ) -> Optional[bool]:
        """Return whether the VMM's functions confirm a phase and step; None if they prove nothing.

        :param cause: the function of :attr:`causes` entered last, None if none was seen.
        :param function: the function of :attr:`steps` that the call's own thread entered last.
        """
        if step == "unknown":
            return None
        same_phase = cause is None or phase in ("unknown", *self.causes[cause])
        return step == self.steps[function] and same_phase


def identify(pid: int, argv: Sequence[str], comm: str = "", executable: str = "") -> Guest:
    """Return the guest that a process runs.

    The VMM is recognised by the first of these names that is a VMM's:

    1. that of the executable, because only the kernel sets it;
    2. if the executable is a dynamic loader, which runs the program that its command line names
       (``ld.so PROGRAM``): that of the program;
    3. ``argv[0]``, which the caller of execve can choose, but which a renamed executable and an
       emulator in its place keep;
    4. ``comm``, which is cut off after 15 characters, and which the process can change (QEMU's
       ``-name process=``).

    :param argv: as in ``/proc/PID/cmdline``; empty if it could not be read.
    :param comm: the process's name.
    :param executable: the file name of ``/proc/PID/exe``; empty if it could not be read.
    """
    command = argv
    if _LOADER.fullmatch(executable or _file_name(argv)):
        executable, command = "", _loaded(argv)
    names = (executable, _file_name(command), _file_name(argv), comm)
    vmm = next(filter(None, map(of_executable, names)), OTHER)
    label = vmm.name or _label(next(filter(None, names), "unknown"))
    return vmm.parse(pid, label, command[1:])


def _file_name(argv: Sequence[str]) -> str:
    return argv[0].rpartition("/")[2] if argv else ""


_LOADER = re.compile(r"ld([-.].*)?\.so(\.[0-9]+)?")
_LOADER_OPTION = re.compile(
    r"--(library-path|inhibit-rpath|audit|preload|argv0|glibc-hwcaps-(prepend|mask))"
)
"""Its options that have an argument."""


def _loaded(argv: Sequence[str]) -> Sequence[str]:
    """Return the command line of the program that a dynamic loader runs (glibc's ``rtld.c``)."""
    at = 1
    while at < len(argv) and argv[at].startswith("-"):
        at += 2 if _LOADER_OPTION.fullmatch(argv[at]) else 1
    return argv[at:]


def of_executable(name: str) -> Optional[Vmm]:
    """Return the VMM whose executable has this name; None if it is none that is listed here.

    NixOS renames an executable ``.NAME-wrapped``, and puts a script in its place.
    """
    original = re.sub(r"^\.|-wrapped_*$", "", name)
    return next((vmm for vmm in VMMS if vmm.executable.match(original)), None)


def of_guest(guest: Guest) -> Vmm:
    """Return the guest's VMM, :data:`OTHER` if it is not listed here.

    Recordings made before gVisor was listed have the name of its executable.
    """
    listed = _BY_NAME.get(guest.vmm)
    return listed or (GVISOR if GVISOR.executable.match(guest.vmm) else OTHER)


def _qemu_guest(pid: int, vmm: str, arguments: Sequence[str]) -> Guest:
    options = _options(arguments)
    name = _first_value(options.get("name"), "guest")
    return Guest(
        pid=pid,
        vmm=vmm,
        name=_label(name) if name else None,
        uuid=_label(options["uuid"]) if options.get("uuid") else None,
        machine=_label(_first_value(options.get("machine", options.get("M")), "type") or "")
        or None,
        tsc_khz=_tsc_khz(options.get("cpu", "")),
        incoming="incoming" in options,
        max_vcpus=_max_vcpus(options.get("smp") or _smp_of_machine(options)) if arguments else None,
        protected=any(map(_protects_tsc, _values(arguments, "object"))),
    )


def _guest_without_name(pid: int, vmm: str, arguments: Sequence[str]) -> Guest:
    return Guest(pid, vmm, restored="--restore" in arguments)


_COUNT = re.compile(r"[0-9]{1,9}")
_SMP_COUNTS = ("drawers", "books", "sockets", "dies", "clusters", "modules", "cores", "threads")


def _max_vcpus(smp: str) -> Optional[int]:
    """Return for how many vCPUs a machine has room (``machine_parse_smp_config``).

    Without ``maxcpus``, it is the number of vCPUs at the start, else the topology's product.

    :param smp: the value of ``-smp``.
    :returns: None if it cannot be read.
    """
    counts = {key: content or key for key, content in _properties(smp)}
    cpus = _first_value(smp, "cpus")
    if cpus:
        counts["cpus"] = cpus
    if not all(_COUNT.fullmatch(count) for count in counts.values()):
        return None
    numbers = {key: int(count) for key, count in counts.items()}
    product = math.prod(numbers.get(key) or 1 for key in _SMP_COUNTS)
    return numbers.get("maxcpus") or numbers.get("cpus") or product


def _smp_of_machine(options: Mapping[str, str]) -> str:
    """Return what ``-machine`` has of it, in the form of ``-smp``; one vCPU if that is nothing."""
    machine = _properties(options.get("machine", options.get("M", "")))
    counts = [f"{key[4:]}={content}" for key, content in machine if key.startswith("smp.")]
    return ",".join(counts) or "1"


def _protects_tsc(value: str) -> bool:
    """Return whether the value of an ``-object`` takes the guest's TSC out of KVM's hands."""
    properties: Any = dict(_properties(value))
    kind = properties.get("qom-type") or next(iter(properties), "")
    if value.startswith("{"):
        try:
            properties = json.loads(value)
            kind = properties.get("qom-type")
        except (ValueError, RecursionError, AttributeError):
            return False
    is_secure = properties.get("secure-tsc") in ("on", True)
    return kind == "tdx-guest" or (kind == "sev-snp-guest" and is_secure)


def _values(arguments: Sequence[str], option: str) -> Iterator[str]:
    """Yield the value of each occurrence of an option."""
    for argument, following in zip(arguments, arguments[1:]):
        if argument.startswith("-") and argument.lstrip("-") == option:
            yield following


def _options(arguments: Sequence[str]) -> dict[str, str]:
    """Return ``{"name": "guest=a"}``.  QEMU accepts one dash or two; the last of an option wins."""
    options: dict[str, str] = {}
    for argument, following in zip(arguments, (*arguments[1:], "")):
        if argument.startswith("-"):
            options[argument.lstrip("-")] = following
    return options


def _properties(value: str) -> list[tuple[str, str]]:
    """Split a QemuOpts string; a doubled comma stands for a comma (``util/qemu-option.c``)."""
    parts = re.findall(r"(?:[^,]|,,)+", value)
    return [
        (key, content.replace(",,", ","))
        for key, _, content in (part.partition("=") for part in parts)
    ]


def _first_value(value: Optional[str], key: str) -> Optional[str]:
    """Return the value of ``key``, else the first word if it has no key (QEMU's implied option)."""
    properties = _properties(value or "")
    if not properties:
        return None
    for name, content in properties:
        if name == key:
            return content
    name, content = properties[0]
    return None if content else name.replace(",,", ",")


def _tsc_khz(cpu: str) -> Optional[int]:
    """Return the frequency in the value of ``-cpu``, in kHz.

    ``tsc-frequency`` is in hertz, ``tsc-freq`` may have a metric suffix
    (``x86_cpu_parse_featurestr`` and ``x86_cpuid_set_tsc_freq`` in QEMU's ``target/i386/cpu.c``,
    which divides by 1000 and drops the remainder).
    """
    khz = None
    for name, content in _properties(cpu):
        if name in ("tsc-frequency", "tsc-freq", "tsc_freq", "tsc_frequency"):
            match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMgGtT]?)[bB]?", content)
            if match:
                khz = int(float(match[1]) * _METRIC[match[2].lower()]) // 1000
    return khz or None


def _label(text: str) -> str:
    return text[:_MAX_LABEL]


QEMU = Vmm(
    "qemu",
    re.compile(r"(qemu-system-|qemu-kvm|qemu$|kvm(-spice)?$)"),
    _qemu_guest,
    can_hotplug=True,
    has_vcpu_threads=True,
    steps={
        "kvm_arch_init_vcpu": "init",
        "do_kvm_cpu_synchronize_post_init": "post_init",
    },
    causes={
        "qdev_machine_creation_done": ("boot",),
        "qdev_device_add_from_qdict": ("prelaunch", "hotplug"),
        "process_incoming_migration_co": ("incoming",),
        "loadvm_postcopy_handle_run_bh": ("incoming",),
        "load_snapshot": ("loadvm",),
    },
)
CLOUD_HYPERVISOR = Vmm(
    "cloud-hypervisor",
    re.compile(r"cloud-hypervis(or?)?$"),  # a comm has 15 characters
    _guest_without_name,
    can_hotplug=True,
)
FIRECRACKER = Vmm("firecracker", re.compile(r"firecracker$"), _guest_without_name)
GVISOR = Vmm("gvisor", re.compile(r"runsc"), _guest_without_name, is_sandbox=True)
OTHER = Vmm("", re.compile(r"(?!)"), _guest_without_name)  # matches no name
"""A program that is none of these; it may be a throw-away that only probes KVM."""

VMMS = (QEMU, CLOUD_HYPERVISOR, FIRECRACKER, GVISOR)
_BY_NAME = {vmm.name: vmm for vmm in VMMS}
