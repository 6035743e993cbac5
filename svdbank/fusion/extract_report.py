"""What an extract found, for people and programs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from svdbank.bank.reading import Bank
from svdbank.checkpoint.source import Checkpoint
from svdbank.core.specs import Struct
from svdbank.fusion.approximation import BestFactors
from svdbank.fusion.difference import WeightDifference


class ExtractedWeight(Struct, frozen=True):
    """One weight of the difference.

    Attributes
    ----------
    name, module
        In the model; of an expert, the module is its parameter.
    rank
        Of the factors: less than asked for where the difference itself has less.
    norm, relative
        ``‖D‖`` (Frobenius), and relative to ``‖W‖``.
    kept
        Share of ``‖D‖²`` in the adapter.
    optimality
        Bound on what a better choice of the same rank could add to ``kept``.
    minor
        Share of ``‖D‖²`` in the directions that the bank stores, and of the kept part; None without a bank.
    minor_kept
        The same of the part that is kept.
    """

    name: str
    module: str
    rank: int
    norm: float
    relative: float
    kept: float
    optimality: float
    minor: float | None
    minor_kept: float | None


class ExtractReport(Struct, frozen=True):
    """What :func:`svdbank.extract` did.

    Attributes
    ----------
    adapter, base, finetuned
        The folder written, and the two models.
    rank
        The one asked for.
    weights
        Those in the adapter.
    equal
        Targeted weights that are the same to the bit, and are left out.
    kept, minor, minor_kept
        As of a weight, over all of them.
    bank, bank_rank
        The bank whose minor directions ``minor`` speaks of, and how many of them it has for most weights.
    outside
        Parameters of the loaded model whose values differ too and that the adapter does not hold: they were not targeted, or are no
        matrices. The same values in a wider dtype do not differ.
    settings
        Fields of ``config.json`` that differ and may change what the model computes; an adapter holds none of them.
    """

    adapter: str
    base: str
    finetuned: str
    rank: int
    weights: tuple[ExtractedWeight, ...]
    equal: tuple[str, ...]
    kept: float
    minor: float | None
    minor_kept: float | None
    bank: str | None
    bank_rank: int | None
    outside: tuple[str, ...]
    settings: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.adapter


def report_of(
    found: Sequence[WeightDifference],
    outside: Sequence[str],
    settings: Sequence[str],
    *,
    adapter: Path,
    base: Checkpoint,
    finetuned: Checkpoint,
    rank: int,
    bank: Bank | None,
) -> ExtractReport:
    """From the differences, at least one of which is not zero."""
    changed = [(each, each.best) for each in found if each.best is not None]
    sizes = [(best.energy, best.kept, *(each.minor or ())) for each, best in changed]
    total = [math.fsum(column) for column in zip(*sizes, strict=True)]
    placed = bank if len(total) > 2 else None
    return ExtractReport(
        adapter=str(adapter),
        base=base.name,
        finetuned=finetuned.name,
        rank=rank,
        weights=tuple(_weight(each, best) for each, best in changed),
        equal=tuple(each.spec.name for each in found if each.best is None),
        kept=total[1] / total[0],
        minor=total[2] / total[0] if len(total) > 2 else None,
        minor_kept=total[3] / total[1] if len(total) > 2 else None,
        bank=None if placed is None else placed.place,
        bank_rank=None if placed is None else max(placed[each.spec.name].rank for each in found),
        outside=tuple(outside),
        settings=tuple(settings),
    )


def _weight(found: WeightDifference, best: BestFactors) -> ExtractedWeight:
    norm = math.sqrt(best.energy)
    return ExtractedWeight(
        name=found.spec.name,
        module=found.spec.module,
        rank=len(best.sigma),
        norm=norm,
        relative=norm / found.size if found.size else math.inf,
        kept=best.kept / best.energy,
        optimality=max(0.0, best.best - best.kept) / best.energy,
        minor=None if found.minor is None else found.minor[0] / best.energy,
        minor_kept=None if found.minor is None else found.minor[1] / best.kept,
    )
