"""Get the bytecode of the programs in ``bpf/``, which does not depend on the running kernel.

The bytecode has placeholders instead of the offsets in the kernel's structs.  The loader replaces
them with those of the running kernel (:mod:`tscwatch.linux.btf`).  So a package has bytecode that
was compiled when the package was built (:func:`precompile`).  It is used if it was compiled from
the same sources and macros.  Else bcc compiles them.

The compiler: bcc loads LLVM, which is large and needed only at start.  bcc therefore runs in a
child process (:func:`main`), which returns the bytecode and exits.  The bytecode is stored in
:data:`CACHE` under a hash of the source and its macros, and reused until they change.  Bytecode
that is damaged is compiled again.

The headers: bcc parses the kernel headers in ``/lib/modules/RELEASE/{build,source}``, or those in
the directory that the environment variable ``BCC_KERNEL_SOURCE`` names.  The headers of any kernel
of the architecture will do if there are none of the running one.

As bcc runs as root, neither stored bytecode nor headers are used if another user can write them.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
import stat
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module, resources
from pathlib import Path
from typing import Any, Literal, NamedTuple, Optional

from tscwatch.errors import BccMissing, HeadersMissing, KernelUnfit

log = logging.getLogger(__name__)

CACHE = Path("/var/cache/tscwatch")

HEADERS_REMEDY = (
    "install them with 'apt-get install linux-headers-amd64' (Debian), "
    "'apt-get install linux-headers-generic' (Ubuntu) or 'dnf install kernel-devel' (Fedora, EL)"
)

_COMPILE_TIMEOUT_S = 600
_EXIT_NO_BCC = 3

# The child imports from the same directories as its parent, and never from its working directory.
_CHILD = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from tscwatch.linux.compiler import main; sys.exit(main())"
)

# struct bpf_insn: opcode, registers, offset, immediate value
_INSN = struct.Struct("=BBhi")
_LD_IMM64, _PSEUDO_MAP_FD = 0x18, 1

_PLACEHOLDER = 0x7463735477617463
"""Stands for the first offset, the next number for the second, and so on."""

_MODULES = Path("/lib/modules")
_SOURCES = Path("/usr/src")
_INCLUDE_DIRS = ("include", "arch/x86/include")
_REQUIRED_HEADERS = (
    "include/linux/kconfig.h",
    "include/generated/autoconf.h",
    "arch/x86/include/asm",
)


Origin = Literal["packaged", "stored", "compiled"]


class Map(NamedTuple):
    """The attributes of a map, as BPF_MAP_CREATE takes them (bpf(2))."""

    name: str
    map_type: int
    key_size: int
    value_size: int
    max_entries: int
    map_flags: int


class Source(NamedTuple):
    """What a program is compiled from."""

    file: str
    """Its name in ``bpf/``."""
    offsets: tuple[str, ...]
    """The label of each offset that it needs; ``vcpu.kvm`` is the macro ``VCPU_KVM_OFFSET``."""
    macros: Mapping[str, int]
    """Passed to the compiler as ``-D`` options."""
    maps: tuple[str, ...]

    def request(self) -> str:
        """Return the request to the compiler's process: see :func:`main`."""
        directory = resources.files("tscwatch") / "bpf"
        text = (directory / "tscwatch.h").read_text() + (directory / self.file).read_text()
        flags = [f"-D{macro}={value}" for macro, value in sorted(self.macros.items())]
        for index, label in enumerate(self.offsets):
            macro = label.upper().replace(".", "_")
            flags.append(f"-D{macro}_OFFSET=OFFSET({_PLACEHOLDER + index:#x})")
        return json.dumps({"text": text, "flags": flags, "maps": self.maps})


@dataclass(frozen=True)
class Program:
    """The bytecode of one file: its maps, and its functions by name.

    The immediate value of an instruction that loads a map is the map's index in ``maps``.  Where an
    offset belongs, there is a placeholder (:func:`with_offsets`).
    """

    maps: list[Map]
    functions: dict[str, bytes]
    origin: Origin


def get_program(source: Source, cache: Path = CACHE) -> Program:
    """Return a program's bytecode: the package's, else the stored one, else compile it.

    :raises BccMissing: this interpreter has no bcc.
    :raises HeadersMissing: there are no kernel headers on this host.
    :raises KernelUnfit: the file does not compile.
    """
    request = source.request()
    key = _hash(request)
    path = cache / f"{source.file}.json"
    response = _read_package(source.file, key)
    if response is not None:
        return _program(response, "packaged")
    response = _read_cache(path, key)
    if response is not None:
        return _program(response, "stored")
    response = _run_child(source.file, request)
    _write_cache(path, key, response)
    return _program(response, "compiled")


def is_packaged(source: Source) -> bool:
    """Return whether the package has the bytecode of a program."""
    return _read_package(source.file, _hash(source.request())) is not None


