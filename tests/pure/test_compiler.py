"""Relocation of maps, the cache of bytecode, and the header trees that bcc may be given."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tscwatch.errors import HeadersMissing, KernelUnfit
from tscwatch.linux import compiler

RELOCATIONS = st.dictionaries(st.integers(0, 5), st.integers(3, 1000), min_size=1)


def instruction(opcode: int, source: int, value: int) -> bytes:
    return struct.pack("=BBhi", opcode, source << 4 | 1, 0, value)


@given(
    RELOCATIONS, st.lists(st.tuples(st.integers(0, 255), st.integers(0, 15), st.integers(0, 1000)))
)
def test_only_what_loads_a_map_is_changed(
    maps: dict[int, int], others: list[tuple[int, int, int]]
) -> None:
    others = [other for other in others if other[:2] != (0x18, 1)]
    unchanged = b"".join(instruction(*other) for other in others)
    before = b"".join(instruction(0x18, 1, index) for index in maps)
    after = b"".join(instruction(0x18, 1, descriptor) for descriptor in maps.values())
    assert compiler.relocated(unchanged + before, maps) == unchanged + after


def test_a_compiler_that_hangs_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BCC_KERNEL_SOURCE", str(tmp_path))  # no headers are needed to hang
    monkeypatch.setattr(compiler, "_CHILD", "import time; time.sleep(60)")
    monkeypatch.setattr(compiler, "_COMPILE_TIMEOUT_S", 1)
    with pytest.raises(KernelUnfit, match="--source ftrace"):
        compiler.compile_program("kprobe.c", {}, [], cache=tmp_path)


# The cache


@pytest.fixture
def cached(tmp_path: Path) -> Path:
    """The file of a response that was stored under "key"."""
    path = tmp_path / "cache/kprobe.c.json"
    compiler._write_cache(path, "key", "response")
    assert compiler._read_cache(path, "key") == "response"
    return path


def test_of_another_text_is_not_read(cached: Path) -> None:
    assert compiler._read_cache(cached, "another") is None


def test_it_is_for_its_owner_alone(cached: Path) -> None:
    assert (cached.stat().st_mode & 0o777, cached.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert list(cached.parent.iterdir()) == [cached]


@pytest.mark.parametrize("which", ["file", "directory"])
def test_what_others_can_write_is_not_read(
    which: str, cached: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = cached if which == "file" else cached.parent
    path.chmod(path.stat().st_mode | 0o020)
    assert compiler._read_cache(cached, "key") is None
    assert str(cached) in caplog.text


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
@pytest.mark.parametrize("which", ["file", "directory"])
def test_what_is_anothers_is_not_read(which: str, cached: Path) -> None:
    os.chown(cached if which == "file" else cached.parent, 65534, 0)
    assert compiler._read_cache(cached, "key") is None


def test_a_link_is_not_followed(cached: Path) -> None:
    link = cached.with_name("link.json")
    link.symlink_to(cached)
    assert compiler._read_cache(link, "key") is None


def test_where_nothing_can_be_kept_it_goes_on(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    compiler._write_cache(tmp_path / "file/kprobe.c.json", "key", "response")


# The kernel headers


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A complete header tree."""
    tree = tmp_path / "src/linux-headers-6.1"
    for name in ("include/linux/kconfig.h", "include/generated/autoconf.h"):
        (tree / name).parent.mkdir(parents=True)
        (tree / name).write_text("")
    (tree / "arch/x86/include/asm").mkdir(parents=True)
    tree.chmod(0o755)
    return tree


def test_headers_of_another_kernel_serve(tree: Path, tmp_path: Path) -> None:
    assert compiler.find_headers(tmp_path / "modules", tree.parent) == [tree]


@pytest.mark.parametrize("bit", [0o020, 0o002])
def test_headers_that_others_can_write_are_no_headers(tree: Path, tmp_path: Path, bit: int) -> None:
    tree.chmod(tree.stat().st_mode | bit)
    with pytest.raises(HeadersMissing):
        compiler.find_headers(tmp_path / "modules", tree.parent)
