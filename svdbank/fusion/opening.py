"""The adapter that is added in: read, and refused where it is no sum on its base or adds nothing."""

from __future__ import annotations

import os
from pathlib import Path

from svdbank.adapter.fetching import located, name_of
from svdbank.adapter.folder import read_folder
from svdbank.adapter.methods import RESIDUAL_METHODS
from svdbank.adapter.model import Adapter
from svdbank.adapter.reading import adapter_of
from svdbank.bank.reading import Bank
from svdbank.core.errors import BankError, OptionError


def open_adapter(adapter: str | Path | Adapter, bank: Bank | None, model: str | os.PathLike[str]) -> tuple[Adapter, str]:
    """The adapter, and its name for a report."""
    if isinstance(adapter, Adapter):
        return _not_zero(adapter), repr(adapter)
    place, shown = located(adapter)
    folder = read_folder(place)
    method = folder.made_as()
    residual = method in RESIDUAL_METHODS
    if residual and bank is None:
        bank = _cached_bank(model, place, method)
    # Without a need for it the bank is not asked: it would only be compared.
    opened = adapter_of(folder, bank=bank if residual else None, name=name_of(adapter))
    return _not_zero(opened), shown


def _cached_bank(model: str | os.PathLike[str], folder: Path, method: str) -> Bank:
    from svdbank.cache import open as open_cached

    try:
        return open_cached(model)
    except BankError as cause:
        raise BankError(
            f"{folder}: a {method} adapter belongs to W − s·B₀·A₀, and adding it to W needs the bank ({cause})",
            hint=f"svdbank build {model}, or name the bank with --bank",
        ) from cause


def _not_zero(adapter: Adapter) -> Adapter:
    """The adapter, unless it adds nothing to any weight."""
    if adapter.whole.replacing or adapter.whole.beneath:
        return adapter
    for weight in adapter.weights.values():
        A, B = weight.total().factors
        if bool(A.any()) and bool(B.any()):
            return adapter
    what = "ΔW is zero in every weight, as in an adapter that was not trained" if adapter.weights else "it touches no weight"
    raise OptionError(f"this adapter changes nothing: {what}", hint="train it first: svdbank train MODEL … -o ADAPTER")


def note_of_base(adapter: Adapter, base: str) -> list[str]:
    """That the adapter names another model than ``base`` as its own, where nothing recorded tells whether it is that."""
    named = adapter.base.name
    recorded = adapter.base.digest or any(weight.source is not None for weight in adapter.weights.values())
    if recorded or not named or _last(named) == _last(base):
        return []
    return [f"the adapter names {named} as its base, and nothing recorded tells whether {base} is that model"]


def _last(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].partition("@")[0].lower()
