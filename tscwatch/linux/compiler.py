"""The programs in ``bpf/`` as bytecode: compiled by bcc in a process of its own, and kept.

The compiler is large (LLVM) and needed for a second: so it ends with its process.  What it
made is kept in a file that only root can write, and serves again until the text changes.
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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module, resources
from pathlib import Path
from typing import Any, NamedTuple, Optional

from tscwatch.errors import BccMissing, HeadersMissing, KernelUnfit

log = logging.getLogger(__name__)

CACHE = Path("/var/cache/tscwatch")
_MODULES = Path("/lib/modules")
_SOURCES = Path("/usr/src")
_PARTS = ("include", "arch/x86/include")

REMEDY = (
    "install them with 'apt-get install linux-headers-amd64' (Debian), "
    "'apt-get install linux-headers-generic' (Ubuntu) or 'dnf install kernel-devel' (Fedora, EL)"
)
_LIMIT_S = 600
_NO_BCC = 3
"""Exit status of the compiler's process."""

# What runs in that process. It imports from where we did, and never from its working directory.
_START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from tscwatch.linux.compiler import main; sys.exit(main())"
)

# struct bpf_insn: opcode, registers, offset, immediate value
_INSN = struct.Struct("=BBhi")
_LD_IMM64, _PSEUDO_MAP_FD = 0x18, 1


class Map(NamedTuple):
    """A map as BPF_MAP_CREATE wants it (bpf(2))."""

    name: str
    map_type: int
    key_size: int
    value_size: int
    max_entries: int
    map_flags: int


@dataclass(frozen=True)
class Program:
    """What bcc makes of one file.

    Where an instruction loads a map, its immediate value is the map's place in ``maps``.
    """

    maps: list[Map]
    functions: dict[str, bytes]


def program(
    file: str, macros: Mapping[str, int], maps: Sequence[str], cache: Path = CACHE
) -> Program:
    """A file of ``bpf/``, compiled now or before.

    :param maps: the names of its maps.
    :raises BccMissing: this interpreter has no bcc.
    :raises HeadersMissing: nothing for bcc to compile with.
    :raises KernelUnfit: it does not compile.
    """
    directory = resources.files("tscwatch") / "bpf"
    text = (directory / "tscwatch.h").read_text() + (directory / file).read_text()
    flags = [f"-D{macro}={value}" for macro, value in sorted(macros.items())]
    request = json.dumps({"text": text, "flags": flags, "maps": list(maps)})
    key = hashlib.sha256(request.encode()).hexdigest()
    kept = cache / f"{file}.json"
    answer = _kept(kept, key)
    if answer is None:
        answer = _compile(file, request)
        _keep(kept, key, answer)
    return _program(answer)


def _program(answer: str) -> Program:
    found = json.loads(answer)
    functions = {name: base64.b64decode(code) for name, code in found["functions"].items()}
    return Program([Map(*each) for each in found["maps"]], functions)


def _compile(file: str, request: str) -> str:
    with headers_for_bcc():
        done = subprocess.run(
            [sys.executable, "-c", _START, json.dumps(sys.path)],
            input=request,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_LIMIT_S,
            check=False,
        )
    if done.returncode == _NO_BCC:
        raise BccMissing(
            f"{sys.executable} has no bcc: install python3-bpfcc (Debian, Ubuntu) or python3-bcc "
            "(Fedora, EL), and run tscwatch with the distribution's python3"
        )
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"its process ended with {done.returncode}"]
        detail = "; ".join([said[-1], *said[:3]])
        raise KernelUnfit(f"bcc could not compile bpf/{file}: {detail}")
    return done.stdout


def _kept(path: Path, key: str) -> Optional[str]:
    """What was kept, where nobody but root, or who runs us, can have written it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    with os.fdopen(descriptor, encoding="ascii") as file:
        if not all(map(is_trusted, (os.fstat(descriptor), path.parent.stat()))):
            log.warning("%s is not read: others than root can write it", path)
            return None
        head, _, answer = file.read().partition("\n")
    return answer if head == key else None


def _keep(path: Path, key: str, answer: str) -> None:
    part = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(f"{key}\n{answer}")
        part.replace(path)
    except OSError as error:
        log.info("the compiled program is not kept: %s", error)


def main() -> int:
    """The compiler's process: a request on standard input, the answer on standard output."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # bcc prints
    try:
        bcc: Any = import_module("bcc")
    except ImportError:
        return _NO_BCC
    request = json.load(sys.stdin)
    module = bcc.BPF(text=request["text"], cflags=request["flags"])
    json.dump(_compiled(bcc.lib, module, request["maps"]), answer)
    answer.close()
    return 0


