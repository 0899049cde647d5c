"""Functions in executables that are written here byte by byte (System V ABI, "Object Files")."""

from __future__ import annotations

import lzma
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Callable, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tscwatch.linux import elf
from tscwatch.linux.elf import function_offsets

PROGBITS, SYMTAB, STRTAB, NOTE, DYNSYM = 1, 2, 3, 7, 11
OBJECT, FUNC = 1, 2
GLOBAL, WEAK = 1 << 4, 2 << 4
LOAD, DYNAMIC = 1, 2


class Section(NamedTuple):
    name: str
    kind: int
    content: bytes
    link: int = 0


class Symbol(NamedTuple):
    name: str
    address: int = 0x401000
    info: int = GLOBAL | FUNC
    section: int = 1
    """0 if the symbol is not defined here."""


class Segment(NamedTuple):
    kind: int
    offset: int
    address: int
    size: int


TEXT = Segment(LOAD, 0x1000, 0x401000, 0x500)


def symbols(*table: Symbol, strings: bytes = b"", at: int = 1, kind: int = SYMTAB) -> list[Section]:
    """Return a symbol table and its string table.

    :param strings: a string table that has the names; by default each has one of its own.
    :param at: the index of the first of the two sections.
    """
    strings = strings or b"\0" + b"".join(symbol.name.encode() + b"\0" for symbol in table)
    entries = b"".join(
        struct.pack(
            "<IBBHQQ",
            strings.index(symbol.name.encode() + b"\0"),
            symbol.info,
            0,
            symbol.section,
            symbol.address,
            8,
        )
        for symbol in table
    )
    return [Section(".symtab", kind, entries, link=at + 1), Section(".strtab", STRTAB, strings)]


def image(sections: Sequence[Section] = (), segments: Sequence[Segment] = (TEXT,)) -> bytes:
    """Return an ELF file: header, segments, contents, and at the end the table of sections.

    Section 0 is empty, and the last one has the sections' names.
    """
    everything = [Section("", 0, b""), *sections, Section(".shstrtab", STRTAB, b"")]
    names = b"\0".join(section.name.encode() for section in everything) + b"\0"
    everything[-1] = everything[-1]._replace(content=names)
    position = 64 + 56 * len(segments)
    contents = headers = b""
    for section in everything:
        headers += struct.pack(
            "<IIQQQQIIQQ",
            names.index(section.name.encode() + b"\0"),
            section.kind,
            0,
            0,
            position + len(contents),
            len(section.content),
            section.link,
            0,
            1,
            0,
        )
        contents += section.content
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        b"\x7fELF\x02\x01\x01",
        *(3, 62, 1, 0, 64, position + len(contents), 0, 64, 56, len(segments)),
        *(64, len(everything), len(everything) - 1),
    )
    table = b"".join(
        struct.pack("<IIQQQQQQ", kind, 5, offset, address, 0, size, size, 0x1000)
        for kind, offset, address, size in segments
    )
    return header + table + contents + headers


def found(path: Path, data: bytes, *names: str, debug_files: str = "none") -> dict[str, int]:
    """Write an executable and return its functions' offsets."""
    executable = path / "executable"
    executable.write_bytes(data)
    return function_offsets(executable, names, path / debug_files)


def test_a_functions_offset_is_that_in_the_segment_that_loads_it(tmp_path: Path) -> None:
    segments = (
        Segment(DYNAMIC, 0x9000, 0x400000, 0x10000),  # is a part of others
        Segment(LOAD, 0, 0x400000, 0x1000),
        TEXT,
        Segment(LOAD, 0x1500, 0x600000, 0x100),
    )
    addresses = {
        "first": 0x400010,
        "begin": 0x401000,
        "end": 0x4014FF,
        "later": 0x600020,
    }
    table = [Symbol(name, address) for name, address in addresses.items()]
    assert found(tmp_path, image(symbols(*table), segments), *addresses) == {
        "first": 0x10,
        "begin": 0x1000,
        "end": 0x14FF,
        "later": 0x1520,
    }


@pytest.mark.parametrize("address", [0, 0x400FFF, 0x401500])
def test_an_address_that_is_in_no_segment_makes_the_file_invalid(
    tmp_path: Path, address: int
) -> None:
    table = symbols(Symbol("f"), Symbol("astray", address))
    assert found(tmp_path, image(table), "f") == {"f": 0x1000}
    assert found(tmp_path, image(table), "f", "astray") == {}


