"""Daemons that start while guests run, that are killed, and that stop."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support import lab_vm, tiny_vmm
from tests.support.guests import Guest, wait_for
from tests.support.observer import TSCWATCH, Observer
from tests.support.scenarios import boot, plug, skewed
from tscwatch.capture import ebpf
from tscwatch.capture.existing import poke_existing

SOURCES = ["bcc", "ftrace"]
SOON_S = 5
TRACING = Path("/sys/kernel/tracing")


def skews(observer: Observer, vm: str) -> list[dict[str, Any]]:
    return [m for m in observer.mismatches() if (m["vm"], m["kind"]) == (vm, "vcpu_skew")]


def start(directory: Path, name: str, source: str) -> Observer:
    """Start a daemon in a directory of its own."""
    (directory / name).mkdir()
    return Observer(directory / name, "--json", "--source", source)


@pytest.mark.also_in_lab
@pytest.mark.parametrize("source", SOURCES)
def test_a_skew_is_active_again_after_a_kill(source: str, tmp_path: Path) -> None:
    """QEMU makes no new call: the daemon reads the frequency of each existing vCPU.

    In the lab, this takes up to a minute, because two daemons and two guests start.
    """
    first = start(tmp_path, "first", source)
    with skewed(tmp_path, "") as target:
        wait_for(lambda: bool(skews(first, "target")), "the skew")
        before = skews(first, "target")[0]
        first.process.kill()
        first.process.wait()
        with start(tmp_path, "second", source) as second:
            wait_for(lambda: 'vm="target"' in second.metrics(), "the VM", SOON_S)
            if 'attach="syscall"' in second.metrics():  # cannot read an existing vCPU
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


@pytest.mark.also_in_lab
@pytest.mark.parametrize("source", SOURCES)
def test_a_guest_that_has_not_run_is_known_for_that(source: str, tmp_path: Path) -> None:
    """It may start and be hotplugged before the daemon next reads the VMs from /proc."""
    with Guest(tmp_path, "waiting") as waiting, start(tmp_path, "late", source) as observer:
        waiting.start()
        waiting.plug()
        observer.wait_for_calls("waiting", 3)
        assert observer.places("waiting") == plug(2, "hotplug")


def test_a_missing_capability_is_logged(tmp_path: Path) -> None:
    """Without CAP_SYS_PTRACE existing vCPUs cannot be read, and a warning counts them."""
    with tiny_vmm.process("create-vcpu:0", "regs:0") as process:
        files = Path(f"/proc/{process.pid}/fd").iterdir()
        (vcpu,) = (file.name for file in files if "kvm-vcpu" in str(file.readlink()))
        program = (
            "from tscwatch.capture.existing import poke_existing; "
            f"poke_existing([({process.pid}, {vcpu})])"
        )
        ended = subprocess.run(
            ["setpriv", "--bounding-set=-sys_ptrace", sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=True,
        )
    assert "1 vCPUs that are older than tscwatch could not be read" in ended.stderr


def test_what_is_gone_is_left_out_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    poke_existing([(ended.pid, 3), (os.getpid(), 9999)])
    assert caplog.text == ""


def instances() -> list[Path]:
    """Return the trace instances of all daemons."""
    return list((TRACING / "instances").glob("tscwatch-*"))


def probe_definitions() -> str:
    files = [TRACING / name for name in ("kprobe_events", "uprobe_events")]
    return "".join(file.read_text() for file in files if file.exists())


@pytest.mark.parametrize("source", SOURCES)
def test_killed_at_any_moment_it_leaves_nothing_that_the_next_does_not_clear(
    source: str, tmp_path: Path
) -> None:
    others = instances()
    config = tmp_path / "port.yaml"
    config.write_text("listen: {port: 0}\n")
    chance = random.Random(source)
    for _ in range(8):
        command = [TSCWATCH, "run", "--config", str(config), "--source", source]
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as killed:
            time.sleep(chance.uniform(0.1, 1.2))
            killed.kill()
    with Observer(tmp_path, "--json", "--source", source) as observer:
        with Guest(tmp_path, "after"):
            observer.wait_for_calls("after", len(boot(2)))
        ours = str(observer.process.pid)
        left = set(instances()) - set(others)
        assert {path.name.rpartition("-")[2] for path in left} == {ours}
    assert instances() == others
    assert f"_{ours}/" not in probe_definitions()


def test_a_killed_tscwatch_leaves_nothing_that_the_next_does_not_clear(tmp_path: Path) -> None:
    directory = TRACING / "instances"
    with Observer(tmp_path, "--source", "ftrace") as killed:
        killed.process.send_signal(signal.SIGKILL)
        killed.process.wait()
    left = f"tscwatch-*-{killed.process.pid}"
    assert list(directory.glob(left))
    with Observer(tmp_path, "--source", "ftrace") as observer:
        assert not list(directory.glob(left))
        assert observer.stop() == 0
    assert not list(directory.glob(f"tscwatch-*-{observer.process.pid}"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_cleanly(number: int, tmp_path: Path) -> None:
    with Observer(tmp_path, "--source", "bcc") as observer:
        observer.process.send_signal(number)
        assert observer.process.wait() == 0
        assert "Traceback" not in observer.log.read_text()


@pytest.mark.also_in_lab
def test_with_packaged_bytecode_neither_bcc_nor_headers_are_needed(tmp_path: Path) -> None:
    package = tmp_path / "tscwatch"
    shutil.copytree(Path(ebpf.__file__).parents[1], package)
    if lab_vm.inside() and lab_vm.BYTECODE.exists():  # bcc takes a minute there
        shutil.copytree(lab_vm.BYTECODE, package / "bpf", dirs_exist_ok=True)
    else:
        ebpf.precompile(str(package / "bpf"))
    (tmp_path / "bcc.py").write_text("raise ImportError('no bcc')\n")
    hidden = ("/var/cache/tscwatch", "/lib/modules", "/usr/src")
    script = " && ".join(f"mkdir -p {path} && mount -t tmpfs none {path}" for path in hidden)
    within = ("unshare", "--mount", "sh", "-c", f'{script} && cd {tmp_path} && exec "$@"', "sh")
    with (
        Observer(tmp_path, "--json", "--source", "bcc", within=within) as observer,
        Guest(tmp_path, "seen"),
    ):
        observer.wait_for_calls("seen", len(boot(2)))
        assert observer.places("seen") == boot(2)
        assert 'program="packaged"' in observer.metrics()


def test_two_daemons_do_not_disturb_each_other(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    with (
        Observer(tmp_path / "one", "--json", "--source", "ftrace") as one,
        Observer(tmp_path / "two", "--json", "--source", "ftrace") as two,
    ):
        with Guest(tmp_path, "shared"):
            pass
        for observer in (one, two):
            observer.wait_for_calls("shared", 6)
            assert observer.places("shared") == boot(2)
        one.stop()
        with Guest(tmp_path, "second"):
            two.wait_for_calls("second", 6)
            assert two.places("second") == boot(2)
