"""Puts deliberate faults into copies of the checkout, one at a time: ``make faults``.

Each fault is a mistake that somebody could make in the product, and names the tests that must fail
because of it.  Without a fault, all of them must pass, else a failure would prove nothing.  So this
program shows that these tests notice what they are for.

``make faults ONLY=TEXT`` takes the faults whose descriptions contain that text.  Those that only a
live test can notice need root, ``/dev/kvm`` and what ``make setup-live`` installs; a fault whose
tests cannot run on a machine is skipped, with the reason.  Exit status 0 means that every fault was
caught, and that none was skipped.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from tests.support import checkout
from tests.support.lab_vm import ROOT


class Fault(NamedTuple):
    """A mistake in one file."""

    effect: str
    """What the product then does wrong."""
    file: str
    old: str
    """Occurs once in the file."""
    new: str
    tests: str
    """The test that must fail, or a file of tests of which one must, as pytest takes it."""
    generator: str = ""
    """The module that generates other files of this one; it is run with the fault."""


FAULTS: tuple[Fault, ...] = (
    # capture/
    Fault(
        "ftrace reports all 64 bits of a SET's argument, of which KVM takes 32",
        "tscwatch/capture/assembler.py",
        'record.values["arg"] & 0xFFFFFFFF if',
        'record.values["arg"] if',
        "tests/pure/test_ftrace.py::test_of_a_sets_argument_kvm_takes_the_lower_half",
    ),
    Fault(
        "a GET whose end ftrace has not recorded is not counted as lost",
        "tscwatch/capture/assembler.py",
        """\
        elif pending.op == "get":
            self.no_return += 1
