"""Offsets of struct members in the running kernel, from its BTF.

With the offsets, BPF programs can be compiled without the headers of the running kernel, and the
fetch arguments of ftrace's kprobe events can follow pointers.  The format is described in the
kernel's ``Documentation/bpf/btf.rst``.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

from tscwatch.errors import KernelUnfit

BTF_DIR = Path("/sys/kernel/btf")
"""Contains ``vmlinux``, the kernel's own types, and a file for each module that is loaded."""

_MAGIC = 0xEB9F
_HEADER = struct.Struct("<HBBIIIII")  # struct btf_header
_TYPE = struct.Struct("<III")  # struct btf_type
_MEMBER = struct.Struct("<III")  # struct btf_member

# Values of BTF_KIND_*, and the bytes that follow a struct btf_type of each kind.
_INT, _ARRAY, _STRUCT, _UNION, _ENUM, _FUNC_PROTO = 1, 3, 4, 5, 6, 13
_VAR, _DATASEC, _DECL_TAG, _ENUM64 = 14, 15, 17, 19
_MODIFIERS = frozenset({8, 9, 10, 11, 18})  # typedef, volatile, const, restrict, type tag
_FIXED_TAIL = {_INT: 4, _ARRAY: 12, _VAR: 4, _DECL_TAG: 4}
_TAIL_PER_ENTRY = {_STRUCT: 12, _UNION: 12, _ENUM: 8, _FUNC_PROTO: 8, _DATASEC: 12, _ENUM64: 12}


class Btf:
    """The types of the kernel or of a module.

    :param data: the contents of a file in :data:`BTF_DIR`.
    :param base: the kernel's types if the data are a module's: a module's BTF is split, and its
        type ids and string offsets continue those of the kernel.
    :raises ValueError: the data are not little-endian BTF.
    """

    def __init__(self, data: bytes, base: Btf | None = None) -> None:
        magic, _, _, header, types, types_len, strings, strings_len = _HEADER.unpack_from(data)
        if magic != _MAGIC:
            raise ValueError("not BTF")
        self._base = base
        self._data = data
        self._strings = data[header + strings : header + strings + strings_len]
        self._strings_from = base.strings_end if base else 0
        self._ids_from = base.ids_end if base else 1
        self._positions: list[int] = []
        """The position of each type in the data, in the order of type ids."""
        self._structs: dict[int, int] = {}
        """The type id of each struct by its name's string offset."""
        self._walk(header + types, header + types + types_len)

    @property
    def strings_end(self) -> int:
        """The string offset at which a module's strings begin."""
        return self._strings_from + len(self._strings)

    @property
    def ids_end(self) -> int:
        """The first type id of a module."""
        return self._ids_from + len(self._positions)

    def offset(self, name: str, path: str) -> int:
        """Return the byte offset of a member.

        :param name: of the struct.
        :param path: the member, or ``member.member`` for one of an embedded struct or union.

        :raises KeyError: there is no such struct or member; its argument is the sentence.
        """
        type_id = self._struct(name)
        total = 0
        for member in path.split("."):
            found = self._member(type_id, member)
            if found is None:
                raise KeyError(f"struct {name} has no member {path}")
            type_id, bits = found
            total += bits // 8
        return total

    def _walk(self, position: int, end: int) -> None:
        while position < end:
            name, info, _ = _TYPE.unpack_from(self._data, position)
            kind, entries = info >> 24 & 0x1F, info & 0xFFFF
            if kind == _STRUCT:
                self._structs.setdefault(name, self.ids_end)
            self._positions.append(position)
            position += _TYPE.size + _FIXED_TAIL.get(kind, 0)
            position += _TAIL_PER_ENTRY.get(kind, 0) * entries

    def _struct(self, name: str) -> int:
        name_offset = self._name_offset(name)
        if name_offset in self._structs:
            return self._structs[name_offset]
        if self._base is None:
            raise KeyError(f"no struct {name}")
        return self._base._struct(name)

    def _name_offset(self, name: str) -> int:
        """Return the string offset of a name, -1 if there is none.

        A name that is in the kernel's strings is not repeated in a module's, and only the kernel's
        begin with an empty string (``btf_parse_str_sec``).
        """
        in_base = self._base._name_offset(name) if self._base else -1
        at = (b"\0" + self._strings).find(b"\0" + name.encode() + b"\0")
        return in_base if at < 0 or in_base >= 0 else self._strings_from + at

    def _name(self, offset: int) -> str:
        if offset < self._strings_from and self._base is not None:
            return self._base._name(offset)
        at = offset - self._strings_from
        return self._strings[at : self._strings.index(b"\0", at)].decode()

    def _member(self, type_id: int, wanted: str) -> tuple[int, int] | None:
        """Return the type id and bit offset of a member, also inside anonymous structs and unions.

        The result is None if the type has no such member.
        """
        owner, position = self._locate(type_id)
        _, info, target = _TYPE.unpack_from(owner._data, position)
        if info >> 24 & 0x1F in _MODIFIERS:
            return self._member(target, wanted)
        if info >> 24 & 0x1F not in (_STRUCT, _UNION):
            return None
        for index in range(info & 0xFFFF):
            at = position + _TYPE.size + index * _MEMBER.size
            name_offset, member_type, bits = _MEMBER.unpack_from(owner._data, at)
            if info >> 31:  # kind_flag: the upper byte is the size of a bit field
                bits &= 0xFFFFFF
            if name_offset:
                if owner._name(name_offset) == wanted:
                    return member_type, bits
                continue
            inner = self._member(member_type, wanted)
            if inner is not None:
                return inner[0], inner[1] + bits
        return None

    def _locate(self, type_id: int) -> tuple[Btf, int]:
        """Return the object that has a type, and the type's position in its data."""
        if type_id < self._ids_from and self._base is not None:
            return self._base._locate(type_id)
        return self, self._positions[type_id - self._ids_from]


def kernel_btf(module: str, directory: Path = BTF_DIR) -> Btf:
    """Read the types of a module, or of the kernel itself if the module is built in.

    :raises KernelUnfit: the kernel has no readable BTF (``CONFIG_DEBUG_INFO_BTF``).
    """
    try:
        base = Btf((directory / "vmlinux").read_bytes())
        path = directory / module
        return Btf(path.read_bytes(), base) if path.exists() else base
    except (OSError, ValueError, struct.error) as error:
        raise KernelUnfit(
            f"the kernel's type information cannot be read ({error}): "
            "use a kernel built with CONFIG_DEBUG_INFO_BTF"
        ) from error


def offsets(btf: Btf, members: Sequence[tuple[str, str, str]]) -> dict[str, int]:
    """Return the byte offsets of members by their labels.

    :param members: ``(label, struct, member path)``; for the path see :meth:`Btf.offset`.
    :raises KernelUnfit: the kernel's structs do not have these members.
    """
    try:
        return {label: btf.offset(name, path) for label, name, path in members}
    except KeyError as error:
        raise KernelUnfit(
            f"tscwatch does not support the data structures of this kernel ({error.args[0]}): "
            "please report it with the output of uname -r"
        ) from error
