"""What tscwatch finds in /proc of real QEMUs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Optional

import pytest

from tests.support.guests import QEMU, Qemu
from tscwatch.host.inventory import Inventory
from tscwatch.model import Guest

COMMON = ("-S", "-display", "none", "-nodefaults", "-m", "16")


def found(qemu: Qemu) -> Guest:
    return Inventory().identify(qemu.pid, "")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("qemu")


LOADER = "/lib64/ld-linux-x86-64.so.2"


@pytest.mark.parametrize(
    ("executable", "argv"),
    [
        (None, ["/usr/bin/kvm"]),
        (QEMU, ["another-name"]),
        (LOADER, [LOADER, f"/usr/bin/{QEMU}"]),
        (LOADER, ["another-name", "--library-path", "/usr/lib", f"/usr/bin/{QEMU}"]),
    ],
)
def test_an_executable_by_any_name(
    directory: Path, executable: Optional[str], argv: list[str]
) -> None:
    options = ("-M", "none", "-accel", "kvm", *COMMON, "-name", "a")
    with Qemu(directory, "named", [*argv, *options], executable) as qemu:
        assert found(qemu)[:3] == (qemu.pid, "qemu", "a")


@pytest.mark.parametrize(
    ("file", "name"),
    [(".qemu-system-x86_64-wrapped", "another-name"), ("kvm", "another-name"), ("renamed", QEMU)],
)
def test_an_executable_that_was_renamed_and_one_that_was_deleted(
    directory: Path, file: str, name: str
) -> None:
    program = directory / file
    shutil.copy(f"/usr/bin/{QEMU}", program)
    command = (name, "-M", "none", "-accel", "kvm", *COMMON, "-name", "a")
    with Qemu(directory, "copy", command, str(program)) as qemu:
        assert found(qemu)[:3] == (qemu.pid, "qemu", "a")
        program.unlink()
        assert found(qemu)[:3] == (qemu.pid, "qemu", "a")