def test_only_functions_that_the_file_defines_are_found(tmp_path: Path) -> None:
    table = symbols(
        Symbol("imported", 0, section=0),
        Symbol("variable", info=GLOBAL | OBJECT),
        Symbol("local", 0x401010, info=FUNC),
        Symbol("weak", 0x401020, info=WEAK | FUNC),
        Symbol("other"),
    )
    names = ("imported", "variable", "local", "weak", "none")
    assert found(tmp_path, image(table), *names) == {"local": 0x1010, "weak": 0x1020}
    assert found(tmp_path, image(table)) == {}


def test_a_name_may_be_the_end_of_a_longer_one(tmp_path: Path) -> None:
    """Linkers store a common end once, and a symbol can refer to any occurrence of its name."""
    strings = b"\0old_init\0init\0"
    for name, wanted in (("old_init", {}), ("init", {"init": 0x1000})):
        table = symbols(Symbol(name), strings=strings)
        assert found(tmp_path, image(table), "init") == wanted
    shared = symbols(Symbol("init"), strings=b"\0old_init\0")
    assert found(tmp_path, image(shared), "init") == {"init": 0x1000}
    second = [shared[0]._replace(content=struct.pack("<IBBHQQ", 10, FUNC, 0, 1, 0x401000, 8))]
    second += [shared[1]._replace(content=strings)]
    assert found(tmp_path, image(second), "init") == {"init": 0x1000}


def test_a_name_is_not_the_beginning_of_a_longer_one(tmp_path: Path) -> None:
    assert found(tmp_path, image(symbols(Symbol("init_late"))), "init") == {}


def test_names_are_in_the_string_table_that_belongs_to_the_symbols(tmp_path: Path) -> None:
    other = Section(".dynstr", STRTAB, b"\0g\0f\0")
    sections = [other, *symbols(Symbol("f"), at=2)]
    assert found(tmp_path, image(sections), "f", "g") == {"f": 0x1000}


def test_the_dynamic_symbols_are_not_searched(tmp_path: Path) -> None:
    """They would be only those that other objects use, of which no function for a uprobe is one."""
    assert found(tmp_path, image(symbols(Symbol("f"), kind=DYNSYM)), "f") == {}


def test_a_file_has_one_symbol_table(tmp_path: Path) -> None:
    """Many of them, which may overlap, would take long to read."""
    second = symbols(Symbol("g"), at=3)
    assert found(tmp_path, image([*symbols(Symbol("f")), *second]), "f", "g") == {"f": 0x1000}


# Stripped executables


def stripped(*sections: Section) -> bytes:
    return image([Section(".text", PROGBITS, b"\x90" * 16), *sections])


def packed(data: bytes) -> Section:
    return Section(".gnu_debugdata", PROGBITS, data)


def build_id(number: bytes, owner: bytes = b"GNU\0") -> Section:
    note = struct.pack("<III", len(owner), len(number), 3) + owner + number
    return Section(".note.gnu.build-id", NOTE, note + bytes(8))


def debug_file(path: Path, *names: str) -> None:
    """Write the debug file for the build id 0xabcdef01."""
    file = path / "debug/ab/cdef01.debug"
    file.parent.mkdir(parents=True)
    file.write_bytes(image(symbols(*map(Symbol, names)), segments=()))


ID = build_id(b"\xab\xcd\xef\x01")
MINI = packed(lzma.compress(image(symbols(Symbol("f", 0x401010)), segments=())))


def test_the_addresses_of_minidebuginfo_are_in_the_executables_segments(tmp_path: Path) -> None:
    assert found(tmp_path, stripped(MINI), "f") == {"f": 0x1010}
    assert found(tmp_path, stripped(MINI._replace(name=".gnu_debugdat")), "f") == {}
    assert found(tmp_path, stripped(MINI._replace(name=".gnu_debugdata2")), "f") == {}


def test_a_debug_file_is_found_by_the_build_id(tmp_path: Path) -> None:
    debug_file(tmp_path, "f")
    assert found(tmp_path, stripped(ID), "f", debug_files="debug") == {"f": 0x1000}
    assert found(tmp_path, stripped(ID), "f") == {}
    for other in (b"\xab\xcd\xef\x02", b"\xab\xcd\xef", b"\xab\xcd\xef\x01\x00", b""):
        assert found(tmp_path, stripped(build_id(other)), "f", debug_files="debug") == {}


