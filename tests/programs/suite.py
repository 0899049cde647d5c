"""Runs parts of the test suite, several at a time, and prints one table at the end.

``make test``, ``make test-all`` and the targets of single tiers run this::

    python -m tests.programs.suite PART...

A part is one command.  Its output is printed with the part's name before each line, and kept in
``build/suite``.  An emulated VM or a build keeps a core busy, so as many of these run at a time as
there are cores.  Tests on this machine's own kernel mostly wait, and would see each other's guests,
so one part of them runs at a time, beside the others and before them in the scheduler's eyes.

The table has the number of tests and the seconds of each part; below it are the slowest tests, and
each reason for which tests were skipped.  Exit status 0 means that no test failed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Literal, NamedTuple
from xml.etree import ElementTree

from tests.support.lab_vm import ROOT
from tests.support.machine import missing_for_live

RESULTS = ROOT / "build/suite"
SLOWEST = 10
Outcome = Literal["passed", "failed", "skipped"]


class Part(NamedTuple):
    """A command that tests something."""

    name: str
    command: tuple[str, ...]
    after: tuple[str, ...] = ()
    """The parts that must have succeeded before this one, if they are run at all."""
    on_host: bool = False
    """It uses this machine's KVM and tracing."""


class Case(NamedTuple):
    """The result of one test; a part that does not run pytest is one test."""

    part: str
    name: str
    seconds: float
    outcome: Outcome
    reason: str = ""


class Result(NamedTuple):
    """What a part has yielded."""

    part: str
    seconds: float
    tests: tuple[Case, ...]

    def count(self, outcome: Outcome) -> int:
        return sum(test.outcome == outcome for test in self.tests)


def without_a_run(part: Part, outcome: Outcome, reason: str) -> Result:
    return Result(part.name, 0, (Case(part.name, part.name, 0, outcome, reason),))


