"""A daemon that starts under running guests, or starts again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import vmm
from tests.support.guests import wait_for
from tests.support.observer import Observer
from tests.support.scenarios import guest, plug, skewed
from tscwatch.capture.existing import poke_existing

SOON_S = 5


def skews(observer: Observer, vm: str) -> list[dict[str, Any]]:
    return [m for m in observer.mismatches() if (m["vm"], m["kind"]) == (vm, "vcpu_skew")]


def an_observer(directory: Path, name: str, source: str) -> Observer:
    (directory / name).mkdir()
    return Observer(directory / name, "--json", "--source", source)


@pytest.mark.parametrize("source", ["bcc", "ftrace"])
def test_a_skew_is_active_again_after_a_kill(source: str, tmp_path: Path) -> None:
    """Without any new call by QEMU: each vCPU is read where it lies."""
    first = an_observer(tmp_path, "first", source)
    with skewed(tmp_path, "") as target:
        wait_for(lambda: bool(skews(first, "target")), "the skew")
        before = skews(first, "target")[0]
        first.process.kill()
        first.process.wait()
        with an_observer(tmp_path, "second", source) as second:
            wait_for(lambda: 'vm="target"' in second.metrics(), "the VM", SOON_S)
            if 'attach="syscall"' in second.metrics():  # sees no vCPU that makes no call
                assert skews(second, "target") == []
            else:
                wait_for(lambda: bool(skews(second, "target")), "the skew again", SOON_S)
                after = skews(second, "target")[0]
                assert (after["vcpus"], after["ppm"]) == (before["vcpus"], before["ppm"])
                assert after["phase"] == "unknown"
            assert second.calls() == []
            target.plug()
            second.wait_for_calls("target", 3)
            assert second.places("target") == plug(3, "hotplug")


@pytest.mark.parametrize("source", ["bcc", "ftrace"])
def test_a_guest_that_has_not_run_is_known_for_that(source: str, tmp_path: Path) -> None:
    """It may start, and be plugged, before anybody has looked again."""
    with guest(tmp_path, "waiting") as waiting, an_observer(tmp_path, "late", source) as observer:
        waiting.start()
        waiting.plug()
        observer.wait_for_calls("waiting", 3)
        assert observer.places("waiting") == plug(2, "hotplug")


def test_without_the_capability_it_is_said(tmp_path: Path) -> None:
    """A service may be confined so; it still sees every later call."""
    with vmm.process("create-vcpu:0", "regs:0") as process:
        files = Path(f"/proc/{process.pid}/fd").iterdir()
        (vcpu,) = (file.name for file in files if "kvm-vcpu" in str(file.readlink()))
        program = (
            "from tscwatch.capture.existing import poke_existing; "
            f"poke_existing([({process.pid}, {vcpu})])"
        )
        said = subprocess.run(
            ["setpriv", "--bounding-set=-sys_ptrace", sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=True,
        )
    assert "1 vCPUs that were here before could not be read" in said.stderr


def test_what_is_gone_is_left_out_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    poke_existing([(ended.pid, 3), (os.getpid(), 9999)])
    assert caplog.text == ""
