"""Targets mean what they mean to PEFT."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from peft.tuners.tuners_utils import check_target_module_exists

from svdbank.checkpoint import matches
from svdbank.core.errors import OptionError

MODULES = (
    "q_proj",
    "model.layers.0.self_attn.q_proj",
    "model.layers.11.self_attn.q_proj",
    "model.layers.1.self_attn.my_q_proj",
    "model.layers.1.mlp.up_proj",
    "model.layers.1.self_attn",
    "transformer.h.0.attn.c_attn",
    "lm_head",
    "encoder.lm_head",
)
NAMES = (
    ["q_proj"],
    ["self_attn.q_proj"],
    ["proj"],
    ["q_proj", "up_proj"],
    ["model.layers.1.mlp.up_proj"],
    ["lm_head"],
    ["h.0.attn.c_attn"],
)
EXPRESSIONS = (
    r".*\.q_proj",
    r".*q_proj",
    r"model\.layers\.(0|11)\..*",
    r"model\.layers\.[0-9]+",
    r"q_proj$|lm_head",
    r".*\.[0-9]\..*(up|q)_proj",
    r"(?i)LM_HEAD",
)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("targets", NAMES, ids=str)
def test_names_match_the_end_of_a_module_path_as_in_peft(module: str, targets: list[str]) -> None:
    assert matches(module, targets) == bool(check_target_module_exists(SimpleNamespace(target_modules=targets), module))


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_one_expression_matches_the_whole_module_path_as_in_peft(module: str, expression: str) -> None:
    expected = bool(check_target_module_exists(SimpleNamespace(target_modules=expression), module))
    assert matches(module, [expression]) == expected
    assert matches(module, expression) == expected


@pytest.mark.parametrize("shorthand", ["all-linear", "ALL-LINEAR"])
def test_all_linear_is_recognised_in_any_case(shorthand: str) -> None:
    assert matches("anything", [shorthand])


@pytest.mark.parametrize(
    "targets", [[], [""], ["q_proj", ""], ["("], ["*"], ["a{99999999999}"], ["q_proj", ".*mlp.*"], [".*a", ".*b"]], ids=str
)
def test_targets_that_cannot_be_meant_are_refused_with_a_next_step(targets: list[str]) -> None:
    with pytest.raises(OptionError) as caught:
        matches("q_proj", targets)
    assert caught.value.hint