def program(name: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", f"tests.programs.{name}", *arguments)


def make(*arguments: str) -> tuple[str, ...]:
    return ("make", "-s", "--no-print-directory", *arguments)


def pytest(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments)


def lab(selected: str, *files: str) -> tuple[str, ...]:
    """Return the command that runs tests in the lab VM.

    The tests with bcc run in one VM and all others in a second one: each VM keeps a core busy, and
    the tests that can share a daemon do.

    :param selected: an expression of pytest's option ``-k``.
    """
    tests = pytest("-v", "-m", "lab or also_in_lab", "-k", selected, *files)
    return (sys.executable, "-m", "tests.support.lab_vm", *tests)


# Only the files that have such tests: the VM takes seconds to import one.
_LIVE_FILES = sorted((ROOT / "tests/live").glob("test_*.py"))
_IN_LAB = [str(file) for file in _LIVE_FILES if "also_in_lab" in file.read_text()]
_LAB = (*_IN_LAB, "tests/lab")
_SHORT = "(life or skewed_migration or test_lines)"
"""Each phase and step, and the lines of the vCPUs on a host that scales."""
_SHORT_FILES = ("tests/live/test_scenarios.py", "tests/lab/test_lines.py")
_BUILT = ("rpm", "packages")

PARTS = (
    Part("lint", make("lint")),
    Part("pure", pytest("tests/pure")),
    Part("rpm", make("rpm")),
    Part("packages", make("rpm", "image")),
    Part("tools", pytest("tests/tools"), _BUILT),
    Part("live", pytest("tests/live"), on_host=True),
    Part("image", pytest("tests/image"), _BUILT, on_host=True),
    Part("lab-bcc", lab("bcc", *_LAB), _BUILT),
    Part("lab-ftrace", lab("not bcc", *_LAB)),
    Part("lab-bcc-short", lab(f"bcc and {_SHORT}", *_SHORT_FILES), _BUILT),
    Part("lab-ftrace-short", lab(f"not bcc and {_SHORT}", *_SHORT_FILES)),
    Part("deb", program("deb"), _BUILT),
    Part("e2e", make("--assume-old=deb", "e2e"), _BUILT),
    Part("bare-12", program("bare", "bookworm", "without")),
    Part("bare-13", program("bare", "trixie", "without")),
    Part("bare-12-kvm", program("bare", "bookworm", "with"), on_host=True),
    Part("bare-13-kvm", program("bare", "trixie", "with"), on_host=True),
)


def may_start(part: Part, running: Collection[Part]) -> bool:
    """Return whether the machine has room for a part beside those that run."""
    most = 1 if part.on_host else os.cpu_count() or 1
    return sum(other.on_host == part.on_host for other in running) < most


def run(part: Part) -> Result:
    """Run a part's command; print its output, and keep it in a file."""
    report = RESULTS / f"{part.name}.xml"
    report.unlink(missing_ok=True)
    options = [f"--junitxml={report}"] if "pytest" in part.command else []
    # The tests on the host have the precedence, because some of them depend on timing.
    precedence = [] if part.on_host else ["nice", "-n", "10"]
    began = time.monotonic()
    with (
        (RESULTS / f"{part.name}.log").open("w") as log,
        subprocess.Popen(
            [*precedence, *part.command, *options],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            log.write(line)
            print(f"{part.name:>10} | {line}", end="", flush=True)
        status = process.wait()
    seconds = time.monotonic() - began
    tests = tuple(read(part.name, report)) if report.exists() else ()
    result = Result(part.name, seconds, tests)
    if status and not result.count("failed"):
        why = f"exit status {status}"
        return result._replace(tests=(*tests, Case(part.name, part.name, seconds, "failed", why)))
    if not tests:
        return result._replace(tests=(Case(part.name, part.name, seconds, "passed"),))
    return result


def read(part: str, report: Path) -> Iterator[Case]:
    """Yield the tests in a report of pytest's, which has the format of JUnit."""
    for case in ElementTree.parse(report).iter("testcase"):
        file = case.get("classname", "").replace(".", "/")
        name, seconds = f"{file}.py::{case.get('name')}", float(case.get("time", 0))
        yield Case(part, name, seconds, *_outcome(case))


def _outcome(case: ElementTree.Element) -> tuple[Outcome, str]:
    for child in case:
        if child.tag in ("failure", "error"):
            return "failed", child.get("message", "").partition("\n")[0]
        if child.tag == "skipped":
            return "skipped", child.get("message", "")
    return "passed", ""


def run_all(parts: Sequence[Part]) -> Iterator[Result]:
    """Run parts, in their order as far as the machine has room; yield their results as they end."""
    waiting, succeeded = list(parts), set[str]()
    running: dict[Future[Result], Part] = {}
    with ThreadPoolExecutor(len(parts)) as threads:
        while waiting or running:
            for part in tuple(waiting):
                needed = {other.name for other in parts} & {*part.after}
                if needed <= succeeded and may_start(part, running.values()):
                    waiting.remove(part)
                    running[threads.submit(run, part)] = part
            if not running:
                break
            for ended in wait(running, return_when=FIRST_COMPLETED).done:
                del running[ended]
                result = ended.result()
                if not result.count("failed"):
                    succeeded.add(result.part)
                yield result
    for part in waiting:
        yield without_a_run(part, "failed", f"not run, because {' or '.join(part.after)} failed")


def table(results: Sequence[Result], seconds: float) -> str:
    """Return the table of the parts, the slowest tests, and what was skipped and what failed."""
    tests = [test for result in results for test in result.tests]
    lines = [f"{'part':<18}{'tests':>7}{'skipped':>9}{'failed':>8}{'seconds':>9}"]
    for row in (*results, Result("all", seconds, tuple(tests))):
        counts = f"{len(row.tests):>7}{row.count('skipped'):>9}{row.count('failed'):>8}"
        lines.append(f"{row.part:<18}{counts}{row.seconds:>9.0f}")
    lines += ["", "The slowest tests, in seconds:"]
    by_time = sorted(tests, key=lambda test: test.seconds, reverse=True)
    lines += [f"{test.seconds:>6.0f}  {test.part}  {test.name}" for test in by_time[:SLOWEST]]
    skipped = Counter((test.part, test.reason) for test in tests if test.outcome == "skipped")
    lines += [f"SKIPPED {part} ({number}): {why}" for (part, why), number in skipped.items()]
    failed = [test for test in tests if test.outcome == "failed"]
    lines += [f"FAILED {test.part}  {test.name}  {test.reason}" for test in failed]
    total = Counter(test.outcome for test in tests)
    closing = f"{total['passed']} passed, {total['failed']} failed, {total['skipped']} skipped"
    return "\n".join([*lines, "", closing])


def main(names: Sequence[str]) -> int:
    """Run the parts with these names, as far as they can run here, and print the table."""
    began = time.monotonic()
    RESULTS.mkdir(parents=True, exist_ok=True)
    parts = [part for name in names for part in PARTS if part.name == name]
    missing = missing_for_live()
    able = [part for part in parts if not (part.on_host and missing)]
    results = [without_a_run(part, "skipped", missing) for part in parts if part not in able]
    results += run_all(able)
    results.sort(key=lambda result: names.index(result.part))
    print(table(results, time.monotonic() - began))
    return int(any(result.count("failed") for result in results))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
