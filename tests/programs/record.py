"""Record the scenarios, for the pure tests to replay: ``make recordings``.

Beside each recording stands what the scenario must bring, as its driver knows it.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from tests.support import lab_vm
from tests.support.guests import wait_for
from tests.support.observer import Observer
from tests.support.scenarios import HOST_SCENARIOS, Scenario, life, refused, skewed_migration

DIRECTORY = Path(__file__).parents[1] / "recordings"


def record(source: str, attach: str, scenario: Scenario) -> None:
    stem = DIRECTORY / f"{source}-{attach}-{scenario.__name__}"
    recording = stem.with_suffix(".jsonl")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        with Observer(
            directory, "--source", source, "-o", str(recording), command="record"
        ) as observer:
            expected = scenario(directory, "")
            wait_for(
                lambda: recording.read_text().count('"op":"vm_end"') >= len(expected), "the end"
            )
            observer.stop()
    stem.with_suffix(".expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    print(recording.name)


def main() -> None:
    DIRECTORY.mkdir(exist_ok=True)
    inside = lab_vm.inside()
    # The lab is slow, and most lives look there as they do here.
    for scenario in (life, skewed_migration, refused) if inside else HOST_SCENARIOS:
        for source, attach in (("bcc", "tracepoint"), ("ftrace", "syscall")):
            record(source, "kprobe" if inside else attach, scenario)


if __name__ == "__main__":
    main()
