"""The config of a fresh adapter: ranks and alphas by module, as PEFT's patterns give them and as PEFT writes them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from svdbank.adapter.components import Kind
from svdbank.adapter.experts import kind_in_peft, pattern_name, target_fields
from svdbank.adapter.methods import METHODS, RESIDUAL_METHODS, InitialisationMethod
from svdbank.adapter.settings import by_pattern
from svdbank.bank.reading import Bank
from svdbank.core.errors import OptionError
from svdbank.core.expressions import ends


def ranks_by_pattern(bank: Bank, names: Iterable[str], default: int, pattern: Mapping[str, int]) -> dict[str, int]:
    """The rank of each weight. Raises :class:`OptionError` for a pattern that cannot be meant or matches nothing."""
    paths = {name: bank[name].module for name in names}
    _check_patterns(pattern, paths.values(), "rank")
    return {name: int(by_pattern(pattern, path, default)) for name, path in paths.items()}


def alphas_by_pattern(
    bank: Bank, ranks: Mapping[str, int], alpha: float | None, pattern: Mapping[str, float]
) -> dict[str, float]:
    """α of each weight, by default its rank, so that the scale is 1. Raises :class:`OptionError` as :func:`ranks_by_pattern` does."""
    paths = {name: bank[name].module for name in ranks}
    _check_patterns(pattern, paths.values(), "alpha")
    return {name: by_pattern(pattern, path, ranks[name] if alpha is None else alpha) for name, path in paths.items()}


def _check_patterns(pattern: Mapping[str, float], paths: Iterable[str], what: str) -> None:
    modules = list(paths)
    for own, value in pattern.items():
        if not (math.isfinite(value) and value > 0):
            raise OptionError(f"{what} pattern {own}={value}: a positive number is needed")
        if not any(ends(module, own) for module in modules):
            raise OptionError(f"{what} pattern {own!r} matches none of the adapted modules")


def keys_of(bank: Bank, names: Iterable[str]) -> dict[str, str]:
    """What an adapter calls each weight."""
    return {name: name if bank[name].stacked else bank[name].module for name in names}


def kinds_of(bank: Bank, names: Iterable[str], *, dropout: float) -> dict[str, Kind]:
    """How PEFT adapts each weight. It has no dropout for parameters, so that with one only experts and routers are taken as such."""
    fused = not dropout and any(bank[name].stacked for name in bank.names)
    return {name: kind_in_peft(bank[name].module, bank[name].kind, stacked=bank[name].stacked, fused=fused) for name in names}


def shape_fields(
    bank: Bank, names: Sequence[str], ranks: Mapping[str, int], alphas: Mapping[str, float], *, dropout: float = 0.0
) -> dict[str, Any]:
    """The fields of a config that follow from ranks and alphas: the common ones, and patterns for the others."""
    keys, kinds = keys_of(bank, names), kinds_of(bank, names, dropout=dropout)
    of_path = {pattern_name(keys[name], kinds[name]): (ranks[name], alphas[name]) for name in names}
    pairs = list(of_path.values())
    rank, alpha = max(dict.fromkeys(pairs), key=pairs.count)
    return {
        "r": rank,
        "lora_alpha": _as_integer(alpha),
        "rank_pattern": {path: r for path, (r, _) in of_path.items() if r != rank},
        "alpha_pattern": {path: _as_integer(a) for path, (_, a) in of_path.items() if a != alpha},
        **target_fields({keys[name]: kinds[name] for name in names}),
    }


def _as_integer(alpha: float) -> int | float:
    return int(alpha) if float(alpha).is_integer() else alpha


def checked_method(method: str, alpha: float | None, dropout: float, residual_out: object) -> InitialisationMethod:
    """The method by its name; OptionError for one that is none, and for options that cannot be meant with it."""
    if method.lower() not in METHODS:
        raise OptionError(f"{method!r} is not a method of this version: {', '.join(METHODS)}", hint="--method mica")
    if alpha is not None and not (math.isfinite(alpha) and alpha > 0):
        raise OptionError(f"alpha is a positive number, not {alpha}")
    if not 0 <= dropout < 1:
        raise OptionError(f"dropout is at least 0 and below 1, not {dropout}")
    chosen = cast("InitialisationMethod", method.lower())
    if residual_out is not None and chosen not in RESIDUAL_METHODS:
        raise OptionError(f"{chosen} leaves the base as it is: there is no residual to write", hint="leave --residual-out out")
    return chosen
