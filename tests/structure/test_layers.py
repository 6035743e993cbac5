"""The layers of docs/concepts.md, held by reading the source."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.structure.source import imports, module_name, modules, tree

#: The floors of docs/concepts.md, lowest first. A room may import what stands on a lower floor, and nothing above.
FLOORS = (
    ("core",),
    ("checkpoint", "bank", "solver"),
    ("adapter",),
    ("cache", "building"),
    ("initialisation", "fusion", "reporting", "peft", "lm", "composition", "training"),
    ("verbs",),
)

#: On these floors the order counts too: a room may import those before it in its row, which are not of one group with it.
GROUPS = (("cache",), ("building",), ("initialisation", "fusion", "reporting"), ("peft",), ("lm",), ("composition", "training"))

STRANGERS = {"solver", "checkpoint", "bank"}

ALL = [pytest.param(path, id=name) for name, path in modules().items()]


def room(module: str) -> str:
    """``bank`` for ``svdbank.bank.store``; empty for ``svdbank`` itself."""
    return [*module.split("."), ""][1]


def height(name: str) -> tuple[int, int]:
    """Floor of a room, and its place on it; rooms of one height do not import each other."""
    floor = next(i for i, rooms in enumerate(FLOORS) if name in rooms)
    return floor, next((i for i, group in enumerate(GROUPS) if name in group), 0)


def test_the_table_names_every_room_and_no_other() -> None:
    rooms = [name for floor in FLOORS for name in floor]
    assert len(rooms) == len(set(rooms))
    assert set(rooms) == {room(name) for name in modules()} - {""}
    assert {name for group in GROUPS for name in group} <= set(rooms)


@pytest.mark.parametrize("path", ALL)
def test_imports_point_down_only(path: Path) -> None:
    mine = module_name(path)
    if mine == "svdbank":
        return  # it collects what is public
    for found in imports(path):
        if found.module.split(".")[0] == "svdbank" and room(found.module) != room(mine):
            assert room(found.module), f"{path}:{found.line}: the package's own front door is for those outside"
            assert height(room(found.module)) < height(room(mine)), f"{path}:{found.line}: {found.module} is not below {mine}"


@pytest.mark.parametrize("path", ALL)
def test_solver_checkpoint_and_bank_know_nothing_of_each_other(path: Path) -> None:
    mine = room(module_name(path))
    if mine in STRANGERS:
        others = STRANGERS - {mine}
        for found in imports(path):
            assert not (found.module.startswith("svdbank.") and room(found.module) in others), (
                f"{path}:{found.line}: {found.module}"
            )


@pytest.mark.parametrize("path", ALL)
def test_only_the_bank_imports_zarr(path: Path) -> None:
    if room(module_name(path)) != "bank":
        for found in imports(path):
            assert found.module.split(".")[0] != "zarr", f"{path}:{found.line}"


@pytest.mark.parametrize("path", ALL)
def test_heavy_or_optional_packages_are_imported_where_they_are_used(path: Path) -> None:
    optional = {"transformers", "peft", "ray", "matplotlib", "accelerate", "datasets", "gguf", "bitsandbytes", "lm_eval"}
    for found in imports(path):
        assert found.typing_only or not found.always or found.module.split(".")[0] not in optional, (
            f"{path}:{found.line}: {found.module}"
        )


@pytest.mark.parametrize("path", ALL)
def test_the_library_does_not_know_its_command_line(path: Path) -> None:
    for found in imports(path):
        assert found.module.split(".")[0] not in {"click", "svdbank_cli", "cli"}, f"{path}:{found.line}: {found.module}"


@pytest.mark.parametrize("path", ALL)
def test_the_library_never_prints_and_never_exits(path: Path) -> None:
    for node in ast.walk(tree(path)):
        name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        assert name not in {"print", "exit", "quit", "sys.exit", "os._exit", "SystemExit"}, f"{path}:{node.lineno}: {name}"
        if isinstance(node, ast.Raise) and node.exc is not None:
            assert not ast.unparse(node.exc).startswith("SystemExit"), f"{path}:{node.lineno}"


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    """Also not by way of imports in functions, or of those that only type checkers read."""
    graph = {
        name: {found.module for found in imports(path) if found.module in modules()}
        for name, path in modules().items()
        if name != "svdbank"
    }
    for name, targets in graph.items():
        targets.discard(name)
        # A package's own __init__ collects its members; a member that imports a sibling does not depend on it.
        targets.difference_update({name.rpartition(".")[0]})
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"import circle: {' → '.join(error.args[1])}")


def test_packages_are_empty_but_for_those_that_are_public() -> None:
    public = {"svdbank", "svdbank.peft", "svdbank.solver", "svdbank.checkpoint"}
    full = {name for name, path in modules().items() if path.name == "__init__.py" and path.read_text().strip()}
    assert full == public
