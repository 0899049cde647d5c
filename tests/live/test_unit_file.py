"""The unit file: systemd accepts it, it is hardened, and its capabilities suffice."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.support.guests import Guest, wait_for
from tests.support.observer import EACH_VCPU, Observer
from tests.support.prometheus import DEPLOY
from tests.support.scenarios import plug

UNIT = DEPLOY / "systemd/tscwatch.service"


def test_the_unit_is_one_that_systemd_understands(tmp_path: Path) -> None:
    """The program and its manual are replaced, because they are not installed here."""
    unit = tmp_path / UNIT.name
    text = UNIT.read_text().replace("/usr/bin/tscwatch", "/bin/true")
    unit.write_text(text.replace("Documentation=man:tscwatch(1)\n", ""))
    checked = subprocess.run(
        ["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False
    )
    ours = [line for line in checked.stderr.splitlines() if "tscwatch" in line]
    assert (checked.returncode, ours) == (0, [])


def confined() -> list[str]:
    """Return a command that runs another one as root with only the unit's capabilities."""
    (capabilities,) = re.findall(r"(?m)^CapabilityBoundingSet=(.*)$", UNIT.read_text())
    kept = ",".join(f"+{name[len('CAP_') :].lower()}" for name in capabilities.split())
    return ["setpriv", "--no-new-privs", "--inh-caps=-all", f"--bounding-set=-all,{kept}"]


@pytest.mark.parametrize("source", ["bcc", "ftrace"])
def test_the_units_capabilities_suffice(source: str, tmp_path: Path) -> None:
    with Guest(tmp_path, "older") as older:
        older.start()
        options = ("--json", "--source", source)
        with Observer(tmp_path, *options, within=confined(), config=EACH_VCPU) as observer:
            wait_for(lambda: 'vm="older"' in observer.metrics(), "the guest that ran before")
            if source == "bcc":  # ftrace's syscall events cannot read a vCPU's frequency
                assert 'tscwatch_vcpu_tsc_reported_hertz{vcpu="1",vm="older"}' in observer.metrics()
            older.plug()
            observer.wait_for_calls("older", 3)
            assert observer.places("older") == plug(2, "hotplug")
            matched = 'tscwatch_vm_tsc_matched_vcpus{vm="older"}'
            wait_for(lambda: matched in observer.metrics(), "KVM's view of the guest")
        status = observer.stop()
    assert status == 0
    assert "could not be read" not in observer.log.read_text()


def test_the_unit_is_hardened() -> None:
    checked = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=30", str(UNIT)],
        capture_output=True,
        text=True,
        env={**os.environ, "SYSTEMD_COLORS": "0"},
        check=False,
    )
    (exposure,) = re.findall(r"Overall exposure level .*?: (\S+)", checked.stdout)
    assert float(exposure) < 3.0
    assert checked.returncode == 0