def precompile(sources: Iterable[Source], directory: Path) -> None:
    """Compile programs for a package, which must have them beside their sources.

    bcc creates the programs' maps in the kernel, so this needs the same rights as to run them.

    :raises TscwatchError: as :func:`get_program`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for source in sources:
        request = source.request()
        response = _run_child(source.file, request)
        for code in _program(response, "compiled").functions.values():
            with_offsets(code, [0] * len(source.offsets))  # each placeholder is in one piece
        (directory / f"{source.file}.json").write_text(_packed(_hash(request), response))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _packed(key: str, response: str) -> str:
    """Return the contents of a file with a response: the key, the response's hash, and itself."""
    return f"{key} {_hash(response)}\n{response}\n"


def _unpacked(path: object, contents: str, key: str) -> Optional[str]:
    """Return the response in a file's contents, None if it has another key or is damaged."""
    head, _, response = contents.removesuffix("\n").partition("\n")
    if head == f"{key} {_hash(response)}":
        return response
    if head.startswith(key):
        log.warning("%s is ignored: it is damaged", path)
    return None


def _program(response: str, origin: Origin) -> Program:
    compiled = json.loads(response)
    functions = {name: base64.b64decode(code) for name, code in compiled["functions"].items()}
    return Program([Map(*attributes) for attributes in compiled["maps"]], functions, origin)


def _read_package(file: str, key: str) -> Optional[str]:
    """Return the response that the package has, None if it has none for this key."""
    path = resources.files("tscwatch") / "bpf" / f"{file}.json"
    if not path.is_file():
        return None
    contents = path.read_bytes().decode(errors="replace")
    if not contents.startswith(key):
        log.warning("%s is ignored: it was compiled from another source, or is damaged", path)
    return _unpacked(path, contents, key)


def is_trusted(status: os.stat_result) -> bool:
    """Return whether only root, or the user that runs tscwatch, can write a file or directory."""
    writable = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return status.st_uid in (0, os.geteuid()) and not writable


# The cache


