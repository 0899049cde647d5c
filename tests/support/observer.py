"""The real tscwatch, run as an operator runs it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Optional

from tests.support.guests import PATIENCE_S, wait_for
from tests.support.strace import Seen

TSCWATCH = str(Path(sys.executable).with_name("tscwatch"))
_MODULE = (sys.executable, "-m", "tscwatch")  # also where nothing is installed


class Observer:
    """``tscwatch run`` or ``tscwatch record`` in the background, and what it says."""

    def __init__(
        self,
        directory: Path,
        *arguments: str,
        command: str = "run",
        within: Sequence[str] = (),
        config: str = "listen: {port: 0}\n",
    ) -> None:
        self.output = directory / "tscwatch.out"
        self.log = directory / "tscwatch.log"
        config_file = directory / "tscwatch.yaml"
        config_file.write_text(config)
        with self.output.open("wb") as output, self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*within, *_MODULE, command, "--config", str(config_file), *arguments],
                stdout=output,
                stderr=log,
            )
        ready = "recording to" if command == "record" else "metrics: "
        wait_for(lambda: ready in self.log.read_text() or self.ended, "tscwatch to be ready")
        if self.ended:
            raise RuntimeError(f"tscwatch ended: {self.log.read_text()}")

    def __enter__(self) -> Observer:
        return self

    def __exit__(
        self,
        kind: Optional[type[BaseException]],
        error: Optional[BaseException],
        trace: Optional[TracebackType],
    ) -> None:
        self.stop()

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def lines(self) -> list[str]:
        """Whole lines so far."""
        return self.output.read_text().split("\n")[:-1]

    def items(self) -> list[dict[str, Any]]:
        """With --json: the objects so far."""
        return [json.loads(line) for line in self.lines()]

    def calls(self, vm: Optional[str] = None) -> list[dict[str, Any]]:
        return [
            item
            for item in self.items()
            if item["type"] == "call" and (vm is None or item["vm"] == vm)
        ]

    def by_thread(self, vm: str) -> Seen:
        """A VM's calls in the oracle's form."""
        seen: Seen = defaultdict(list)
        for call in self.calls(vm):
            seen[call["tid"]].append((call["op"], call["khz"], call["result"]))
        return dict(seen)

    def mismatches(self) -> list[dict[str, Any]]:
        return [item for item in self.items() if item["type"] == "mismatch"]

    def places(self, vm: str) -> list[str]:
        """``"2 set hotplug/post_init"`` for each call of a VM."""
        return [place(call) for call in self.calls(vm)]

    def metrics(self) -> str:
        return scrape(self.address)

    @property
    def address(self) -> str:
        """Scheme, host and port of what it serves."""
        return str(re.findall(r"metrics: (\S+)/metrics", self.log.read_text())[0])

    @property
    def target(self) -> str:
        """The same as Prometheus wants it."""
        return self.address.partition("://")[2]

    def losses(self) -> list[str]:
        """The series of events that were lost, where any were."""
        return re.findall(r"(?m)^tscwatch_events_lost_total.* (?!0\.0$).*$", self.metrics())

    def wait_for_calls(self, vm: str, count: int) -> None:
        wait_for(lambda: len(self.calls(vm)) >= count, f"{count} calls of {vm}")

    def stop(self) -> int:
        """SIGTERM; gives the exit status."""
        if not self.ended:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE_S)


def place(call: dict[str, Any]) -> str:
    """``"2 set hotplug/post_init"``"""
    return f"{call['vcpu']} {call['op']} {call['phase']}/{call['step']}"


def scrape(address: str) -> str:
    """The metrics of a tscwatch that is there."""
    with urllib.request.urlopen(f"{address}/metrics", timeout=PATIENCE_S) as answer:
        return str(answer.read().decode())


def memory(pid: int) -> tuple[int, int]:
    """A process's anonymous and all its resident memory, in kB."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    anonymous, resident = (
        int(re.findall(rf"(?m)^{name}: +(\d+)", text)[0]) for name in ("Anonymous", "Rss")
    )
    return anonymous, resident


def run(*arguments: str, env: Optional[dict[str, str]] = None) -> subprocess.CompletedProcess[str]:
    """tscwatch to its end."""
    return subprocess.run(
        [TSCWATCH, *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env={**os.environ, **(env or {})},
        check=False,
    )
