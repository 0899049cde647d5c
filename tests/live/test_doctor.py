"""The doctor's report agrees with this host."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from tests.support import tiny_vmm
from tests.support.observer import TSCWATCH, Observer, in_namespace, run
from tscwatch import __version__, doctor


def report(output: str) -> dict[str, Any]:
    """Return the checks in the output of ``doctor --json`` by their names."""
    return {check["what"]: check for check in map(json.loads, output.splitlines())}


def test_this_host(tmp_path: Path) -> None:
    result = run("doctor", "--json")
    found = report(result.stdout)
    assert result.returncode == max(doctor.STATUS[check["state"]] for check in found.values())
    assert (result.stderr, found["KVM"]["state"]) == ("", "ok")
    assert found["TSC frequency"]["found"] == f"{tiny_vmm.host_khz()} kHz"
    assert found["kernel"]["details"]["version"] in found["kernel"]["found"]
    assert found["versions"]["details"]["tscwatch"] == __version__
    assert found["bcc"]["details"]["version"] in found["bcc"]["found"]
    selected = found["source"]["details"]
    with Observer(tmp_path, "--source", "auto") as observer:
        log = observer.log.read_text()
    parts = "{source}, {attach} on {function}".format(**selected)
    assert f"source: {parts}" in log
    assert found["source"]["found"].startswith(f"auto selects {parts}")
    not_working = [line for line in selected["why"] if "does not work here: " in line]
    assert all(f"tscwatch: {line}\n" in log for line in not_working)
    assert len(not_working) == log.count("does not work here: ")
    assert selected["why"]


def test_why_the_first_source_is_not_taken() -> None:
    """Without BTF, no program of bcc can be loaded."""
    result = in_namespace(
        f"mount -t tmpfs none /sys/kernel/btf; exec {TSCWATCH} doctor --json",
    )
    selected = report(result.stdout)["source"]["details"]
    assert selected["source"] == "ftrace"
    assert [line.partition(" does")[0] for line in selected["why"]] == [
        "bcc with kprobes",
        "bcc with tracepoints",
    ]


def test_it_leaves_nothing_behind() -> None:
    """Another tscwatch may run meanwhile: an instance whose process lives belongs to that."""
    before = orphaned_instances()
    run("doctor")
    assert orphaned_instances() == before


def orphaned_instances() -> set[str]:
    names = {path.name for path in Path("/sys/kernel/tracing/instances").iterdir()}
    return {name for name in names if not Path("/proc", name.rpartition("-")[2]).exists()}


def test_a_host_without_tracefs() -> None:
    result = in_namespace(
        "umount -l /sys/kernel/debug/tracing; umount -l /sys/kernel/tracing; "
        f"umount -l /sys/kernel/debug; exec {TSCWATCH} doctor"
    )
    assert result.returncode == 2
    assert "sys-kernel-tracing.mount" in result.stdout
    assert "Traceback" not in result.stderr


def test_another_user() -> None:
    """The user can read a copy of the program, but neither this checkout nor tracefs."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        shutil.copytree(Path(doctor.__file__).parent, Path(name) / "tscwatch")
        as_nobody = ("setpriv", "--reuid=nobody", "--clear-groups", "/usr/bin/python3", "-m")
        result = subprocess.run(
            [*as_nobody, "tscwatch", "doctor", "--json"],
            capture_output=True,
            text=True,
            check=False,
            cwd=name,
        )
    assert (result.returncode, result.stderr) == (2, "")
    assert "sudo" in report(result.stdout)["privileges"]["remedy"]
