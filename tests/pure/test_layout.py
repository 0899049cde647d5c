"""The walls between the rooms, and that every item of the pipeline has a handler."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Union, get_args, get_origin

import pytest

from tscwatch.analysis.judge import Judge
from tscwatch.model import Fact, Host, Item
from tscwatch.publish.format import _FORMS, LOG_ITEMS
from tscwatch.publish.state import State

PACKAGE = Path(__file__).parents[2] / "tscwatch"
ROOMS = ("analysis", "capture", "host", "linux", "publish")
IMPURE = {"os", "socket", "pathlib", "time", "subprocess"}
PURE = [
    *sorted((PACKAGE / "analysis").glob("*.py")),
    *(PACKAGE / f"{name}.py" for name in ("model", "owner", "vmm")),
]


def imports(path: Path) -> Iterator[str]:
    """The modules that a module imports, also inside its functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def inside(names: Iterator[str], *packages: str) -> list[str]:
    return [name for name in names if f"{name}.".startswith(tuple(f"{p}." for p in packages))]


@pytest.mark.parametrize("path", PURE, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_what_is_pure_does_no_io_and_depends_on_no_other_room(path: Path) -> None:
    assert inside(imports(path), *IMPURE) == []
    allowed = ("tscwatch.analysis", "tscwatch.model", "tscwatch.vmm")
    ours = inside(imports(path), "tscwatch")
    assert [name for name in ours if not name.startswith(allowed)] == []


def test_the_pure_modules_were_found() -> None:
    assert len(PURE) == 11


def test_publish_depends_neither_on_capture_nor_on_the_kernel() -> None:
    for path in (PACKAGE / "publish").glob("*.py"):
        assert inside(imports(path), "tscwatch.capture", "tscwatch.linux", "tscwatch.host") == []


def test_the_kernels_interfaces_depend_on_nothing_else() -> None:
    for path in (PACKAGE / "linux").glob("*.py"):
        ours = inside(imports(path), "tscwatch")
        allowed = ("tscwatch.linux", "tscwatch.errors", "tscwatch.clock")
        assert [name for name in ours if not name.startswith(allowed)] == [], path


def test_no_room_depends_on_the_command_line_or_the_daemon() -> None:
    for room in ROOMS:
        for path in (PACKAGE / room).glob("*.py"):
            assert inside(imports(path), "tscwatch.cli", "tscwatch.daemon") == [], path


def test_every_room_is_installed() -> None:
    makefile = (PACKAGE.parent / "Makefile").read_text()
    folders = {path.parent.name for path in PACKAGE.glob("*/*.py")}
    assert folders == set(ROOMS)
    for room in ROOMS:
        assert room in makefile.partition("ROOMS =")[2].partition("\n")[0]


def members(union: object) -> set[type]:
    if get_origin(union) is Union:
        return {each for member in get_args(union) for each in members(member)}
    assert isinstance(union, type)
    return {union}


def test_every_item_has_a_handler() -> None:
    assert set(State()._handlers) == members(Item)
    assert set(Judge()._handlers) == members(Fact) | {Host}
    assert set(_FORMS) == set(LOG_ITEMS)


def test_an_item_without_a_handler_is_an_error() -> None:
    with pytest.raises(KeyError):
        State().update(object())  # type: ignore[arg-type]
