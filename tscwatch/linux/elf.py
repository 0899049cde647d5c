"""Where functions are in an executable: its symbol table, minidebuginfo, or separate debug file.

ELF as in the System V ABI (64 bits, little-endian); ``.gnu_debugdata`` and the place of debug files
as in GDB's manual ("MiniDebugInfo", "Separate Debug Files").
"""

from __future__ import annotations

import lzma
import mmap
import struct
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple, Optional, Union

DEBUG_FILES = Path("/usr/lib/debug/.build-id")

_MAGIC = b"\x7fELF\x02\x01"
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SEGMENT = struct.Struct("<IIQQQQQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_SYMTAB, _LOAD, _FUNCTION = 2, 1, 2
_MAX_TABLE = 1 << 24  # bytes; QEMU's are some MiB

_Bytes = Union[bytes, mmap.mmap]


class _Section(NamedTuple):
    name: int
    kind: int
    offset: int
    size: int
    link: int


def functions(
    path: Path, names: Collection[str], debug_files: Path = DEBUG_FILES
) -> dict[str, int]:
    """File offset of each named function, as uprobes want it; empty where nothing names them.

    :raises OSError: the executable cannot be read.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as image:
            addresses = (
                _addresses(image, names)
                or _addresses(_minidebuginfo(image), names)
                or _addresses(_debug_file(image, debug_files), names)
            )
            return {name: _file_offset(image, at) for name, at in addresses.items()}
    except (ValueError, IndexError, struct.error, lzma.LZMAError):
        return {}  # not an executable as we know them


def _sections(image: _Bytes) -> list[_Section]:
    if image[: len(_MAGIC)] != _MAGIC:
        return []
    header = _HEADER.unpack_from(image)
    start, count = header[6], header[12]
    sections = []
    for index in range(count):
        fields = _SECTION.unpack_from(image, start + index * _SECTION.size)
        name, kind, _, _, offset, size, link = fields[:7]
        sections.append(_Section(name, kind, offset, size, link))
    return sections


def _content(image: _Bytes, section: _Section) -> bytes:
    if section.size > _MAX_TABLE:
        raise ValueError("a section larger than any that we look for")
    return image[section.offset : section.offset + section.size]


def _named(image: _Bytes, wanted: bytes) -> Optional[bytes]:
    """The content of a section, by its name."""
    sections = _sections(image)
    if not sections:
        return None
    names = _content(image, sections[_HEADER.unpack_from(image)[13]])
    for section in sections:
        if names[section.name :].startswith(wanted + b"\0"):
            return _content(image, section)
    return None


def _addresses(image: _Bytes, names: Collection[str]) -> dict[str, int]:
    sections = _sections(image)
    found: dict[str, int] = {}
    for section in sections:
        if section.kind != _SYMTAB:
            continue
        wanted = dict(_places(_content(image, sections[section.link]), names))
        table = _content(image, section)
        for name, info, _, defined, value, _ in _SYMBOL.iter_unpack(table):
            if name in wanted and info & 0xF == _FUNCTION and defined:
                found[wanted[name]] = value
    return found


def _places(strings: bytes, names: Collection[str]) -> Iterator[tuple[int, str]]:
    """Where a name may be in a string table: also at the end of a longer one (ld merges them)."""
    for name in names:
        at = strings.find(name.encode() + b"\0")
        while at >= 0:
            yield at, name
            at = strings.find(name.encode() + b"\0", at + 1)


def _minidebuginfo(image: _Bytes) -> bytes:
    packed = _named(image, b".gnu_debugdata")
    return lzma.LZMADecompressor().decompress(packed, _MAX_TABLE) if packed else b""


def _debug_file(image: _Bytes, directory: Path) -> bytes:
    note = _named(image, b".note.gnu.build-id")
    if not note:
        return b""
    name_size, size = struct.unpack_from("<II", note)
    build_id = note[12 + name_size : 12 + name_size + size].hex()
    path = directory / build_id[:2] / f"{build_id[2:]}.debug"
    return path.read_bytes() if path.exists() else b""


def _file_offset(image: _Bytes, address: int) -> int:
    header = _HEADER.unpack_from(image)
    start, count = header[5], header[10]
    for index in range(count):
        fields = _SEGMENT.unpack_from(image, start + index * _SEGMENT.size)
        kind, _, offset, virtual, _, size = fields[:6]
        if kind == _LOAD and virtual <= address < virtual + size:
            return int(address - virtual + offset)
    raise ValueError("a function outside all segments")
