"""Header trees that bcc may be given."""

from __future__ import annotations

from pathlib import Path

import pytest

from tscwatch.errors import HeadersMissing
from tscwatch.linux import compiler


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    tree = tmp_path / "src/linux-headers-6.1"
    for name in ("include/linux/kconfig.h", "include/generated/autoconf.h"):
        (tree / name).parent.mkdir(parents=True)
        (tree / name).write_text("")
    (tree / "arch/x86/include/asm").mkdir(parents=True)
    tree.chmod(0o755)
    return tree


def test_headers_of_another_kernel_serve(tree: Path, tmp_path: Path) -> None:
    assert compiler.find(tmp_path / "modules", tree.parent) == [tree]


@pytest.mark.parametrize("bit", [0o020, 0o002])
def test_headers_that_others_can_write_are_no_headers(tree: Path, tmp_path: Path, bit: int) -> None:
    tree.chmod(tree.stat().st_mode | bit)
    with pytest.raises(HeadersMissing):
        compiler.find(tmp_path / "modules", tree.parent)
