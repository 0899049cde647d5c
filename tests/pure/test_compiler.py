"""What the compiler made, kept and believed only where nobody else can have written it."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tscwatch.linux import compiler

PLACES = st.dictionaries(st.integers(0, 5), st.integers(3, 1000), min_size=1)


def instruction(opcode: int, source: int, value: int) -> bytes:
    return struct.pack("=BBhi", opcode, source << 4 | 1, 0, value)


@given(PLACES, st.lists(st.tuples(st.integers(0, 255), st.integers(0, 15), st.integers(0, 1000))))
def test_only_what_loads_a_map_is_changed(
    places: dict[int, int], others: list[tuple[int, int, int]]
) -> None:
    others = [each for each in others if each[:2] != (0x18, 1)]
    rest = b"".join(instruction(*each) for each in others)
    loads = b"".join(instruction(0x18, 1, place) for place in places)
    there = b"".join(instruction(0x18, 1, descriptor) for descriptor in places.values())
    assert compiler.relocated(rest + loads, places) == rest + there


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    path = tmp_path / "cache/kprobe.c.json"
    compiler._keep(path, "key", "answer")
    assert compiler._kept(path, "key") == "answer"
    return path


def test_of_another_text_is_not_read(kept: Path) -> None:
    assert compiler._kept(kept, "another") is None


def test_it_is_for_its_owner_alone(kept: Path) -> None:
    assert (kept.stat().st_mode & 0o777, kept.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert list(kept.parent.iterdir()) == [kept]


@pytest.mark.parametrize("which", ["file", "directory"])
def test_what_others_can_write_is_not_read(
    which: str, kept: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = kept if which == "file" else kept.parent
    path.chmod(path.stat().st_mode | 0o020)
    assert compiler._kept(kept, "key") is None
    assert str(kept) in caplog.text


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
@pytest.mark.parametrize("which", ["file", "directory"])
def test_what_is_anothers_is_not_read(which: str, kept: Path) -> None:
    os.chown(kept if which == "file" else kept.parent, 65534, 0)
    assert compiler._kept(kept, "key") is None


def test_a_link_is_not_followed(kept: Path) -> None:
    link = kept.with_name("link.json")
    link.symlink_to(kept)
    assert compiler._kept(link, "key") is None


def test_where_nothing_can_be_kept_it_goes_on(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    compiler._keep(tmp_path / "file/kprobe.c.json", "key", "answer")
