"""Offsets of members in types that are written here byte by byte.

The format is that of the kernel's Documentation/bpf/btf.rst.
"""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from tscwatch.errors import KernelUnfit
from tscwatch.linux import kvm
from tscwatch.linux.btf import Btf, kernel_btf, offsets

INT, PTR, ARRAY, STRUCT, UNION, ENUM, FWD, TYPEDEF, VOLATILE, CONST, RESTRICT, FUNC = range(1, 13)
FUNC_PROTO, VAR, DATASEC, FLOAT, DECL_TAG, TYPE_TAG, ENUM64 = range(13, 20)
KIND_FLAG = 1 << 31

Member = tuple[str, int, int]
"""Name, type id, and offset in bits."""


class Types:
    """Types in the making.

    :param base: the kernel's if these are a module's.  A module's strings begin without the empty
        one (``btf_new_empty`` in libbpf), and names that the kernel's have are not repeated.
    """

    def __init__(self, base: Types | None = None) -> None:
        self._base = base
        self._types = b""
        self._strings = b"" if base else b"\0"
        self._names: dict[str, int] = dict(base._names) if base else {"": 0}
        """The string offset of each name, also of the kernel's."""
        self._strings_from: int = base.strings_end if base else 0
        self.next_id: int = base.next_id if base else 1

    @property
    def strings_end(self) -> int:
        return self._strings_from + len(self._strings)

    def string(self, name: str) -> int:
        """Return the offset of a name, which is added if it is new."""
        if name not in self._names:
            self._names[name] = self.strings_end
            self._strings += name.encode() + b"\0"
        return self._names[name]

    def add(
        self, kind: int, name: str = "", tail: bytes = b"", entries: int = 0, target: int = 0
    ) -> int:
        """Add a type and return its id.

        :param kind: with :data:`KIND_FLAG` or without.
        :param target: the size, or the type that it refers to.
        """
        info = kind & KIND_FLAG | (kind & 0x1F) << 24 | entries
        self._types += struct.pack("<III", self.string(name), info, target) + tail
        self.next_id += 1
        return self.next_id - 1

    def struct(self, name: str, *members: Member, kind: int = STRUCT) -> int:
        tail = b"".join(
            struct.pack("<III", self.string(member), type_id, bits)
            for member, type_id, bits in members
        )
        return self.add(kind, name, tail, len(members))

    def data(self) -> bytes:
        sizes = 0, len(self._types), len(self._types), len(self._strings)
        return struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, *sizes) + self._types + self._strings


def parsed(types: Types) -> Btf:
    return Btf(types.data(), parsed(types._base) if types._base else None)


def vcpu_types() -> Types:
    """Return a kernel's types with each member of :data:`kvm.VCPU_MEMBERS`, at 8, 16 and so on."""
    types = Types()
    u32 = types.add(INT, "u32", bytes(4), target=4)
    arch = types.struct("kvm_vcpu_arch", ("first", u32, 0), ("virtual_tsc_khz", u32, 8))
    members: dict[str, list[Member]] = {}
    for number, (_, struct_name, path) in enumerate(kvm.VCPU_MEMBERS, 1):
        head, _, rest = path.partition(".")
        member = head, arch if rest else u32, number * 64
        members.setdefault(struct_name, []).append(member)
    for struct_name, found in members.items():
        types.struct(struct_name, *found)
    return types


def test_each_member_that_the_probes_read_has_an_offset() -> None:
    found = offsets(parsed(vcpu_types()), kvm.VCPU_MEMBERS)
    labels = [label for label, _, _ in kvm.VCPU_MEMBERS]
    assert found == {
        label: 8 * number + (label == "vcpu.khz") for number, label in enumerate(labels, 1)
    }


TAILS = {
    INT: 4,
    PTR: 0,
    ARRAY: 12,
    STRUCT: 3 * 12,
    UNION: 3 * 12,
    ENUM: 3 * 8,
    FWD: 0,
    TYPEDEF: 0,
    VOLATILE: 0,
    CONST: 0,
    RESTRICT: 0,
    FUNC: 0,
    FUNC_PROTO: 3 * 8,
    VAR: 4,
    DATASEC: 3 * 12,
    FLOAT: 0,
    DECL_TAG: 4,
    TYPE_TAG: 0,
    ENUM64: 3 * 12,
}
"""How many bytes follow a type of each kind that has 3 entries, if its kind has entries."""