""",
        "",
        "tests/pure/test_ftrace.py::test_a_beginning_without_an_end_is_counted",
    ),
    # bpf/
    Fault(
        "the BPF programs miss KVM_SET_SREGS2, with which a full-state write begins",
        "bpf/tscwatch.h",
        "bool sregs = cmd == KVM_SET_SREGS || cmd == KVM_SET_SREGS2;",
        "bool sregs = cmd == KVM_SET_SREGS;",
        "tests/live/test_scenarios.py::test_every_call_gets_its_phase_and_step[bcc-life]",
    ),
    Fault(
        "whether a VM has run is taken from the vCPU that was created last",
        "bpf/tscwatch.h",
        "if (first && !*first)",
        "if (first)",
        "tests/live/test_guests_and_vmms.py::test_the_first_vcpu_shows_whether_a_vm_has_run",
    ),
    # linux/
    Fault(
        "an error that an ioctl has returned is read as a large positive number",
        "tscwatch/linux/trace_pipe.py",
        "return value - (1 << 64) if value >> 63 else value",
        "return value",
        "tests/pure/test_ftrace.py::test_forms",
    ),
    Fault(
        "stored bytecode is loaded although a group can write it",
        "tscwatch/linux/compiler.py",
        "(stat.S_IWGRP | stat.S_IWOTH)",
        "stat.S_IWOTH",
        "tests/pure/test_compiler.py::test_what_others_can_write_is_not_read",
    ),
    # analysis/attribute.py
    Fault(
        "KVM's count of synchronised vCPUs is taken as one too few",
        "tscwatch/analysis/attribute.py",
        "event.matched_vcpus + 1,",
        "event.matched_vcpus,",
        "tests/pure/test_replay.py::test_a_healthy_life_has_no_mismatch",
    ),
    Fault(
        "after a loss, the first write of a plugged vCPU that is seen counts as the plug's",
        "tscwatch/analysis/attribute.py",
        'vcpu.phase, vcpu.evidence = "unknown", ("events:lost",)',
        "pass",
        "tests/pure/test_attribute.py"
        "::test_after_a_loss_the_first_write_that_is_seen_may_not_be_the_plugs",
    ),
    Fault(
        "the vCPUs of VMs that have ended count towards the limit for ever",
        "tscwatch/analysis/attribute.py",
        "        self._vcpus -= len(vm.vcpus)\n",
        "",
        "tests/pure/test_attribute.py::test_a_vm_that_ended_leaves_nothing",
    ),
    # analysis/judge.py and what it uses
    Fault(
        "a rate that is off by exactly KVM's tolerance is critical",
        "tscwatch/analysis/mismatch.py",
        "if ppm is None or ppm > context.host.kvm_tolerance_ppm:",
        "if ppm is None or ppm >= context.host.kvm_tolerance_ppm:",
        "tests/pure/test_mismatch.py::test_a_limit_belongs_to_the_milder_severity",
    ),
    Fault(
        "a vCPU that is behind the others is reported as ahead of them",
        "tscwatch/analysis/lines.py",
        "{vcpu: origin - value for vcpu, value in",
        "{vcpu: value - origin for vcpu, value in",
        "tests/pure/test_desync.py::test_equal_ratios_compare_by_their_offsets_alone",
    ),
    Fault(
        "TSCs are judged while the VMM is still writing them",
        "tscwatch/analysis/judge.py",
        "if not vm.all_written or not vm.writes.are_over:\n            return []\n        spread",
        "if not vm.all_written:\n            return []\n        spread",
        "tests/pure/test_desync.py::test_a_plugged_vcpu_that_starts_at_0_is_apart_until_a_reset",
    ),
    # host/
    Fault(
        "a VM ends at the first sweep that misses it, before its last events are read",
        "tscwatch/host/inventory.py",
        "dead = missing & self._missing\n",
        "dead = missing\n",
        "tests/pure/test_inventory.py"
        "::test_a_vm_ends_with_its_descriptor_its_process_or_the_reuse_of_its_pid",
    ),
    Fault(
        "lines count although their VM has done something while they were read",
        "tscwatch/host/inventory.py",
        "self._news(event for event in readings if event.pid not in busy)",
        "self._news(readings)",
        "tests/pure/test_inventory.py"
        "::test_lines_of_a_vm_that_did_something_meanwhile_are_read_again",
    ),
    Fault(
        "each VM of a process is found with the vCPUs of all its VMs",
        "tscwatch/host/inventory.py",
        "if len(vms) == 1:  # else",
        "if vms:  # else",
        "tests/pure/test_inventory.py::test_the_vcpus_of_a_process_with_two_vms_are_left_out",
    ),
    # publish/
    Fault(
        "the lowest effective frequency of a VM is exported as the highest",
        "tscwatch/publish/metrics.py",
        "_per_vm(_effective(max)),",
        "_per_vm(_effective(min)),",
        "tests/pure/test_metrics.py::test_vcpus_have_series_while_they_differ",
    ),
    Fault(
        "tscwatch_vm_info has a VM's UUID as its pid, and its pid as its UUID",
        "tscwatch/publish/metrics.py",
        'yield (name, guest.uuid or "", str(guest.pid), guest.vmm,',
        'yield (name, str(guest.pid), guest.uuid or "", guest.vmm,',
        "tests/pure/test_metrics.py::test_the_identity_of_a_vm",
    ),
    Fault(
        "a mismatch seems to have started when it last changed",
        "tscwatch/publish/state.py",
        "vm.started.setdefault(mismatch.kind, mismatch.ts)",
        "vm.started[mismatch.kind] = mismatch.ts",
        "tests/pure/test_metrics.py::test_a_mismatch_that_changes_started_when_it_was_first_raised",
    ),
    # deploy/
    Fault(
        "a skew fires an alert beside that of the desync that it has caused",
        "deploy/alerts/rules.yml",
        """ == 1
          unless on (instance, vm) tscwatch_mismatch_active{kind="desync"}
