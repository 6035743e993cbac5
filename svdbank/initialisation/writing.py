"""A fresh adapter as a folder: its factors under PEFT's names, its record, and what it counts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from svdbank.adapter.components import Band, Kind
from svdbank.adapter.entries import by_module
from svdbank.adapter.folder import write_folder
from svdbank.adapter.methods import RESIDUAL_METHODS, InitialisationMethod
from svdbank.adapter.settings import AdapterCache, LoraSettings
from svdbank.adapter.writing import recorded
from svdbank.bank.reading import Bank


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
    keys: dict[str, str] = {}
    kinds: dict[str, Kind] = {}
    for name in factors:
        basis = bank[name]
        keys[name] = name if basis.stacked else basis.module
        kinds[keys[name]] = "expert" if basis.stacked else "embedding" if basis.kind == "embedding" else "linear"
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
