"""The VMMs that tscwatch can tell apart: one :class:`Vmm` for each, and the guest it runs.

A VMM is recognised by its executable, and the guest is read from the command line as the VMM
itself reads it.  Pure: :mod:`tscwatch.host.inventory` reads ``/proc``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Callable, NamedTuple, Optional

from tscwatch.model import Guest, Phase, Step

ReadConfig = Callable[[str], Optional[str]]

_MAX_LABEL = 200


class Vmm(NamedTuple):
    """What the rest of tscwatch needs to know about one VMM."""

    name: str
    """As in :attr:`Guest.vmm`."""
    executable: re.Pattern[str]
    """Matches the beginning of the executable's name."""
    parse: Callable[[int, str, Sequence[str], ReadConfig], Guest]
    """Returns the guest for a pid, the VMM's name, the arguments after the executable, and the
    function that reads the configuration files they name."""
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


def identify(
    pid: int,
    argv: Sequence[str],
    comm: str = "",
    executable: str = "",
    read_config: ReadConfig = lambda path: None,
) -> Guest:
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
    :param read_config: returns the text of a configuration file that the command line names, None
        if it cannot be read.
    """
    command = argv
    if _LOADER.fullmatch(executable or _file_name(argv)):
        executable, command = "", _loaded(argv)
    names = (executable, _file_name(command), _file_name(argv), comm)
    vmm = next(filter(None, map(of_executable, names)), OTHER)
    label = vmm.name or _label(next(filter(None, names), "unknown"))
    return vmm.parse(pid, label, command[1:], read_config)


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


def _qemu_guest(pid: int, vmm: str, arguments: Sequence[str], read_config: ReadConfig) -> Guest:
    options = list(qemu_options(arguments))
    last = dict(options)
    groups = list(_groups(options, read_config))
    machine = _merged(groups, "machine")
    return Guest(
        pid=pid,
        vmm=vmm,
        name=_label(_merged(groups, "name").get("guest", "")) or None,
        uuid=_label(_merged(groups, "uuid").get("uuid", "").lower()) or None,
        machine=_label(machine.get("type", "")) or None,
        tsc_khz=_tsc_khz(last.get("cpu", ""), _all(groups, "global")),
        incoming="incoming" in last,
        max_vcpus=_max_vcpus(machine) if arguments and not _all(groups, _UNREAD) else None,
        protected=any(map(_protects_tsc, _all(groups, "object"))),
        vmid=_label(last.get("id", "")) or None,
    )


def _guest_without_name(
    pid: int, vmm: str, arguments: Sequence[str], read_config: ReadConfig
) -> Guest:
    return Guest(pid, vmm, restored="--restore" in arguments)


_FLAG = re.compile(
    r"""S|s|h|help|version|usb|snapshot|preconfig|daemonize|nographic|curses|sdl|portrait
    |(alt|ctrl)-grab|full-screen|show-cursor|no-(frame|quit|reboot|shutdown|acpi|hpet|fd-bootchk)
    |enable-(kvm|hax|fips|sync-profile)|no-kvm(-irqchip|-pit|-pit-reinjection)?
    |no-user-config|nodefaults|nodefconfig|only-migratable|mem-prealloc|async-teardown|audio-help
    |singlestep|semihosting|old-param|localtime|rtc-td-hack|tdf|win2k-hack|virtfs_synth
    |perfmap|jitdump|xen-(attach|create|domid-restrict)""",
    re.VERBOSE,
)
"""QEMU's options that have no argument, from release 1.3 to 11.1.

They are the entries ``DEF("name", 0, ...)`` in ``qemu-options.hx``.  No option has an argument in
one of these releases and none in another.
"""


def qemu_options(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield each option and its argument (``lookup_opt`` in QEMU's ``softmmu/vl.c``).

    An option has one dash or two.  An argument can begin with a dash.  What follows neither an
    option nor the argument of one is a disk image.
    """
    rest = iter(arguments)
    for argument in rest:
        if argument.startswith("-"):
            name = argument[2:] if argument.startswith("--") else argument[1:]
            yield name, "" if _FLAG.fullmatch(name) else next(rest, "")


Group = tuple[str, Mapping[str, str]]
"""The name of a group of options, and the properties that one option adds to it."""

