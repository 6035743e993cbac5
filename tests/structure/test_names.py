"""Verbs are functions and modules are nouns: importing a module must never shadow a function of the package."""

from __future__ import annotations

import importlib
import sys

import pytest

import svdbank
from svdbank_cli.main import VERBS
from tests.structure.source import modules


def test_every_module_imports_and_every_verb_stays_callable() -> None:
    for name in modules():
        importlib.import_module(name)
    for name in svdbank.__all__:
        value = getattr(svdbank, name)
        assert not isinstance(value, type(sys)), f"svdbank.{name} is a module, not what __all__ promises"


@pytest.mark.parametrize("verb", VERBS)
def test_each_command_is_a_library_function_of_the_same_name(verb: str) -> None:
    assert verb in svdbank.__all__
    assert callable(getattr(svdbank, verb))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = svdbank.no_such_name
