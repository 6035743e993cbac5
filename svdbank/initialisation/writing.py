"""A fresh adapter as a folder: its factors under PEFT's names, its record, and what to say of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from svdbank.adapter.components import Band
from svdbank.adapter.entries import by_module
from svdbank.adapter.folder import write_folder
from svdbank.adapter.methods import RESIDUAL_METHODS, InitialisationMethod
from svdbank.adapter.settings import AdapterCache, LoraSettings
from svdbank.adapter.writing import recorded
from svdbank.bank.reading import Bank
from svdbank.initialisation.configuration import keys_of, kinds_of


def write_fresh(
    output: Path,
    settings: LoraSettings,
    bank: Bank,
    bands: Mapping[str, Band],
    factors: Mapping[str, tuple[Tensor, Tensor]],
    method: InitialisationMethod,
    base: str,
    *,
    force: bool,
) -> AdapterCache:
    """Write the folder, whole or not at all, and return its record. ``bands`` and ``factors`` (A, B) are by name in the bank.

    The record's ``band`` is the hull of the bands; (0, 0) for ``pissa``, which stands at the other end.
    """
    keys = keys_of(bank, factors)
    kinds = {keys[name]: kind for name, kind in kinds_of(bank, factors, dropout=settings.lora_dropout).items()}
    hull = (min(start for start, _ in bands.values()), max(stop for _, stop in bands.values()))
    record = recorded(
        method,
        base,
        {keys[name]: (name, bank[name].source_sha256) for name in factors},
        {output.name: {keys[name]: (bands[name],) if method == "mica" else () for name in factors}},
        rank=max(stop - start for start, stop in bands.values()),
        band=(0, 0) if method == "pissa" else hull,
        bank_format=bank.manifest.format,
    )
    write_folder(output, settings, by_module({keys[name]: pair for name, pair in factors.items()}, kinds), record, force=force)
    return record


def trainable_parameters(factors: Mapping[str, tuple[Tensor, Tensor]], method: InitialisationMethod) -> int:
    """How many numbers train: those of A, and where ``method`` trains both factors also of B."""
    return sum(A.numel() + (B.numel() if method in RESIDUAL_METHODS else 0) for A, B in factors.values())


#: What plain PEFT does with a folder whose config names the method.
_BY_PEFT = {"milora": "refuses it", "pissa": "runs one SVD a weight to load it"}


def in_config(bank: Bank, names: Sequence[str], method: InitialisationMethod) -> InitialisationMethod | bool:
    """``init_lora_weights`` of the config: PEFT has no MiCA for parameters, and loads the values of such a folder as an ordinary LoRA."""
    by_parameter = any(kind in ("expert", "parameter") for kind in kinds_of(bank, names, dropout=0.0).values())
    return True if method == "mica" and by_parameter else method


def notes_on(settings: LoraSettings, method: InitialisationMethod, floored: int, residual: Path | None) -> Iterator[str]:
    """What to know before such an adapter is used, in sentences."""
    if method in RESIDUAL_METHODS and residual is None:
        yield (
            "this adapter belongs to W − s·B·A, not to the base itself: load it with svdbank.peft.load_adapter and the bank, "
            f"or write that base with --residual-out; PEFT alone {_BY_PEFT[method]}"
        )
    if floored:
        yield f"{floored} singular values are zero to rounding and were raised to 1e-6 of the largest, or they would never learn"
    if method == "mica" and settings.target_parameters:
        yield (
            "PEFT has no MiCA for experts and routers: it loads this folder as an ordinary LoRA, in which B trains too; "
            "svdbank.peft.load_adapter keeps B as it is"
        )