_IMPLIED = {
    "name": "guest",
    "machine": "type",
    "M": "type",
    "smp": "cpus",
    "object": "qom-type",
    "smbios": "",
}
"""Options whose argument is QemuOpts, and the key of a first property that has none."""
_JSON = ("object", "machine", "M")
"""Those whose argument can be JSON; QEMU has that for ``-machine`` not yet (``softmmu/vl.c``)."""
_MAX_CONFIGS = 4
_UNREAD = "unread"
"""The group of what is in a configuration file that could not be read."""


def _groups(options: Iterable[tuple[str, str]], read_config: ReadConfig) -> Iterator[Group]:
    """Yield what each option, or each section of a configuration file, adds to its group.

    The order is that of the command line: the last value of a property counts.
    """
    configs = 0
    for option, value in options:
        if option == "readconfig":
            configs += 1
            text = read_config(value) if configs <= _MAX_CONFIGS else None
            yield from _sections(text) if text is not None else [(_UNREAD, {})]
        elif option == "global":
            yield "global", _global(value)
        elif option == "uuid":
            yield "uuid", {"uuid": value}
        elif option in _IMPLIED:
            is_json = value.startswith("{") and option in _JSON
            properties = (
                _json_properties(value) if is_json else _properties(value, _IMPLIED[option])
            )
            yield from _group(option, properties)


def _group(name: str, properties: Mapping[str, str]) -> Iterator[Group]:
    """Yield the properties of an option or a section in the group where QEMU puts them."""
    if name in ("smp", "smp-opts"):  # machine_parse_property_opt, qemu_record_config_group
        yield "machine", {f"smp.{key}": content for key, content in properties.items()}
    elif name == "M":
        yield "machine", properties
    elif name == "smbios":  # smbios_entry_add: it sets the variable that -uuid sets
        yield "uuid", properties
    else:
        yield name, properties


def _sections(text: str) -> Iterator[Group]:
    """Yield the sections of a configuration file (``qemu_config_foreach``).

    A UUID in a section ``smbios`` has no effect.
    """
    sections: list[tuple[str, dict[str, str]]] = []
    for line in text.split("\n"):
        header = re.match(r"\[([^\]\s]+)", line)
        entry = re.match(r'\s*([^\s=#]+)\s*=\s*"([^"]*)"', line)
        if header:
            sections.append((header[1], {}))
        elif entry and sections:
            sections[-1][1][entry[1]] = entry[2]
    for name, properties in sections:
        if name != "smbios":
            yield from _group(name, properties)


def _properties(value: str, implied: str = "") -> dict[str, str]:
    """Return the properties in QemuOpts; a doubled comma in a value stands for a comma.

    See ``get_opt_name_value`` in QEMU's ``util/qemu-option.c``.

    :param implied: the key of the first property if it has none.
    """
    if value and implied and not re.match(r"[^=,]*=", value):
        value = f"{implied}={value}"
    pairs = re.findall(r"([^=,]+)(=(?:[^,]|,,)*)?", value)
    return {key: content[1:].replace(",,", ",") if content else "on" for key, content in pairs}


def _json_properties(value: str) -> dict[str, str]:
    """Return the members of a JSON object in the form that they have in QemuOpts.

    Members that are objects, arrays or null are left out.
    """
    try:
        # int() fails on a number of thousands of digits, or takes long.
        members = json.loads(value, parse_int=str, parse_float=str)
    except (ValueError, RecursionError):
        return {}
    words = {True: "on", False: "off"}
    return {
        key: words[content] if isinstance(content, bool) else content
        for key, content in members.items()
        if isinstance(content, (bool, str))
    }


def _global(value: str) -> dict[str, str]:
    """Return driver, property and value of a ``-global`` (``qemu_global_option``)."""
    short = re.fullmatch(r"([^.=]+)\.([^=]+)=(.*)", value, re.DOTALL)
    if short:
        return {"driver": short[1], "property": short[2], "value": short[3]}
    return _properties(value)


def _all(groups: Iterable[Group], name: str) -> list[Mapping[str, str]]:
    return [properties for group, properties in groups if group == name]


def _merged(groups: Iterable[Group], name: str) -> dict[str, str]:
    """Return a group's properties; the last value of each one counts."""
    return {key: content for each in _all(groups, name) for key, content in each.items()}


_SMP_COUNTS = ("drawers", "books", "sockets", "dies", "clusters", "modules", "cores", "threads")