def test_of_the_places_the_first_that_names_any_function_counts(tmp_path: Path) -> None:
    debug_file(tmp_path, "f", "g", "h")
    own = symbols(Symbol("g", 0x401020), at=4)
    data = image([Section(".text", PROGBITS, b""), MINI, ID, *own])
    for names, expected in (
        ("fgh", {"g": 0x1020}),
        ("fh", {"f": 0x1010}),
        ("h", {"h": 0x1000}),
    ):
        assert found(tmp_path, data, *names, debug_files="debug") == expected


def test_what_is_no_archive_is_no_symbol_table(tmp_path: Path) -> None:
    for damaged in (b"no archive", MINI.content[:40], b"\xfd7zXZ\0" + MINI.content[7:]):
        assert found(tmp_path, stripped(packed(damaged)), "f") == {}


def test_an_archive_takes_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither its contents nor the dictionary that its header requests may take more."""
    data = image(symbols(Symbol("f")), segments=())
    large = packed(lzma.compress(data + bytes(elf._MAX_SECTION)))
    assert found(tmp_path, stripped(large), "f") == {"f": 0x1000}
    dictionary = bytearray(lzma.compress(data))
    assert dictionary[12:16] == b"\x02\x00\x21\x01"  # a block with LZMA2 and no sizes
    dictionary[16] = 40  # 4 GiB
    dictionary[20:24] = struct.pack("<I", zlib.crc32(dictionary[12:20]))
    assert found(tmp_path, stripped(packed(bytes(dictionary))), "f") == {}
    monkeypatch.setattr(elf, "_MAX_SECTION", len(data) - 1)
    assert found(tmp_path, stripped(packed(lzma.compress(data))), "f") == {}


def test_a_large_section_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = symbols(*map(Symbol, ("f", "g", "h")))
    sizes = sorted(len(section.content) for section in table)
    monkeypatch.setattr(elf, "_MAX_SECTION", sizes[-1])
    assert found(tmp_path, image(table), "f") == {"f": 0x1000}
    monkeypatch.setattr(elf, "_MAX_SECTION", sizes[-1] - 1)
    assert found(tmp_path, image(table), "f") == {}


# What is not valid


@pytest.mark.parametrize(
    "begin", [b"", b"#!/bin/sh\n", b"\x7fELF\x01\x01", b"\x7fELF\x02\x02", b"\x7fELG\x02\x01"]
)
def test_what_is_no_64_bit_little_endian_elf_file_has_no_functions(
    tmp_path: Path, begin: bytes
) -> None:
    data = begin and begin + image(symbols(Symbol("f")))[len(begin) :]
    assert found(tmp_path, data, "f") == {}


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        function_offsets(tmp_path / "none", ["f"])


def test_a_file_may_be_truncated_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mapping of it would then end the process."""
    minidebuginfo = elf._minidebuginfo

    def truncate_before(read: Callable[[int, int], bytes]) -> bytes:
        os.truncate(tmp_path / "executable", 0)
        return minidebuginfo(read)

    monkeypatch.setattr(elf, "_minidebuginfo", truncate_before)
    assert found(tmp_path, stripped(MINI), "f") == {}


COMPLETE = image([*symbols(Symbol("f"), Symbol("g", 0x401010)), MINI, ID])
SHOFF, PHOFF = 40, 32


@given(st.integers(0, len(COMPLETE) - 1))
def test_a_torn_file_has_no_functions(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    """The table of sections is at its end."""
    assert found(tmp_path_factory.mktemp("torn"), COMPLETE[:cut], "f", "h") == {}


@given(
    st.lists(st.tuples(st.integers(6, len(COMPLETE) - 8), st.binary(min_size=1, max_size=8))),
    st.sampled_from([SHOFF, PHOFF, None]),
)
def test_a_hostile_file_does_no_harm(
    tmp_path_factory: pytest.TempPathFactory,
    damage: list[tuple[int, bytes]],
    pointer: int | None,
) -> None:
    """Whoever may execute a program that is called like a VMM has written it."""
    data = bytearray(COMPLETE)
    for at, part in damage:
        data[at : at + len(part)] = part
    if pointer is not None:
        data[pointer : pointer + 8] = b"\xff" * 8
    assert set(found(tmp_path_factory.mktemp("hostile"), bytes(data), "f", "h")) <= {"f", "h"}
