"""Find functions in an executable by name, for uprobes.

A stripped executable can have its symbols elsewhere.  The first of these that names any of the
functions is used:

* the executable's own symbol table;
* its section ``.gnu_debugdata``, an xz-compressed ELF file (GDB manual, "MiniDebugInfo");
* the debug file for its build id (GDB manual, "Separate Debug Files").

The format is ELF of the System V ABI; only 64-bit little-endian files are read.
"""

from __future__ import annotations

import lzma
import os
import struct
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple, Optional

DEBUG_FILES = Path("/usr/lib/debug/.build-id")

_MAGIC = b"\x7fELF\x02\x01"  # 64 bits, little-endian
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")  # Elf64_Ehdr
_PHOFF, _SHOFF, _PHNUM, _SHNUM, _SHSTRNDX = 5, 6, 10, 12, 13  # indices of its fields
_SECTION = struct.Struct("<IIQQQQIIQQ")  # Elf64_Shdr
_SEGMENT = struct.Struct("<IIQQQQQQ")  # Elf64_Phdr
_SYMBOL = struct.Struct("<IBBHQQ")  # Elf64_Sym
_SHT_SYMTAB, _PT_LOAD, _STT_FUNC = 2, 1, 2
_MAX_SECTION = 1 << 24  # bytes; QEMU's largest symbol table has some MiB
_MAX_DICTIONARY = 1 << 27  # bytes; xz uses at most half of it

_Read = Callable[[int, int], bytes]
"""Takes an offset and a size, and returns fewer bytes at the end."""


class _Section(NamedTuple):
    name: int
    kind: int
    offset: int
    size: int
    link: int


def function_offsets(
    path: Path, names: Collection[str], debug_files: Path = DEBUG_FILES
) -> dict[str, int]:
    """Return the file offsets of functions, which uprobes take, by name.

    A function that is not found is left out.  The result is empty if the file is not valid ELF.

    :param debug_files: the directory of debug files by build id.
    :raises OSError: the executable or its debug file cannot be read.
    """
    try:
        with path.open("rb") as file:
            # Not mapped: if somebody truncates it meanwhile, SIGBUS would end this process.
            read = partial(_read_file, file.fileno())
            addresses = (
                _addresses(read, names)
                or _addresses(partial(_read_bytes, _minidebuginfo(read)), names)
                or _addresses(partial(_read_bytes, _debug_file(read, debug_files)), names)
            )
            return {name: _file_offset(read, address) for name, address in addresses.items()}
    except (ValueError, IndexError, OverflowError, struct.error, lzma.LZMAError):
        return {}


def _read_file(descriptor: int, offset: int, size: int) -> bytes:
    return os.pread(descriptor, size, offset)


def _read_bytes(data: bytes, offset: int, size: int) -> bytes:
    return data[offset : offset + size]


def _addresses(read: _Read, names: Collection[str]) -> dict[str, int]:
    """Return the virtual addresses of the functions that an ELF file's symbol table defines."""
    sections = _sections(read)
    section = next((each for each in sections if each.kind == _SHT_SYMTAB), None)  # the only one
    if section is None:
        return {}
    wanted = dict(_string_offsets(_content(read, sections[section.link]), names))
    addresses: dict[str, int] = {}
    for name, info, _, section_index, value, _ in _SYMBOL.iter_unpack(_content(read, section)):
        is_defined = section_index != 0
        if name in wanted and info & 0xF == _STT_FUNC and is_defined:
            addresses[wanted[name]] = value
    return addresses


def _string_offsets(strings: bytes, names: Collection[str]) -> Iterator[tuple[int, str]]:
    """Yield each offset in a string table at which a name can be read.

    A name can be the end of a longer one: linkers store common suffixes once.
    """
    for name in names:
        at = strings.find(name.encode() + b"\0")
        while at >= 0:
            yield at, name
            at = strings.find(name.encode() + b"\0", at + 1)


def _minidebuginfo(read: _Read) -> bytes:
    packed = _section_by_name(read, b".gnu_debugdata")
    decompressor = lzma.LZMADecompressor(memlimit=_MAX_DICTIONARY)
    return decompressor.decompress(packed, _MAX_SECTION) if packed else b""


def _debug_file(read: _Read, directory: Path) -> bytes:
    note = _section_by_name(read, b".note.gnu.build-id")
    if not note:
        return b""
    name_size, size = struct.unpack_from("<II", note)
    build_id = note[12 + name_size : 12 + name_size + size].hex()
    path = directory / build_id[:2] / f"{build_id[2:]}.debug"
    return path.read_bytes() if path.exists() else b""


def _sections(read: _Read) -> list[_Section]:
    if read(0, len(_MAGIC)) != _MAGIC:
        return []
    header = _HEADER.unpack(read(0, _HEADER.size))
    table = read(header[_SHOFF], header[_SHNUM] * _SECTION.size)
    if len(table) < header[_SHNUM] * _SECTION.size:
        raise ValueError("the table of sections is incomplete")
    return [
        _Section(name, kind, offset, size, link)
        for name, kind, _, _, offset, size, link, *_ in _SECTION.iter_unpack(table)
    ]


def _section_by_name(read: _Read, wanted: bytes) -> Optional[bytes]:
    sections = _sections(read)
    if not sections:
        return None
    names = _content(read, sections[_HEADER.unpack(read(0, _HEADER.size))[_SHSTRNDX]])
    for section in sections:
        if names.startswith(wanted + b"\0", section.name):
            return _content(read, section)
    return None


def _content(read: _Read, section: _Section) -> bytes:
    if section.size > _MAX_SECTION:
        raise ValueError("section too large")
    return read(section.offset, section.size)


def _file_offset(read: _Read, address: int) -> int:
    """Return the offset in the file of a virtual address, from the segment that loads it."""
    header = _HEADER.unpack(read(0, _HEADER.size))
    table = read(header[_PHOFF], header[_PHNUM] * _SEGMENT.size)
    for kind, _, offset, segment_address, _, size, *_ in _SEGMENT.iter_unpack(table):
        if kind == _PT_LOAD and segment_address <= address < segment_address + size:
            return int(address - segment_address + offset)
    raise ValueError("the address is in no segment")
