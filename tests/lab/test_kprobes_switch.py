"""Somebody turns off all kprobes of the host while tscwatch runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import tiny_vmm
from tests.support.guests import Guest, wait_for
from tests.support.observer import Observer
from tests.support.scenarios import boot
from tscwatch.linux.kprobes import SWITCHES


@pytest.mark.parametrize("switch", SWITCHES, ids=lambda file: file.name)
@pytest.mark.parametrize("source", ["bcc", "ftrace"])
def test_the_switch_is_noticed_and_left_alone(source: str, switch: Path, tmp_path: Path) -> None:
    """Whoever has turned kprobes off may have had a reason."""

    def attached() -> bool:
        probes = observer.series("probe_attached")
        return all(on for probe, on in probes.items() if "kvm_arch_vcpu_ioctl" in probe)

    with Observer(tmp_path, "--json", "--source", source) as observer:
        assert attached()
        switch.write_text("0")
        try:
            wait_for(lambda: not attached(), "the switch to be noticed")
            assert not observer.is_ready()
            assert f"write 1 to {switch}" in observer.log.read_text()
            assert switch.read_text().strip() == "0"
            with tiny_vmm.process("create-vcpu:0", "get:0") as unseen:
                pass
        finally:
            switch.write_text("1")
        wait_for(lambda: attached() and observer.is_ready(), "the probes")
        assert [line for line in observer.losses() if 'reason="disabled"' in line]
        with Guest(tmp_path, "after"):
            observer.wait_for_calls("after", len(boot(2)))
            assert observer.places("after") == boot(2)
        assert unseen.pid not in {call["pid"] for call in observer.calls()}
