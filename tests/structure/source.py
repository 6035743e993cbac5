"""The package's source as syntax trees: who imports whom, and when."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "svdbank"


@dataclass(frozen=True)
class Import:
    """One imported module. ``always`` is true when importing the file imports it: not in a function, not for type checkers only."""

    module: str
    line: int
    always: bool
    typing_only: bool


def copy_tree(to: Path) -> None:
    """What a build reads, without build/ and egg-info of earlier ones."""
    for folder in ("svdbank", "cli", "src"):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / folder, to / folder, symlinks=True, ignore=ignored)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, to / file)


def module_name(path: Path) -> str:
    """``svdbank.bank.store`` for ``svdbank/bank/store.py``."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache
def modules() -> dict[str, Path]:
    """Every module of svdbank by name."""
    return {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


@cache
def imports(path: Path) -> tuple[Import, ...]:
    """Every import of a file. ``from package import name`` counts as ``package.name`` where that is a module of svdbank."""
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    return tuple(_imports(tree(path).body, package, always=True, typing_only=False))


def _imports(body: list[ast.stmt], package: str, *, always: bool, typing_only: bool) -> Iterator[Import]:
    for node in body:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, always, typing_only)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
            origin = ".".join(part for part in (base, node.module) if part)
            for alias in node.names:
                name = f"{origin}.{alias.name}"
                yield Import(name if name in modules() else origin, node.lineno, always, typing_only)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from _imports(node.body, package, always=False, typing_only=True)
            yield from _imports(node.orelse, package, always=always, typing_only=typing_only)
        else:
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            for field in ("body", "orelse", "finalbody", "handlers", "cases"):
                for child in getattr(node, field, []):
                    nested = child.body if isinstance(child, ast.ExceptHandler | ast.match_case) else [child]
                    yield from _imports(nested, package, always=always and not inside, typing_only=typing_only)