@pytest.mark.parametrize(("kind", "size"), TAILS.items())
def test_a_type_of_any_kind_may_come_before(kind: int, size: int) -> None:
    """The number of entries of a FUNC is its linkage, and none follow."""
    entries = 3 if size > 12 or kind == FUNC else 0
    types = Types()
    types.add(kind, "other", b"\xff" * size, entries)
    u32 = types.add(INT, "u32", bytes(4), target=4)
    types.struct("wanted", ("a", u32, 0), ("b", u32, 32))
    btf = parsed(types)
    assert btf.offset("wanted", "b") == 4
    assert btf.ids_end == types.next_id


def test_members_of_embedded_structs_are_found_by_their_path() -> None:
    types = Types()
    u32 = types.add(INT, "u32", bytes(4), target=4)
    inner = types.struct("inner", ("a", u32, 0), ("khz", u32, 64))
    outer = types.struct("outer", ("head", u32, 0), ("inner", inner, 128))
    types.struct("outermost", ("outer", outer, 256))
    btf = parsed(types)
    assert btf.offset("outer", "inner.khz") == 16 + 8
    assert btf.offset("outermost", "outer.inner.khz") == 32 + 16 + 8
    assert btf.offset("outermost", "outer.inner") == 32 + 16


@pytest.mark.parametrize("modifier", [TYPEDEF, VOLATILE, CONST, RESTRICT, TYPE_TAG])
def test_modifiers_are_looked_through(modifier: int) -> None:
    types = Types()
    u32 = types.add(INT, "u32", bytes(4), target=4)
    inner = types.struct("inner", ("a", u32, 0), ("khz", u32, 64))
    modified = types.add(modifier, target=types.add(modifier, target=inner))
    types.struct("outer", ("inner", modified, 128))
    assert parsed(types).offset("outer", "inner.khz") == 24


@pytest.mark.parametrize("other", [PTR, FWD, FUNC, FLOAT])
def test_a_pointer_is_not_followed(other: int) -> None:
    """What it points to is not embedded, so its members have no offset in this struct."""
    types = Types()
    u32 = types.add(INT, "u32", bytes(4), target=4)
    inner = types.struct("inner", ("khz", u32, 64))
    types.struct("outer", ("inner", types.add(other, target=inner), 128))
    assert parsed(types).offset("outer", "inner") == 16
    with pytest.raises(KeyError, match="struct outer has no member"):
        parsed(types).offset("outer", "inner.khz")


def test_members_of_anonymous_structs_and_unions_are_those_of_the_struct() -> None:
    types = Types()
    u32 = types.add(INT, "u32", bytes(4), target=4)
    named = types.struct("named", ("d", u32, 0), ("e", u32, 96))
    innermost = types.struct("", ("a", u32, 0), ("b", u32, 32), ("named", named, 64))
    union = types.struct("", ("c", u32, 0), ("", innermost, 0), kind=UNION)
    types.struct("outer", ("head", u32, 0), ("", union, 64), ("tail", u32, 256))
    expected = {"head": 0, "a": 8, "b": 12, "named": 16, "named.e": 28, "c": 8, "tail": 32}
    assert {path: parsed(types).offset("outer", path) for path in expected} == expected


def test_an_embedded_struct_hides_its_members_namesakes() -> None:
    """Only ``outer.pid`` is meant, not ``outer.notifier.pid``, which comes first."""
    types = Types()
    u32 = types.add(INT, "u32", bytes(4), target=4)
    notifier = types.struct("notifier", ("pid", u32, 0))
    types.struct("outer", ("notifier", notifier, 64), ("pid", u32, 128))
    assert parsed(types).offset("outer", "pid") == 16
    assert parsed(types).offset("outer", "notifier.pid") == 8


def test_an_embedded_struct_is_the_one_that_the_member_has_and_not_its_namesake() -> None:
    """Two source files can define different structs of one name."""
    types = Types()
    u32 = types.add(INT, "u32", bytes(4), target=4)
    types.struct("arch", ("khz", u32, 0))
    embedded = types.struct("arch", ("a", u32, 0), ("khz", u32, 32))
    types.struct("outer", ("arch", embedded, 64))
    assert parsed(types).offset("outer", "arch.khz") == 12
    assert parsed(types).offset("arch", "khz") == 0


@pytest.mark.parametrize("kind", [UNION, ENUM, FWD, TYPEDEF, FUNC])
def test_only_a_struct_is_found_by_its_name(kind: int) -> None:
    """A name can be that of a struct and of something else, as of a forward declaration."""
    types = Types()
    u32 = types.add(INT, "u32", bytes(4), target=4)
    types.add(kind, "outer", target=u32)
    with pytest.raises(KeyError, match="no struct outer"):
        parsed(types).offset("outer", "khz")
    types.struct("outer", ("khz", u32, 32))
    assert parsed(types).offset("outer", "khz") == 4


