"""Each failure that an operator can meet has an exit status, and a sentence with the remedy."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import tiny_vmm
from tests.support.guests import wait_for
from tests.support.observer import TSCWATCH, Observer, in_namespace, run


def assert_one_sentence(result: subprocess.CompletedProcess[str], status: int, *words: str) -> None:
    """Expect an exit status, and these words in the last line of standard error."""
    assert result.returncode == status, result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("tscwatch: ")
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in last


def test_not_root() -> None:
    """Privileges are dropped after the imports, since only root may be able to read a checkout."""
    script = (
        "import os, sys; from tscwatch.cli import main; os.seteuid(65534); sys.exit(main(['run']))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert_one_sentence(result, 3, "root", "sudo")


EMPTY_CACHE = "mkdir -p /var/cache/tscwatch && mount -t tmpfs none /var/cache/tscwatch"


def test_bcc_missing(tmp_path: Path) -> None:
    """An interpreter may not find the distribution's packages."""
    (tmp_path / "bcc.py").write_text("raise ImportError('no bcc')\n")
    result = in_namespace(
        f"{EMPTY_CACHE} && PYTHONPATH={tmp_path} exec {TSCWATCH} run --source bcc"
    )
    assert_one_sentence(result, 4, "python3-bpfcc", "python3-bcc")


def test_headers_missing() -> None:
    result = in_namespace(
        f"{EMPTY_CACHE} && mount -t tmpfs none /lib/modules && mount -t tmpfs none /usr/src && "
        f"exec {TSCWATCH} run --source bcc"
    )
    assert_one_sentence(result, 5, "linux-headers-amd64", "linux-headers-generic", "kernel-devel")


def test_tracefs_not_mounted() -> None:
    result = in_namespace(
        "umount -l /sys/kernel/debug/tracing; umount -l /sys/kernel/tracing; "
        f"umount -l /sys/kernel/debug; {TSCWATCH} run --source ftrace; "
        "status=$?; grep -q tracefs /proc/mounts && echo 'it mounted something'; exit $status"
    )
    assert_one_sentence(result, 7, "mount -t tracefs")
    assert "it mounted something" not in result.stdout


def test_no_dev_kvm() -> None:
    result = in_namespace(
        "mount -t tmpfs none /lib/modules && mount -t tmpfs none /dev && "
        f"mknod /dev/null c 1 3 && exec {TSCWATCH} run"
    )
    assert_one_sentence(result, 8, "/dev/kvm", "firmware")


def test_port_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = tmp_path / "c.yaml"
        config.write_text(f"listen: {{port: {taken.getsockname()[1]}}}\n")
        assert_one_sentence(run("run", "--config", str(config)), 9, "listen.port")


def test_bad_configuration(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("suorce: bcc\n")
    assert_one_sentence(run("run", "--config", str(config)), 2, "c.yaml:1", "suorce")


def test_foreign_recording(tmp_path: Path) -> None:
    recording = tmp_path / "r.jsonl"
    recording.write_text("no recording\n")
    assert_one_sentence(run("replay", str(recording)), 10, "r.jsonl:1")


@pytest.mark.parametrize("source", ["bcc", "ftrace"])
def test_disk_full_while_it_records(source: str, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=4k t "$0"; exec "$@"')
    arguments = ("-o", str(small / "r.jsonl"), "--source", source)
    within = (*mount, str(small))
    with Observer(tmp_path, *arguments, command="record", within=within) as recorder:
        with tiny_vmm.process("create-vcpu:0", *["set:0:2000000", "get:0"] * 50):
            wait_for(lambda: recorder.ended, "the recorder to exit")
        result = subprocess.CompletedProcess((), recorder.stop(), "", recorder.log.read_text())
        assert_one_sentence(result, 10, "free space")


def test_nothing_works(tmp_path: Path) -> None:
    (tmp_path / "bcc.py").write_text("raise ImportError('no bcc')\n")
    result = in_namespace(
        "umount -l /sys/kernel/debug/tracing; umount -l /sys/kernel/tracing; "
        f"umount -l /sys/kernel/debug; {EMPTY_CACHE}; PYTHONPATH={tmp_path} exec {TSCWATCH} run"
    )
    assert_one_sentence(result, 11, "bcc with", "ftrace: tracefs is not mounted")


def test_the_lack_of_kprobes_is_logged_before_the_next_source_is_taken(tmp_path: Path) -> None:
    (tmp_path / "bcc.py").write_text("raise ImportError('no bcc')\n")
    result = in_namespace(
        f"{EMPTY_CACHE} && mount -t tmpfs none /sys/bus/event_source/devices && "
        f"PYTHONPATH={tmp_path} exec {TSCWATCH} run --source bcc"
    )
    assert "this kernel has no kprobes" in result.stderr
    assert_one_sentence(result, 4)
