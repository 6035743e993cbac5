"""The layers of docs/concepts.md, held by reading the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter

import pytest

from tests.structure.source import ROOT, Import, imports, modules, tree

#: The floors of docs/concepts.md, lowest first. A room may import what stands on a lower floor, and nothing above.
FLOORS = (
    ("core",),
    ("checkpoint", "bank", "solver"),
    ("adapter",),
    ("cache", "building"),
    ("sharing", "initialisation", "fusion", "peft", "lm", "composition", "training", "reporting"),
    ("verbs",),
)

#: On these floors the order counts too: a room may import those before it in its row, which are not of one group with it.
GROUPS = (
    ("cache",),
    ("building",),
    ("sharing",),
    ("initialisation", "fusion", "peft"),
    ("lm",),
    ("composition", "training"),
    ("reporting",),
)

STRANGERS = {"solver", "checkpoint", "bank"}


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
    assert set(rooms) == {room(name) for name in modules()} - {"", "__main__"}
    assert {name for group in GROUPS for name in group} <= set(rooms)


def found_imports() -> Iterator[tuple[str, str, Import]]:
    """Every import of the package: the importing module, the place for a message, and what is imported."""
    for mine, path in modules().items():
        for found in imports(path):
            yield mine, f"{path.relative_to(ROOT)}:{found.line}: {found.module}", found


def test_imports_point_down_only() -> None:
    wrong = []
    for mine, place, found in found_imports():
        # The package's own front door collects what is public, and is for those outside.
        if mine == "svdbank" or found.module.split(".")[0] != "svdbank" or room(found.module) == room(mine):
            continue
        if not room(found.module):
            wrong.append(f"{place}: the package's own front door is for those outside")
        elif height(room(found.module)) >= height(room(mine)):
            wrong.append(f"{place} is not below {mine}")
    assert not wrong, "\n".join(wrong)


def test_solver_checkpoint_and_bank_know_nothing_of_each_other() -> None:
    wrong = [
        place
        for mine, place, found in found_imports()
        if room(mine) in STRANGERS and found.module.startswith("svdbank.") and room(found.module) in STRANGERS - {room(mine)}
    ]
    assert not wrong, "\n".join(wrong)


def test_only_the_bank_imports_zarr() -> None:
    wrong = [place for mine, place, found in found_imports() if found.module.split(".")[0] == "zarr" and room(mine) != "bank"]
    assert not wrong, "\n".join(wrong)


def test_heavy_or_optional_packages_are_imported_where_they_are_used() -> None:
    optional = {
        "transformers",
        "peft",
        "ray",
        "matplotlib",
        "jinja2",
        "pandas",
        "accelerate",
        "datasets",
        "gguf",
        "bitsandbytes",
        "lm_eval",
    }
    wrong = [
        place
        for _, place, found in found_imports()
        if found.always and not found.typing_only and found.module.split(".")[0] in optional
    ]
    assert not wrong, "\n".join(wrong)


def test_the_library_does_not_know_its_command_line() -> None:
    """But for the one file that ``python -m svdbank`` runs, and which nothing imports."""
    strangers = {"click", "svdbank_cli", "cli"}
    wrong = [
        place
        for mine, place, found in found_imports()
        if found.module == "svdbank.__main__" or (found.module.split(".")[0] in strangers and mine != "svdbank.__main__")
    ]
    assert not wrong, "\n".join(wrong)


def test_the_library_never_prints_and_never_exits() -> None:
    wrong = []
    for path in modules().values():
        for node in ast.walk(tree(path)):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            raised = ast.unparse(node.exc) if isinstance(node, ast.Raise) and node.exc is not None else ""
            if called in {"print", "exit", "quit", "sys.exit", "os._exit", "SystemExit"} or raised.startswith("SystemExit"):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}: {called or raised}")
    assert not wrong, "\n".join(wrong)


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
