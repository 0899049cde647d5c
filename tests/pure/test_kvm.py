"""Whether the kvm module is loaded, and what a user can do if /dev/kvm cannot be used."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tscwatch.linux import kvm


def test_each_load_of_the_module_has_a_number_of_its_own(tmp_path: Path) -> None:
    module = tmp_path / "kvm"
    assert (kvm.module_generation(module), kvm.is_module(module)) == (None, False)
    module.mkdir()
    (module / "initstate").write_text("coming\n")
    assert (kvm.module_generation(module), kvm.is_module(module)) == (None, True)
    (module / "initstate").write_text("live\n")
    first = kvm.module_generation(module)
    assert first == kvm.module_generation(module) == module.stat().st_ino
    module.rename(tmp_path / "before")  # so that the next directory has another inode
    module.mkdir()
    (module / "initstate").write_text("live\n")
    assert kvm.module_generation(module) not in (None, first)
    (module / "initstate").write_text("going\n")
    assert kvm.module_generation(module) is None


def test_what_is_built_in_has_no_load_state(tmp_path: Path) -> None:
    module = tmp_path / "kvm"
    (module / "parameters").mkdir(parents=True)
    assert not kvm.is_module(module)
    assert kvm.module_generation(module) == module.stat().st_ino


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.EPERM, "device cgroup"),
        (errno.EBUSY, "other hypervisor"),
        (errno.EIO, "dmesg"),
    ],
)
def test_the_remedy_depends_on_the_error(number: int, remedy: str) -> None:
    sentence = kvm.why_unusable(OSError(number, os.strerror(number)))
    assert sentence.startswith(f"/dev/kvm cannot be used ({os.strerror(number)}): ")
    assert remedy in sentence
