"""Verbs are functions and modules are nouns; one name serves everywhere, and means one thing."""

from __future__ import annotations

import ast
import importlib
import sys
from collections import defaultdict

import pytest

import svdbank
from svdbank_cli.main import VERBS
from tests.structure.source import PACKAGE, ROOT, modules, tree

#: A verb's file checks options, calls rooms and returns a report; what is longer does their work.
LONGEST_VERB = 200

#: Words that say nothing of what a function returns.
EMPTY_WORDS = {"some", "needed", "plain", "found"}


def test_every_module_imports_and_every_verb_stays_callable() -> None:
    for name in modules():
        importlib.import_module(name)
    for name in svdbank.__all__:
        value = getattr(svdbank, name)
        assert not isinstance(value, type(sys)), f"svdbank.{name} is a module, not what __all__ promises"


@pytest.mark.parametrize("verb", VERBS)
def test_one_name_serves_the_command_the_function_and_their_files(verb: str) -> None:
    assert verb in svdbank.__all__
    assert getattr(svdbank, verb).__module__ == f"svdbank.verbs.{verb}"
    assert (ROOT / "cli" / f"{verb}.py").is_file()
    length = len((PACKAGE / "verbs" / f"{verb}.py").read_text(encoding="utf-8").splitlines())
    assert length <= LONGEST_VERB, f"svdbank/verbs/{verb}.py has {length} lines"


def test_the_room_of_verbs_holds_verbs_alone() -> None:
    assert {path.stem for path in (PACKAGE / "verbs").glob("*.py")} == {"__init__", *VERBS}


def test_no_two_public_types_share_a_name() -> None:
    """Classes, and names for types (``Method = Literal[...]``), wherever they stand."""
    homes: dict[str, list[str]] = defaultdict(list)
    for module, path in modules().items():
        for node in tree(path).body:
            if isinstance(node, ast.ClassDef):
                homes[node.name].append(module)
            elif isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
                name = node.targets[0].id
                if name[:1].isupper() and not name.isupper():
                    homes[name].append(module)
    shared = {name: where for name, where in homes.items() if len(where) > 1 and not name.startswith("_")}
    assert not shared


def test_no_function_has_an_empty_word_for_a_name() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {node.name}"
        for path in modules().values()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef) and node.name.strip("_") in EMPTY_WORDS
    ]
    assert not wrong, "\n".join(wrong)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = svdbank.no_such_name