def _max_vcpus(machine: Mapping[str, str]) -> Optional[int]:
    """Return for how many vCPUs a machine has room (``machine_parse_smp_config``).

    Without ``maxcpus``, it is the number of vCPUs at the start, else the topology's product.

    :param machine: the properties of ``-machine``, to which ``-smp`` adds those named ``smp.``.
    :returns: None if it cannot be read.
    """
    counts = {
        key: _integer(machine[f"smp.{key}"])
        for key in ("maxcpus", "cpus", *_SMP_COUNTS)
        if f"smp.{key}" in machine
    }
    numbers = {key: count for key, count in counts.items() if count}
    if len(numbers) < len(counts):
        return None
    product = math.prod(numbers.get(key, 1) for key in _SMP_COUNTS)
    return numbers.get("maxcpus") or numbers.get("cpus") or product


def _protects_tsc(properties: Mapping[str, str]) -> bool:
    """Return whether an ``-object`` takes the guest's TSC out of KVM's hands."""
    kind = properties.get("qom-type")
    is_secure = properties.get("secure-tsc") in ("on", "yes", "true", "y")  # qapi_bool_parse
    return kind == "tdx-guest" or (kind == "sev-snp-guest" and is_secure)


def _tsc_khz(cpu: str, global_properties: Iterable[Mapping[str, str]]) -> Optional[int]:
    """Return the frequency that the CPU model gets, in kHz.

    The properties of ``-cpu`` become global ones, after those of ``-global``
    (``x86_cpu_parse_featurestr`` in QEMU's ``target/i386/cpu.c``), and the last one counts.
    ``tsc-frequency`` is in hertz, ``tsc-freq`` may have a metric suffix.
    ``x86_cpuid_set_tsc_freq`` divides by 1000 and drops the remainder.

    :param cpu: the argument of ``-cpu``; empty for QEMU's default model.
    """
    model, *features = cpu.split(",")
    types = _cpu_types(model)
    hertz: Optional[int] = None
    for each in global_properties:
        if each.get("driver") in types and each.get("property") == "tsc-frequency":
            hertz = _integer(each.get("value", ""))
    for feature in features:
        name, _, content = feature.partition("=")
        if name.replace("_", "-") == "tsc-frequency":
            hertz = _integer(content)
        elif name.replace("_", "-") == "tsc-freq":
            hertz = _metric(content)
    return (hertz or 0) // 1000 or None


def _cpu_types(model: str) -> set[str]:
    """Return the QOM type of a CPU model, and its ancestors that have ``tsc-frequency``."""
    models = {"": ("qemu64", "qemu32"), "host": ("host", "max")}.get(model, (model,))
    targets = ("x86_64-cpu", "i386-cpu")
    return {"cpu", *targets, *(f"{each}-{target}" for each in models for target in targets)}


def _integer(text: str) -> Optional[int]:
    """Return a number as QEMU reads it (``strtoull`` with base 0), None if it is none."""
    match = re.fullmatch(
        r"\s*\+?(?:0[xX]([0-9a-fA-F]{1,16})|(0[0-7]{0,21})|([1-9][0-9]{0,18}))", text
    )
    if not match:
        return None
    hexadecimal, octal, decimal = match.groups()
    if hexadecimal:
        return int(hexadecimal, 16)
    return int(octal, 8) if octal else int(decimal)


def _metric(text: str) -> Optional[int]:
    """Return a number with a metric suffix (``qemu_strtosz_metric``), None if it is none.

    A hexadecimal number has no fraction; ``0x1B`` is 27, because the digit comes first.  A fraction
    needs a suffix, and the result is rounded.
    """
    match = re.fullmatch(
        r"\s*\+?(?:(0[xX][0-9a-fA-F]{1,16})|([0-9]{1,20})(\.[0-9]{0,20})?)([bBkKmMgGtTpPeE]?)", text
    )
    if not match:
        return None
    factor = int(1000 ** "bkmgtpe".index(match[4].lower() or "b"))
    if match[1]:
        return int(match[1], 16) * factor
    fraction = Fraction(f"0{match[3] or ''}0")
    if fraction and factor == 1:
        return None
    return int(match[2]) * factor + math.floor(fraction * factor + Fraction(1, 2))


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
        "qdev_device_add_from_qdict": ("boot", "prelaunch", "hotplug"),
        "kvm_reset_vmfd": ("reset",),
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
