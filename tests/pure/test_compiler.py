"""Relocation of maps, the cache of bytecode, and the header trees that bcc may be given."""

from __future__ import annotations

import os
import shutil
import struct
import tempfile
from importlib import resources
from pathlib import Path
from typing import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tscwatch.errors import HeadersMissing, KernelUnfit
from tscwatch.linux import compiler

SOURCE = compiler.Source("kprobe.c", ("vcpu.kvm",), {}, ())
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
        compiler.get_program(SOURCE, cache=tmp_path)


def test_no_directory_for_temporary_files_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BCC_KERNEL_SOURCE", raising=False)
    monkeypatch.setattr(compiler, "_is_usable", lambda _parts: False)  # there are other headers
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(KernelUnfit, match="make /tmp writable"):
        compiler.get_program(SOURCE, cache=tmp_path)


# The offsets


def load(value: int) -> bytes:
    """An instruction that loads a 64-bit immediate value."""
    low, high = struct.unpack("=ii", struct.pack("=Q", value))
    return instruction(0x18, 0, low) + instruction(0, 0, high)


@given(
    st.lists(st.integers(0, 1 << 20), min_size=1, max_size=20),
    st.lists(st.one_of(st.integers(0, 30), st.just(None)), max_size=20),
)
def test_each_placeholder_becomes_its_offset(
    offsets: list[int], instructions: list[int | None]
) -> None:
    """Other instructions stay, also those whose value happens to be a part of a placeholder."""
    indices = [None if at is None else at % len(offsets) for at in instructions]
    other = instruction(0x07, 0, compiler._PLACEHOLDER & 0x7FFFFFFF)
    code = b"".join(
        other if at is None else load(compiler._PLACEHOLDER + at) for at in (*indices, None)
    )
    expected = b"".join(other if at is None else load(offsets[at]) for at in (*indices, None))
    assert compiler.with_offsets(code, offsets) == expected


def test_a_placeholder_without_an_offset_is_refused() -> None:
    """Also one of which the compiler made something else than one load."""
    for code in (
        load(compiler._PLACEHOLDER + 2),
        instruction(0x07, 0, compiler._PLACEHOLDER >> 32) * 2,
    ):
        with pytest.raises(KernelUnfit, match="damaged"):
            compiler.with_offsets(code, [1, 2])


# The package's bytecode


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of a package that has the sources, and no bytecode."""
    directory = tmp_path / "package"
    shutil.copytree(Path(__file__).parents[2] / "bpf", directory / "bpf")
    monkeypatch.setattr(resources, "files", lambda _package: directory)
    return directory / "bpf"


RESPONSE = '{"maps": [], "functions": {}}'


def test_the_packages_bytecode_is_taken_first(package: Path, tmp_path: Path) -> None:
    key = compiler._hash(SOURCE.request())
    compiler._write_cache(tmp_path / "cache/kprobe.c.json", key, RESPONSE)
    assert compiler.get_program(SOURCE, tmp_path / "cache").origin == "stored"
    (package / "kprobe.c.json").write_text(compiler._packed(key, RESPONSE))
    assert compiler.get_program(SOURCE, tmp_path / "cache").origin == "packaged"


def test_bytecode_of_another_source_is_ignored(
    package: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key = compiler._hash(SOURCE.request())
    (package / "kprobe.c.json").write_text(compiler._packed(key, RESPONSE))
    with (package / "kprobe.c").open("a") as source:
        source.write("/* changed */")
    new_key = compiler._hash(SOURCE.request())
    compiler._write_cache(tmp_path / "cache/kprobe.c.json", new_key, RESPONSE)
    assert compiler.get_program(SOURCE, tmp_path / "cache").origin == "stored"
    assert "another source" in caplog.text


@pytest.mark.parametrize(
    "damage",
    [
        lambda contents: contents.splitlines()[0] + "\n",
        lambda contents: contents[:-10],
        lambda contents: contents.replace("maps", "\udcff"),
        lambda contents: contents.replace('"maps": []', '"maps": [1]'),
    ],
)
def test_damaged_bytecode_is_ignored(
    damage: Callable[[str], str], package: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever is damaged, the next way is tried: the stored bytecode, or the compiler."""
    key = compiler._hash(SOURCE.request())
    stored = tmp_path / "cache/kprobe.c.json"
    compiler._write_cache(stored, key, RESPONSE)
    damaged = damage(stored.read_text()).encode(errors="surrogateescape")
    (package / "kprobe.c.json").write_bytes(damaged)
    assert compiler.get_program(SOURCE, tmp_path / "cache").origin == "stored"
    assert caplog.text.count("is damaged") == 1
    stored.write_bytes(damaged)
    assert compiler._read_cache(stored, key) is None


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
