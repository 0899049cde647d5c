"""Files of VMMs, which may be slow, or may never answer."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from tscwatch.clock import now_ns
from tscwatch.host import files
from tscwatch.host.files import ForeignFiles

LIMIT = 100


def test_slow_files_take_a_tenth_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [now_ns()]
    monkeypatch.setattr(files, "now_ns", lambda: now[0])

    def slow(_top: Path, _path: str, _limit: int) -> bytes:
        now[0] += 100_000_000
        return b"x"

    monkeypatch.setattr(files, "_read", slow)
    foreign = ForeignFiles()

    def read() -> int:
        return sum(bool(foreign.read(Path(), "web", LIMIT)) for _ in range(99))

    assert read() == 23  # 2 s, and 0.2 s of the next 2
    now[0] += 10_000_000_000
    assert read() == 11


def test_reads_that_hang_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = threading.Event()
    monkeypatch.setattr(files, "_PATIENCE_S", 0.01)
    monkeypatch.setattr(files, "_read", lambda *_arguments: b"x" if answers.wait() else b"")
    foreign, threads = ForeignFiles(), threading.active_count()
    for pid in range(10):
        root = Path(f"/proc/{pid}/root")
        assert {foreign.read(root, "web", LIMIT) for _ in range(5)} == {None}
        assert threading.active_count() == threads + min(2 * (pid + 1), 8)
    answers.set()
    for _, thread in foreign._hanging:
        thread.join()
    assert foreign.read(Path(), "web", LIMIT) == b"x"


def test_only_regular_files_beneath_the_directory_are_read(tmp_path: Path) -> None:
    top, secret = tmp_path / "top", tmp_path / "secret"
    (top / "a").mkdir(parents=True)
    for path in top / "file", top / "a/file", secret:
        path.write_text(path.name)
    (top / "link").symlink_to(secret)
    (top / "up").symlink_to("..")
    foreign = ForeignFiles()
    for name in "file", "/file", "a//file", "./a/file":
        assert foreign.read(top, name, LIMIT) == b"file"
    for name in "../secret", "a/../file", "link", "up/secret", "a", "none", "a\0b", "\ud800":
        assert foreign.read(top, name, LIMIT) is None
    assert foreign.read(top, "file", 2) == b"fi"


def test_files_of_the_kernel_are_not_read() -> None:
    """Reading some of them has an effect, such as trace_pipe; they are regular files of size 0."""
    foreign = ForeignFiles()
    for name in "proc/sys/kernel/osrelease", "proc/self/status", "sys/kernel/tracing/trace":
        assert foreign.read(Path("/"), name, LIMIT) is None
