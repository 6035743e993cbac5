"""Patterns mean what they mean to PEFT, and none of them takes longer than somebody waits."""

from __future__ import annotations

import re
import time
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svdbank.checkpoint.naming.targets import matches
from svdbank.core.errors import OptionError
from svdbank.core.expressions import Expression, ends

NAMES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.10.self_attn.k_proj",
    "model.layers.1.mlp.experts.down_proj",
    "bert.encoder.layer.3.attention.output.dense",
    "q_proj",
    "xq_proj",
    "qqproj",
    "",
]

#: As people write them: lookahead, lookbehind, counts, classes, alternatives, back references, flags.
PATTERNS = [
    r".*\.(q_proj|v_proj)",
    r"(?!.*mlp).*_proj",
    r"model\.layers\.(?!0\b)\d+\..*",
    r".*(?<!k)_proj",
    r".*layers\.([0-9]|1[0-9])\.self_attn\.[qk]_proj",
    r"model.layers.\d{1,2}.*",
    r".*\.\d{,2}\..*",
    r"(?i).*SELF_ATTN.*",
    r"(.)\1proj",
    r"(?:x{0}|q)_proj|",
    r"(?P<kind>q|k)_proj",
    r".*[^a-z]down_proj\Z",
    r"q_proj$|^x",
    r"(?>x*)q_proj",
    r"\w++",
    "q.proj",
    "q_proj",
    "",
    "a|",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_matches_what_it_matches_in_peft(pattern: str) -> None:
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key

    for name in NAMES:
        assert Expression(pattern).fullmatch(name) == (re.fullmatch(pattern, name) is not None), name
        if not pattern.startswith("(?i)"):  # flags may not stand inside, as PEFT would put them
            assert ends(name, pattern) == (re.match(rf"(.*\.)?({pattern})$", name) is not None), name
            assert ends(name, pattern) == (get_pattern_key([pattern, name], name) == pattern), name
        if any(ch in pattern for ch in "\\^$*+?{}[]|()"):
            config = SimpleNamespace(target_modules=pattern, exclude_modules=None)
            assert matches(name, pattern) == bool(check_target_module_exists(config, name)), name


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            ["q", "_", r"\.", ".", "*", "+", "?", "(", ")", "|", "[qk]", r"\d", "^", "$", "{2}", "{,1}", "(?!k)", "(?:"]
        ),
        max_size=8,
    ).map("".join),
    st.text("qk._0\n", max_size=10),
)
def test_any_pattern_that_re_takes_matches_as_in_re(pattern: str, name: str) -> None:
    try:
        own = re.compile(rf"(.*\.)?({pattern})$")
        re.compile(pattern)
    except re.error:
        with pytest.raises(OptionError, match="not a valid regular expression"):
            ends(name, pattern)
        return
    assert ends(name, pattern) == (own.match(name) is not None)


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+$", "(a|aa)+b", "(.*a){25}b", r"(a*)*\.x", "((a?){30}){30}b", r"(?:a?){200}(?:a){200}", "(x+x+)+y|(a|a)*c"],
)
def test_a_catastrophic_pattern_ends(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Either with the right answer or with an error that names it: after seconds, not after the sun."""
    monkeypatch.setattr("svdbank.core.expressions._ONE", 0.2)
    name = "a" * 200 + "!"
    begun = time.process_time()
    try:
        assert not ends(name, pattern)
    except OptionError as caught:
        assert "takes too long" in str(caught)
    assert time.process_time() - begun < 3


def test_what_regex_reads_otherwise_than_re_is_refused() -> None:
    for pattern in ("(?:proj){e<=1}", "[[:alpha:]]+", "a{b}"):
        with pytest.raises(OptionError, match="brace"):
            Expression(pattern)
    with pytest.raises(OptionError, match="200000 characters"):
        Expression("a|" * 100_000)


def test_many_patterns_of_plain_names_cost_no_expression() -> None:
    """A config that svdbank wrote has one for each module: hundreds of them are looked at for each of hundreds."""
    names = [f"model.layers.{i}.mlp.experts.{j}.up_proj" for i in range(20) for j in range(10)]
    begun = time.process_time()
    assert all(sum(ends(name, own) for own in names) == 1 for name in names)
    assert time.process_time() - begun < 2


def test_time_in_which_nothing_was_matched_counts_against_no_pattern() -> None:
    """A process that stands still, a machine that does something else: an honest pattern matches all the same."""
    expression = Expression(r".*")
    left = expression._left
    stalls = [True, True, False]

    def stalled(name: str, timeout: float) -> bool:
        time.sleep(0.03)
        if stalls.pop(0):
            raise TimeoutError
        return True

    assert expression._ask(stalled, "q_proj") and expression._left == left and not stalls
