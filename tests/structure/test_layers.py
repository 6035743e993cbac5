"""The layers of docs/concepts.md, held by reading the source."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.structure.source import imports, module_name, modules, tree

#: Layer by first component below svdbank. What is not named here belongs nowhere yet: a test fails until it is.
LAYERS = {
    "core": 0,
    "solver": 1,
    "checkpoint": 1,
    "bank": 1,
    "adapter": 2,
    "building": 3,
    "cache": 3,
    "fusion": 4,
    "initialisation": 4,
    "reporting": 4,
    "peft": 4,
    "lm": 4,
    "composition": 4,
    "training": 4,
    "verbs": 5,
}

#: The package itself re-exports what stands in layers 0 to 3, so using it is using the top.
FACADE = 3

STRANGERS = {"solver", "checkpoint", "bank"}

ALL = [pytest.param(path, id=name) for name, path in modules().items()]


def part(module: str) -> str:
    """``bank`` for ``svdbank.bank.store``; empty for ``svdbank`` itself."""
    return [*module.split("."), ""][1]


def layer(module: str) -> int:
    return LAYERS[part(module)] if part(module) else FACADE


def test_every_module_has_a_layer() -> None:
    homeless = {part(name) for name in modules()} - {""} - set(LAYERS)
    assert not homeless, f"give these a layer in LAYERS: {sorted(homeless)}"


@pytest.mark.parametrize("path", ALL)
def test_imports_point_down_only(path: Path) -> None:
    mine = module_name(path)
    if mine == "svdbank":
        return
    for found in imports(path):
        if found.module == "svdbank":
            # Layer 2 may look itself up through the package, but only when it is called: at import time that is a circle.
            allowed = layer(mine) >= 2 and not found.always
        elif found.module.startswith("svdbank."):
            allowed = layer(found.module) <= layer(mine)
        else:
            continue
        assert allowed, f"{path}:{found.line}: layer {layer(mine)} imports {found.module} of layer {layer(found.module)}"


@pytest.mark.parametrize("path", ALL)
def test_solver_checkpoint_and_bank_know_nothing_of_each_other(path: Path) -> None:
    mine = part(module_name(path))
    if mine in STRANGERS:
        others = STRANGERS - {mine}
        for found in imports(path):
            assert not (found.module.startswith("svdbank.") and part(found.module) in others), (
                f"{path}:{found.line}: {found.module}"
            )


@pytest.mark.parametrize("path", ALL)
def test_only_the_bank_imports_zarr(path: Path) -> None:
    if part(module_name(path)) != "bank":
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
    graph = {
        name: {found.module for found in imports(path) if found.always and found.module in modules()}
        for name, path in modules().items()
    }
    for name, targets in graph.items():
        targets.discard(name)
        # A package's own __init__ collects its members; a member that imports a sibling does not depend on it.
        targets.difference_update({name.rpartition(".")[0]})
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"import circle: {' → '.join(error.args[1])}")