def _compiled(lib: Any, module: Any, names: Sequence[str]) -> dict[str, Any]:
    """What bcc has made; it has created the maps, which say what they are."""
    descriptors = [lib.bpf_table_fd(module.module, name.encode()) for name in names]
    places = {descriptor: place for place, descriptor in enumerate(descriptors)}
    functions = {}
    for number in range(lib.bpf_num_functions(module.module)):
        name = lib.bpf_function_name(module.module, number)
        code = relocated(module.dump_func(name), places)
        functions[name.decode()] = base64.b64encode(code).decode()
    maps = [Map(name, *_attributes(fd)) for name, fd in zip(names, descriptors)]
    return {"maps": maps, "functions": functions}


def _attributes(descriptor: int) -> Iterator[int]:
    """As the kernel shows them (bpf_map_show_fdinfo)."""
    lines = Path(f"/proc/self/fdinfo/{descriptor}").read_text().splitlines()
    shown = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    return (int(shown[name], 0) for name in Map._fields[1:])


def relocated(code: bytes, maps: Mapping[int, int]) -> bytes:
    """The same instructions with each map replaced by what it is called in another place."""
    copy = bytearray(code)
    for at in range(0, len(code), _INSN.size):
        opcode, registers, offset, value = _INSN.unpack_from(code, at)
        if (opcode, registers >> 4) == (_LD_IMM64, _PSEUDO_MAP_FD):
            _INSN.pack_into(copy, at, opcode, registers, offset, maps[value])
    return bytes(copy)


@contextmanager
def headers_for_bcc(modules: Path = _MODULES, sources: Path = _SOURCES) -> Iterator[None]:
    """While this holds, bcc finds headers.

    :raises HeadersMissing: there are none on this host.
    """
    running = modules / os.uname().release
    if "BCC_KERNEL_SOURCE" in os.environ or _is_whole(_trees(running)):
        yield
        return
    with tempfile.TemporaryDirectory(prefix="tscwatch-headers-") as private:
        _lay_together(find(modules, sources), Path(private))
        os.environ["BCC_KERNEL_SOURCE"] = private
        try:
            yield
        finally:
            del os.environ["BCC_KERNEL_SOURCE"]


def find(modules: Path = _MODULES, sources: Path = _SOURCES) -> list[Path]:
    """The newest header tree of any kernel, in one part or in two (build, source).

    :raises HeadersMissing: there are none on this host.
    """
    candidates = [_trees(kernel) for kernel in _newest_first(modules, "*")]
    candidates += [[tree] for tree in _newest_first(sources, "linux-headers-*")]
    candidates += [[tree] for tree in _newest_first(sources / "kernels", "*")]
    for trees in candidates:
        if _is_whole(trees):
            return trees
    raise HeadersMissing(f"bcc cannot compile without kernel headers, of any version: {REMEDY}")


def _trees(kernel: Path) -> list[Path]:
    return [kernel / name for name in ("build", "source") if (kernel / name).is_dir()]


def _newest_first(directory: Path, pattern: str) -> list[Path]:
    return sorted(directory.glob(pattern), key=_version, reverse=True)


def _version(path: Path) -> list[int]:
    return [int(number) for number in "".join(c if c.isdigit() else " " for c in path.name).split()]


def _is_whole(trees: list[Path]) -> bool:
    if not all(is_trusted(tree.stat()) for tree in trees):
        return False
    wanted = ("include/linux/kconfig.h", "include/generated/autoconf.h", "arch/x86/include/asm")
    return all(any((tree / name).exists() for tree in trees) for name in wanted)


def is_trusted(status: os.stat_result) -> bool:
    """Whether nobody but root, or who runs us, can have written it."""
    writable = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return status.st_uid in (0, os.geteuid()) and not writable


def _lay_together(trees: list[Path], target: Path) -> None:
    for part in _PARTS:
        merged = target / part
        merged.mkdir(parents=True)
        for tree in trees:
            for entry in (tree / part).glob("*"):
                link = merged / entry.name
                if not link.exists():
                    link.symlink_to(entry.resolve())
