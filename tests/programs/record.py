"""Records the scenarios for the pure tests: ``make recordings``.

Beside each recording, ``.expected.json`` has the calls that the scenario expects.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Collection
from pathlib import Path

from tests.support import lab_vm
from tests.support.guests import wait_for
from tests.support.observer import Observer
from tests.support.scenarios import (
    LIVE_SCENARIOS,
    NEW_SCENARIOS,
    Scenario,
    cpr_exec,
    life,
    refused,
    skewed_migration,
    slowed_migration,
    slowed_pinned,
    vm_rebuilt_at_reset,
)

DIRECTORY = Path(__file__).parents[1] / "recordings"


def record(source: str, attach: str, scenario: Scenario) -> None:
    stem = DIRECTORY / f"{source}-{attach}-{scenario.__name__}"
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        recording = directory / "recording.jsonl"
        with Observer(
            directory, "--source", source, "-o", str(recording), command="record"
        ) as observer:
            expected = scenario(directory, "")
            wait_for(lambda: ended(recording, expected), "the end of each guest")
            observer.stop()
        shutil.copy(recording, stem.with_suffix(".jsonl"))
    stem.with_suffix(".expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    print(stem.name)


def ended(recording: Path, guests: Collection[str]) -> bool:
    """Return whether the last VM of each guest has ended."""
    events = [json.loads(line) for line in recording.read_text().split("\n")[1:-1]]
    names = ((event.get("guest", {}).get("name"), event["vm"]) for event in events if "vm" in event)
    last = {name: vm for name, vm in names if name in guests}
    ends = {event["vm"] for event in events if event.get("op") == "vm_end"}
    return len(last) == len(guests) and ends.issuperset(last.values())


def main() -> None:
    DIRECTORY.mkdir(exist_ok=True)
    if lab_vm.can_scale():
        with lab_vm.scaling():
            for source in ("bcc", "ftrace"):
                record(source, "kprobe", slowed_pinned)
                record(source, "kprobe", slowed_migration)
    inside = lab_vm.inside()
    # The lab is slow, and most scenarios give the same events there.  That of sid is for its QEMU.
    newest = cpr_exec, vm_rebuilt_at_reset
    in_lab = newest if set(newest) <= set(NEW_SCENARIOS) else (life, skewed_migration, refused)
    scenarios = in_lab if inside else LIVE_SCENARIOS
    for scenario in scenarios:
        for source, attach in (("bcc", "tracepoint"), ("ftrace", "syscall")):
            record(source, "kprobe" if inside else attach, scenario)


if __name__ == "__main__":
    main()
