"""Adapters as a report sees them: each measured once, weight by weight."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from svdbank.adapter.model import Adapter
from svdbank.adapter.spectra import singular_values
from svdbank.adapter.weights import names_in
from svdbank.bank.reading import Bank
from svdbank.composition.angles import layer_of
from svdbank.core.errors import SvdbankError
from svdbank.reporting.document import counted
from svdbank.reporting.families import layer_key
from svdbank.reporting.training import Training

#: Adapters that are drawn by layer and held against each other; more make a figure that says nothing.
DRAWN = 12


@dataclass(frozen=True)
class ReadAdapter:
    """An adapter, or a domain of a stack, by its name in the report. ``place`` is where it came from, ``of`` the stack's name."""

    name: str
    place: str
    adapter: Adapter
    stack: str | None = None
    training: Training | None = None


@dataclass(frozen=True)
class Drift:
    """How far one weight moved: ``norm`` is ‖ΔW‖, ``largest`` the largest singular value of ΔW, ``share`` that over σ_max of W."""

    key: str
    norm: float
    largest: float
    share: float | None
    bands: str
    rank: int


@dataclass(frozen=True)
class MeasuredAdapter:
    """What is computed of an adapter once, for all sections."""

    read: ReadAdapter
    drifts: list[Drift]
    norms: dict[str, float]
    notes: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.read.name

    @property
    def norm(self) -> float:
        return math.sqrt(math.fsum(drift.norm**2 for drift in self.drifts))


def measure_adapter(read: ReadAdapter, bank: Bank | None) -> MeasuredAdapter:
    adapter, notes = read.adapter, list(read.adapter.notes)
    names: Mapping[str, str] = {}
    if bank is not None:
        try:
            names = names_in(bank, adapter.weights)
        except SvdbankError as error:
            notes.append(str(error))
    drifts: list[Drift] = []
    squares: dict[str, float] = {}
    for key, weight in adapter.weights.items():
        total = weight.total()
        sigma = singular_values(total)
        largest = float(sigma[0]) if len(sigma) else 0.0
        whole = bank[names[key]].certificate.sigma_max if bank is not None and key in names else 0.0
        norm = math.sqrt(weight.squared_norm)
        bands = ", ".join(f"{a}–{b}" for a, b in adapter.bands(key)) if weight.in_bank else "own"
        drifts.append(Drift(key, norm, largest, largest / whole if whole > 0 else None, bands, total.max_rank))
        squares[layer_of(key)] = squares.get(layer_of(key), 0.0) + norm**2
    if whole_tensors := len(adapter.whole.replacing):
        notes.append(
            f"{counted(whole_tensors, 'tensor')} held whole (modules_to_save) {'is' if whole_tensors == 1 else 'are'} not in these figures"
        )
    norms = {layer: math.sqrt(squares[layer]) for layer in sorted(squares, key=layer_key)}
    return MeasuredAdapter(read, drifts, norms, tuple(notes))


def role_of(key: str) -> str:
    parts = [part for part in key.split(".") if not part.isdigit()]
    return parts[-1] if parts else key