""",
        " == 1\n",
        "tests/tools/test_alerts.py::test_in_a_fleet_one_cause_is_one_alert",
        "deploy.alerts.generate",
    ),
    Fault(
        "systemd starts the daemon again and again although no source works",
        "deploy/systemd/tscwatch.service",
        "RestartPreventExitStatus=2 4 5 6 7 8 11 13",
        "RestartPreventExitStatus=2 4 5 6 7 8 13",
        "tests/pure/test_unit_file.py",
    ),
    # packages
    Fault(
        "make install leaves out the header of the BPF programs",
        "Makefile",
        "install -m 644 bpf/* $(wildcard",
        "install -m 644 bpf/*.c $(wildcard",
        "tests/tools/test_packages.py::test_each_file_of_the_program_is_installed",
    ),
    Fault(
        "the RPM has another version than the program",
        "deploy/rpm/tscwatch.spec",
        "Version:        ",
        "Version:        0.",
        "tests/tools/test_packages.py::test_the_packages_are_of_this_version",
    ),
)


class Outcome(NamedTuple):
    """What a run of pytest has shown."""

    status: int
    output: str
    failed: tuple[str, ...]
    """The names of the tests that failed.  A test whose fixture failed is not one of them."""
    skipped: tuple[str, ...]
    """The reasons for which tests were skipped."""


def environment(tree: Path) -> dict[str, str]:
    """Let Python import from a copy, also in processes that tests start elsewhere.

    The virtual environment has an editable installation, which is that of the original checkout.
    """
    return {**os.environ, "PYTHONPATH": str(tree)}


@contextmanager
def a_copy() -> Iterator[Path]:
    """Yield a copy; exit if tscwatch would be imported from elsewhere."""
    with checkout.copied() as tree:
        command = [sys.executable, "-c", "import tscwatch; print(tscwatch.__file__)"]
        imported = subprocess.run(
            command, check=True, capture_output=True, text=True, cwd="/", env=environment(tree)
        ).stdout.strip()
        if Path(imported) != tree / "tscwatch/__init__.py":
            sys.exit(f"tscwatch was imported from {imported} instead of {tree}.")
        yield tree


def run_tests(tree: Path, tests: Iterable[str]) -> Outcome:
    report = tree / "report.xml"
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", f"--junit-xml={report}", *tests],
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=tree,
        env=environment(tree),
    )
    cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    return Outcome(
        ran.returncode,
        ran.stdout,
        tuple(case.get("name", "") for case in cases if case.find("failure") is not None),
        tuple(skip.get("message", "") for case in cases for skip in case.findall("skipped")),
    )


def require_passing(tests: Iterable[str]) -> None:
    """Exit with pytest's output unless these tests pass without a fault."""
    with a_copy() as tree:
        outcome = run_tests(tree, dict.fromkeys(tests))
    if outcome.status != 0:
        sys.exit(f"{outcome.output}\nWithout a fault, not all of the tests pass.")


def put(fault: Fault, tree: Path) -> None:
    """Put a fault into a copy, and into what is generated of the file."""
    path = tree / fault.file
    path.write_text(path.read_text().replace(fault.old, fault.new))
    if fault.generator:
        command = [sys.executable, "-m", fault.generator]
        subprocess.run(command, check=True, cwd=tree, env=environment(tree))


def verdict(fault: Fault, outcome: Outcome) -> tuple[str, str]:
    """Return what became of a fault, and the reason; only a test that fails has caught it.

    Any other exit status than 1 means that pytest could not run the tests.
    """
    if outcome.status == 1 and outcome.failed:
        first, *more = outcome.failed
        named = fault.tests.endswith(f"::{first}")
        others = f" and {len(more)} more" if more else ""
        return "caught", "" if named else f"by {first}{others}"
    if outcome.status == 0 and outcome.skipped:
        return "skipped", outcome.skipped[0]
    return "NOT CAUGHT", f"pytest's exit status is {outcome.status}"


def require_places(faults: Iterable[Fault]) -> None:
    """Exit unless each fault has one place in the checkout."""
    for fault in faults:
        places = (ROOT / fault.file).read_text().count(fault.old)
        if places != 1:
            sys.exit(f"{fault.file} has {places} places for the fault that {fault.effect}.")


def main(only: str) -> int:
    """Try the faults whose descriptions contain ``only``, and return the exit status."""
    faults = [fault for fault in FAULTS if only in fault.effect]
    if not faults:
        sys.exit(f"No fault's description contains {only!r}.")
    require_places(faults)
    require_passing(fault.tests for fault in faults)
    caught = 0
    width = max(len(fault.file) for fault in faults)
    for fault in faults:
        with a_copy() as tree:
            put(fault, tree)
            what, why = verdict(fault, run_tests(tree, [fault.tests]))
        caught += what == "caught"
        print(f"{what:10}  {fault.effect}")
        print(f"{'':10}  {fault.file:{width}}  {fault.tests}  {why}".rstrip(), flush=True)
    print(f"{caught} of {len(faults)} faults were caught.")
    return 0 if caught == len(faults) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
