"""Runs the real tscwatch as an operator does, and reads what it prints and serves."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

from tests.support.guests import PATIENCE_S, wait_for
from tests.support.strace import CallsByThread

EACH_VCPU = "listen: {port: 0}\nmetrics: {per_vcpu: all}\n"
"""A configuration with which the metrics show each vCPU."""

TSCWATCH = str(Path(sys.executable).with_name("tscwatch"))
_MODULE = (sys.executable, "-m", "tscwatch")  # works also if the package is not installed


class Observer:
    """``tscwatch run`` or ``tscwatch record`` in the background, from when it is ready.

    As a context manager it stops the daemon at the end.

    :param directory: for the daemon's output, log and configuration file.
    :param within: a command that runs the daemon, such as unshare(1) with its options.
    :raises RuntimeError: the daemon exited; the message contains its log.
    """

    def __init__(
        self,
        directory: Path,
        *arguments: str,
        command: str = "run",
        within: Sequence[str] = (),
        config: str = "listen: {port: 0}\n",
    ) -> None:
        self.output = directory / "tscwatch.out"
        self._begin = 0
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

    def __exit__(self, *error: object) -> None:
        self.stop()

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def forget(self) -> None:
        """Leave out of :meth:`lines` what has been printed so far."""
        self._begin += sum(len(os.fsencode(line)) + 1 for line in self.lines())

    def lines(self) -> list[str]:
        """Return the complete lines of standard output so far."""
        with self.output.open("rb") as output:
            output.seek(self._begin)
            return os.fsdecode(output.read()).split("\n")[:-1]

    def items(self) -> list[dict[str, Any]]:
        """Return the objects that were printed so far; takes ``--json``."""
        return [json.loads(line) for line in self.lines()]

    def calls(self, vm: Optional[str] = None) -> list[dict[str, Any]]:
        return [
            item
            for item in self.items()
            if item["type"] == "call" and (vm is None or item["vm"] == vm)
        ]

    def by_thread(self, vm: str) -> CallsByThread:
        """Return a VM's calls in the form of :func:`tests.support.strace.traced`."""
        traced: CallsByThread = defaultdict(list)
        for call in self.calls(vm):
            traced[call["tid"]].append((call["op"], call["khz"], call["result"]))
        return dict(traced)

    def mismatches(self) -> list[dict[str, Any]]:
        return [item for item in self.items() if item["type"] == "mismatch"]

    def mismatches_of(self, pid: int, kind: str) -> list[dict[str, Any]]:
        return [m for m in self.mismatches() if (m["pid"], m["kind"]) == (pid, kind)]

    def contradictions(self) -> list[dict[str, Any]]:
        return [item for item in self.items() if item["type"] == "contradiction"]

    def places(self, vm: str) -> list[str]:
        """Return a VM's calls as :func:`place` writes them."""
        return [place(call) for call in self.calls(vm)]

    def metrics(self) -> str:
        return scrape(self.address)

    def series(self, name: str) -> dict[str, float]:
        """Return the values of a metric by their labels, as ``'vcpu="0",vm="web"'``.

        :param name: without its prefix ``tscwatch_``.
        """
        found = re.findall(rf"(?m)^tscwatch_{name}(?:{{(.*)}})? (\S+)$", self.metrics())
        return {labels: float(value) for labels, value in found}

    @property
    def address(self) -> str:
        """The URL that it serves, without a path."""
        return str(re.findall(r"metrics: (\S+)/metrics", self.log.read_text())[0])

    @property
    def target(self) -> str:
        """Host and port, as a target of Prometheus."""
        return self.address.partition("://")[2]

    def is_ready(self) -> bool:
        try:
            urllib.request.urlopen(f"{self.address}/readyz", timeout=PATIENCE_S).close()
        except urllib.error.HTTPError as error:
            assert error.code == 503
            return False
        return True

    def losses(self) -> list[str]:
        """Return the series that count lost events, if they are not zero."""
        return re.findall(r"(?m)^tscwatch_events_lost_total.* (?!0\.0$).*$", self.metrics())

    def wait_for_calls(self, vm: str, count: int) -> None:
        wait_for(lambda: len(self.calls(vm)) >= count, f"{count} calls of {vm}")

    def stop(self) -> int:
        """Send SIGTERM, if the daemon still runs, and return its exit status."""
        if not self.ended:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE_S)


def place(call: dict[str, Any]) -> str:
    """Write a call as ``"2 set hotplug/post_init"``: vCPU, operation, phase and step."""
    return f"{call['vcpu']} {call['op']} {call['phase']}/{call['step']}"


def scrape(address: str) -> str:
    """Return the metrics page of a tscwatch.

    :param address: its URL, without a path.
    """
    with urllib.request.urlopen(f"{address}/metrics", timeout=PATIENCE_S) as answer:
        return str(answer.read().decode())


def memory(pid: int) -> tuple[int, int]:
    """Return a process's anonymous memory and its resident set, in kB."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    anonymous, resident = (
        int(re.findall(rf"(?m)^{name}: +(\d+)", text)[0]) for name in ("Anonymous", "Rss")
    )
    return anonymous, resident


def run(*arguments: str, env: Optional[dict[str, str]] = None) -> subprocess.CompletedProcess[str]:
    """Run tscwatch until it exits."""
    return subprocess.run(
        [TSCWATCH, *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env={**os.environ, **(env or {})},
        check=False,
    )


def in_namespace(script: str) -> subprocess.CompletedProcess[str]:
    """Run a shell script in a mount namespace of its own, in which it can hide files."""
    return subprocess.run(
        ["unshare", "--mount", "sh", "-c", script],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
