"""Somebody turns off all kprobes of the host while tscwatch runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import tiny_vmm
from tests.support.guests import Guest, wait_for
from tests.support.observer import Observer
from tests.support.scenarios import boot
from tscwatch.linux.kprobes import SWITCHES


@pytest.fixture(scope="module", params=["bcc", "ftrace"])
def observer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Observer]:
    directory = tmp_path_factory.mktemp(request.param)
    with Observer(directory, "--json", "--source", request.param) as it:
        yield it


@pytest.mark.parametrize("switch", SWITCHES, ids=lambda file: file.name)
def test_the_switch_is_noticed_and_left_alone(
    observer: Observer, switch: Path, tmp_path: Path
) -> None:
    """Whoever has turned kprobes off may have had a reason.

    The first of these tests with a source takes up to a minute, because the daemon starts.
    """

    def attached() -> bool:
        probes = observer.series("probe_attached")
        return all(on for probe, on in probes.items() if "kvm_arch_vcpu_ioctl" in probe)

    def gaps() -> float:
        lost = observer.series("events_lost_total")
        return sum(number for labels, number in lost.items() if 'reason="disabled"' in labels)

    assert attached()
    before, messages = gaps(), observer.log.read_text().count(f"write 1 to {switch}")
    switch.write_text("0")
    try:
        wait_for(lambda: not attached(), "the switch to be noticed")
        assert not observer.is_ready()
        assert observer.log.read_text().count(f"write 1 to {switch}") > messages
        assert switch.read_text().strip() == "0"
        with tiny_vmm.process("create-vcpu:0", "get:0") as unseen:
            pass
    finally:
        switch.write_text("1")
    wait_for(lambda: attached() and observer.is_ready(), "the probes")
    assert gaps() > before
    name = f"after-{switch.name}"
    with Guest(tmp_path, name):
        observer.wait_for_calls(name, len(boot(2)))
        assert observer.places(name) == boot(2)
    assert unseen.pid not in {call["pid"] for call in observer.calls()}