@pytest.mark.parametrize(("size", "bits"), [(0, 64), (3, 65), (7, 71), (31, 0x7FFFF8)])
def test_bit_fields_have_the_offset_of_their_byte(size: int, bits: int) -> None:
    types = Types()
    u32 = types.add(INT, "u32", bytes(4), target=4)
    types.struct("outer", ("flag", u32, size << 24 | bits), kind=STRUCT | KIND_FLAG)
    assert parsed(types).offset("outer", "flag") == bits // 8


def test_without_bit_fields_an_offset_has_32_bits() -> None:
    types = Types()
    u32 = types.add(INT, "u32", bytes(4), target=4)
    types.struct("outer", ("far", u32, 1 << 24))
    assert parsed(types).offset("outer", "far") == 1 << 21


def test_what_is_missing_is_named() -> None:
    types = Types()
    u32 = types.add(INT, "u32", bytes(4), target=4)
    types.struct("outer", ("khz", u32, 0))
    btf = parsed(types)
    for name, path, sentence in (
        ("khz", "a", "no struct khz"),
        ("oute", "khz", "no struct oute"),
        ("uter", "khz", "no struct uter"),
        ("outer", "kh", "struct outer has no member kh"),
        ("outer", "hz", "struct outer has no member hz"),
    ):
        with pytest.raises(KernelUnfit, match=f"\\({sentence}\\)"):
            offsets(btf, [("label", name, path)])


# A module's types continue those of the kernel


def kernel_and_module() -> tuple[Types, Types]:
    """Return a kernel with ``struct kvm`` in full and ``struct kvm_vcpu`` only declared."""
    kernel = Types()
    u32 = kernel.add(INT, "u32", bytes(4), target=4)
    kernel.struct("list", ("next", u32, 0), ("prev", u32, 64))
    kernel.add(FWD, "kvm_vcpu")
    kernel.struct("kvm", ("mm", u32, 64))
    return kernel, Types(kernel)


def test_a_modules_struct_may_consist_of_the_kernels_types_and_names() -> None:
    kernel, module = kernel_and_module()
    arch = module.struct("arch", ("a", 1, 0), ("prev", 1, 32))
    module.struct("kvm_vcpu", ("mm", 2, 64), ("arch", arch, 256), ("next", 1, 512))
    btf = parsed(module)
    assert btf.offset("kvm_vcpu", "mm.prev") == 8 + 8
    assert btf.offset("kvm_vcpu", "arch.prev") == 32 + 4
    assert btf.offset("kvm_vcpu", "next") == 64
    assert btf.offset("kvm", "mm") == 8
    assert (btf.ids_end, btf.strings_end) == (module.next_id, module.strings_end)
    with pytest.raises(KeyError, match="no struct kvm_vcpu"):
        parsed(kernel).offset("kvm_vcpu", "mm")


def test_a_module_may_have_its_own_struct_of_the_same_name() -> None:
    _, module = kernel_and_module()
    module.struct("kvm", ("mm", 1, 128))
    assert parsed(module).offset("kvm", "mm") == 16


def test_the_first_string_of_a_module_is_a_name_too() -> None:
    """No empty string comes before it, unlike in the kernel's."""
    _, module = kernel_and_module()
    module.struct("vcpu_vmx", ("next", 1, 64))
    assert parsed(module).offset("vcpu_vmx", "next") == 8


# The files


def test_the_types_of_a_module_that_is_built_in_are_the_kernels(tmp_path: Path) -> None:
    kernel, module = kernel_and_module()
    module.struct("vcpu_vmx", ("next", 1, 64))
    (tmp_path / "vmlinux").write_bytes(kernel.data())
    assert kernel_btf("kvm", tmp_path).offset("kvm", "mm") == 8
    (tmp_path / "kvm").write_bytes(module.data())
    assert kernel_btf("kvm", tmp_path).offset("kvm", "mm") == 8
    assert kernel_btf("kvm", tmp_path).offset("vcpu_vmx", "next") == 8


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "swapped"])
def test_types_that_cannot_be_read_are_one_sentence(tmp_path: Path, damage: str) -> None:
    data = kernel_and_module()[0].data()
    damaged = {"empty": b"", "cut": data[:60], "swapped": data[1::-1] + data[2:]}
    if damage in damaged:
        (tmp_path / "vmlinux").write_bytes(damaged[damage])
    with pytest.raises(KernelUnfit, match="CONFIG_DEBUG_INFO_BTF"):
        kernel_btf("kvm", tmp_path)