def _read_cache(path: Path, key: str) -> Optional[str]:
    """Return the response stored under this key, None if there is none that can be trusted."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    with os.fdopen(descriptor, encoding="ascii", errors="replace") as file:
        if not all(map(is_trusted, (os.fstat(descriptor), path.parent.stat()))):
            log.warning("%s is ignored: users other than root can write it", path)
            return None
        return _unpacked(path, file.read(), key)


def _write_cache(path: Path, key: str, response: str) -> None:
    temporary = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(_packed(key, response))
        temporary.replace(path)
    except OSError as error:
        log.info("the compiled program cannot be stored for the next start: %s", error)


# The compiler's process


def _run_child(file: str, request: str) -> str:
    try:
        with headers_for_bcc():
            child = subprocess.run(
                [sys.executable, "-c", _CHILD, json.dumps(sys.path)],
                input=request,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_COMPILE_TIMEOUT_S,
                check=False,
            )
    except subprocess.TimeoutExpired as error:
        raise KernelUnfit(
            f"bcc did not compile bpf/{file} within {_COMPILE_TIMEOUT_S} s: use --source ftrace"
        ) from error
    except OSError as error:  # a read-only root, and no tmpfs on /tmp
        raise KernelUnfit(
            f"bcc cannot compile bpf/{file} ({error.strerror}): make /tmp writable, or use "
            "--source ftrace"
        ) from error
    if child.returncode == _EXIT_NO_BCC:
        raise BccMissing(
            f"{sys.executable} has no bcc: install python3-bpfcc (Debian, Ubuntu) or python3-bcc "
            "(Fedora, EL), and run tscwatch with the distribution's python3"
        )
    if child.returncode:
        lines = child.stderr.strip().splitlines() or [
            f"its process exited with status {child.returncode}"
        ]
        # The last line is bcc's exception; clang's first messages are at the beginning.
        detail = "; ".join([lines[-1], *lines[:3]])
        raise KernelUnfit(f"bcc could not compile bpf/{file}: {detail}")
    return child.stdout


def main() -> int:
    """Compile a program in the child process, and return the process's exit status.

    Standard input has the request, ``{"text": C source, "flags": [...], "maps": [name, ...]}``.
    Standard output gets the response, ``{"maps": [Map, ...], "functions": {name: base64}}``.
    """
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # bcc prints to standard output, which must have the response alone
    try:
        bcc: Any = import_module("bcc")
    except ImportError:
        return _EXIT_NO_BCC
    request = json.load(sys.stdin)
    module = bcc.BPF(text=request["text"], cflags=request["flags"])
    json.dump(_response(bcc.lib, module, request["maps"]), output)
    output.close()
    return 0


def _response(lib: Any, module: Any, map_names: Sequence[str]) -> dict[str, Any]:
    """Return the maps and functions of a bcc module as they are sent to the parent.

    bcc has created the maps, and its bytecode refers to their descriptors.
    """
    descriptors = [lib.bpf_table_fd(module.module, name.encode()) for name in map_names]
    indices = {descriptor: index for index, descriptor in enumerate(descriptors)}
    functions = {}
    for number in range(lib.bpf_num_functions(module.module)):
        name = lib.bpf_function_name(module.module, number)
        code = relocated(module.dump_func(name), indices)
        functions[name.decode()] = base64.b64encode(code).decode()
    maps = [Map(name, *_map_attributes(fd)) for name, fd in zip(map_names, descriptors)]
    return {"maps": maps, "functions": functions}


def _map_attributes(descriptor: int) -> Iterator[int]:
    """Yield the fields of :class:`Map` after the name, from fdinfo (``bpf_map_show_fdinfo``)."""
    lines = Path(f"/proc/self/fdinfo/{descriptor}").read_text().splitlines()
    attributes = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    return (int(attributes[name], 0) for name in Map._fields[1:])


def relocated(code: bytes, maps: Mapping[int, int]) -> bytes:
    """Return BPF instructions with the reference to a map replaced in each that loads one.

    :param maps: the new references by the old ones.  The compiler replaces descriptors with
        indices into :attr:`Program.maps`, and the loader indices with descriptors of its own.
    """
    copy = bytearray(code)
    for at in range(0, len(code), _INSN.size):
        opcode, registers, offset, value = _INSN.unpack_from(code, at)
        if (opcode, registers >> 4) == (_LD_IMM64, _PSEUDO_MAP_FD):
            _INSN.pack_into(copy, at, opcode, registers, offset, maps[value])
    return bytes(copy)


def with_offsets(code: bytes, offsets: Sequence[int]) -> bytes:
    """Return BPF instructions with the placeholders replaced.

    :param offsets: in the order of :attr:`Source.offsets`.
    :raises KernelUnfit: a placeholder is not what an instruction loads, or stands for no offset.
    """
    copy = bytearray(code)
    for at in range(0, len(code) - _INSN.size, _INSN.size):
        opcode, registers, offset, low = _INSN.unpack_from(code, at)
        *second, high = _INSN.unpack_from(code, at + _INSN.size)
        index = (high << 32 | low & 0xFFFFFFFF) - _PLACEHOLDER
        if opcode == _LD_IMM64 and 0 <= index < len(offsets):
            _INSN.pack_into(copy, at, opcode, registers, offset, offsets[index])
            _INSN.pack_into(copy, at + _INSN.size, *second, 0)
    if _PLACEHOLDER.to_bytes(8, "little")[4:] in copy:
        raise KernelUnfit("the BPF program's bytecode is damaged: install tscwatch anew")
    return bytes(copy)


# The kernel headers


@contextmanager
def headers_for_bcc(modules: Path = _MODULES, sources: Path = _SOURCES) -> Iterator[None]:
    """Let bcc, in this process and its children, find kernel headers inside the context.

    If neither the running kernel has headers nor ``BCC_KERNEL_SOURCE`` is set, that variable is set
    to a temporary directory of links to the headers of another kernel.

    :raises HeadersMissing: there are no kernel headers on this host.
    """
    running = modules / os.uname().release
    if "BCC_KERNEL_SOURCE" in os.environ or _is_usable(_parts(running)):
        yield
        return
    with tempfile.TemporaryDirectory(prefix="tscwatch-headers-") as merged:
        _link_parts(find_headers(modules, sources), Path(merged))
        os.environ["BCC_KERNEL_SOURCE"] = merged
        try:
            yield
        finally:
            del os.environ["BCC_KERNEL_SOURCE"]


def find_headers(modules: Path = _MODULES, sources: Path = _SOURCES) -> list[Path]:
    """Return a header tree of any kernel: the newest in ``/lib/modules``, else in ``/usr/src``.

    A tree in ``/lib/modules`` can be in two parts, ``build`` and ``source`` (Debian): the result is
    a list of one or two directories.

    :raises HeadersMissing: there are no kernel headers on this host.
    """
    candidates = [_parts(kernel) for kernel in _newest_first(modules, "*")]
    candidates += [[tree] for tree in _newest_first(sources, "linux-headers-*")]
    candidates += [[tree] for tree in _newest_first(sources / "kernels", "*")]
    for parts in candidates:
        if _is_usable(parts):
            return parts
    raise HeadersMissing(
        f"bcc needs kernel headers, of any version, and finds none: {HEADERS_REMEDY}"
    )


def _parts(kernel: Path) -> list[Path]:
    """Return the directories of a kernel's header tree, from its directory of modules."""
    return [kernel / name for name in ("build", "source") if (kernel / name).is_dir()]


def _newest_first(directory: Path, pattern: str) -> list[Path]:
    return sorted(directory.glob(pattern), key=_version, reverse=True)


def _version(path: Path) -> list[int]:
    return [int(number) for number in "".join(c if c.isdigit() else " " for c in path.name).split()]


def _is_usable(parts: list[Path]) -> bool:
    """Return whether a header tree is complete, and no other user can write it."""
    if not all(is_trusted(part.stat()) for part in parts):
        return False
    return all(any((part / name).exists() for part in parts) for name in _REQUIRED_HEADERS)


def _link_parts(parts: list[Path], target: Path) -> None:
    """Merge the parts of a header tree: bcc takes a single directory."""
    for name in _INCLUDE_DIRS:
        merged = target / name
        merged.mkdir(parents=True)
        for part in parts:
            for entry in (part / name).glob("*"):
                link = merged / entry.name
                if not link.exists():
                    link.symlink_to(entry.resolve())
