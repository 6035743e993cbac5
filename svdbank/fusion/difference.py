"""What differs between two checkpoints: each targeted weight as low-rank factors, and the names of the other tensors that do."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from svdbank.adapter.components import Free
from svdbank.adapter.experts import kind_in_peft
from svdbank.adapter.weights import AdaptedWeight, BaseWeight
from svdbank.bank.reading import Bank
from svdbank.checkpoint.dtypes import FLOATING
from svdbank.checkpoint.naming.matrices import matrices
from svdbank.checkpoint.naming.selection import decomposable
from svdbank.checkpoint.source import Checkpoint
from svdbank.core.errors import NotFiniteError
from svdbank.core.processors import available_cpus
from svdbank.core.specs import Progress, ProgressCallback, TensorSource, WeightSpec
from svdbank.fusion.approximation import BestFactors, best_factors
from svdbank.solver import pinned_threads

#: Short side up to which LAPACK's eigensolver gains nothing from a second thread.
_SMALL = 1024

#: Values compared at a time across dtypes.
_PIECE = 2**20


@dataclass(frozen=True)
class WeightDifference:
    """``D = W' − W`` of one weight.

    Attributes
    ----------
    spec, sha256
        The base's weight, and the hash of its stored bytes.
    best
        Low-rank factors of D; None where nothing differs.
    size
        ``‖W‖`` (Frobenius).
    minor
        ``‖UᵀD‖²`` and ``‖UᵀBA‖²``, U (out, R) all minor directions that the bank stores; None without them.
    """

    spec: WeightSpec
    sha256: str
    best: BestFactors | None = None
    size: float = 0.0
    minor: tuple[float, float] | None = None


def differences(
    one: Checkpoint,
    other: Checkpoint,
    pairs: Sequence[tuple[WeightSpec, WeightSpec]],
    *,
    rank: int,
    bank: Bank | None,
    progress: ProgressCallback | None,
) -> list[WeightDifference]:
    """Of each pair of weights, in their order: the base's ``one`` and the fine-tuned ``other``'s.

    Raises :class:`NotFiniteError` for a weight with NaN or infinity.
    """
    found = {}
    for result in _compared(_Comparison(one, other, rank, bank), pairs):
        found[result.spec.name] = result
        if progress is not None:
            progress(Progress("extract", len(found), len(pairs), "weights", result.spec.name))
    return [found[spec.name] for spec, _ in pairs]


def adapted_weights(found: Sequence[WeightDifference], component: str) -> dict[str, AdaptedWeight]:
    """Those that differ, as the weights of an adapter with one component of that name."""
    experts = Counter(each.spec.module for each in found)
    fused = any(each.spec.stacked for each in found)
    weights = {}
    for each in found:
        spec, best = each.spec, each.best
        if best is None:
            continue
        weights[spec.name if spec.stacked else spec.module] = AdaptedWeight(
            out_features=spec.out_features,
            in_features=spec.in_features,
            components={component: Free(best.A, best.B)},
            kind=kind_in_peft(spec.module, spec.kind, stacked=spec.stacked, fused=fused),
            source=BaseWeight(spec.name, each.sha256),
            experts=experts[spec.module] if spec.stacked else 0,
        )
    return weights


def differing_tensors(one: Checkpoint, other: Checkpoint, compared: Sequence[WeightSpec]) -> list[str]:
    """Names in the loaded model of what differs beside ``compared``, or what one of the models lacks.

    An output head that is its embedding's tensor is a weight of its own: an adapter of the embedding leaves it as it is. The same values
    in a wider dtype do not differ.
    """
    mine, theirs = _parts(one), _parts(other)
    known: dict[tuple[tuple[TensorSource, ...], tuple[TensorSource, ...]], bool] = {}
    differing = set()
    for name in (mine.keys() | theirs.keys()) - {spec.name for spec in compared}:
        here, there = mine.get(name), theirs.get(name)
        if here is not None and there is not None:
            pair = here.sources, there.sources
            if pair not in known:
                known[pair] = _same(one, here, other, there)
            if known[pair]:
                continue
        differing.add((here or there or _Part(name, ())).name)
    return sorted(differing)


@dataclass(frozen=True)
class _Part:
    """A parameter of the loaded model, or a slice of one, and the tensors it is made of; ``spec`` where it is a matrix."""

    name: str
    sources: tuple[TensorSource, ...]
    spec: WeightSpec | None = None


def _parts(checkpoint: Checkpoint) -> dict[str, _Part]:
    """All of a checkpoint by name, each slice of a stacked parameter by itself."""
    specs, skips = decomposable(checkpoint, (".*",))
    parts = {spec.name: _Part(spec.module if spec.stacked else spec.name, spec.sources, spec) for spec in specs}
    names = matrices(checkpoint).names
    for skip in skips:
        name = names.get(skip.name, skip.name)
        before = parts[name].sources if name in parts else ()
        parts[name] = _Part(name, (*before, checkpoint.tensors[skip.name]))
    return parts


@dataclass(frozen=True)
class _Comparison:
    one: Checkpoint
    other: Checkpoint
    rank: int
    bank: Bank | None

    def __call__(self, pair: tuple[WeightSpec, WeightSpec]) -> WeightDifference:
        spec, theirs = pair
        W, sha256 = self.one.read_hashed(spec)
        D = self.other.read(theirs).double().sub_(W)
        if not bool(torch.isfinite(D).all()):
            raise NotFiniteError(f"{spec.name}: one of the two models holds NaN or infinity there")
        if not bool(D.any()):
            return WeightDifference(spec, sha256)
        best = best_factors(D, self.rank)
        size = float(torch.linalg.vector_norm(W, dtype=torch.float64))
        return WeightDifference(spec, sha256, best, size, _minor(self.bank, spec, D, best))


def _compared(work: _Comparison, pairs: Sequence[tuple[WeightSpec, WeightSpec]]) -> Iterator[WeightDifference]:
    """Small weights several at a time on one thread each, large ones one at a time on all threads, as they come."""
    small = [pair for pair in pairs if pair[0].rank_full <= _SMALL]
    with pinned_threads(1), ThreadPoolExecutor(available_cpus(), "svdbank-extract") as pool:
        yield from pool.map(work, small)
    for pair in pairs:
        if pair[0].rank_full > _SMALL:
            yield work(pair)


def _minor(bank: Bank | None, spec: WeightSpec, D: Tensor, best: BestFactors) -> tuple[float, float] | None:
    if bank is None or spec.name not in bank:
        return None
    U = bank.left([spec.name], bank[spec.name].rank)[spec.name].double()
    kept = (U.mT @ best.B.double()) @ best.A.double()
    return float(torch.linalg.vector_norm(U.mT @ D)) ** 2, float(torch.linalg.vector_norm(kept)) ** 2


def _same(one: Checkpoint, here: _Part, other: Checkpoint, there: _Part) -> bool:
    if [source.shape for source in here.sources] == [source.shape for source in there.sources]:
        return all(_same_tensor(one, mine, other, its) for mine, its in zip(here.sources, there.sources, strict=True))
    if here.spec is None or there.spec is None:
        return False
    # Experts may lie apart in one model and stacked in the other.
    return _equal(one.read(here.spec), other.read(there.spec))


def _same_tensor(one: Checkpoint, mine: TensorSource, other: Checkpoint, theirs: TensorSource) -> bool:
    if mine.dtype not in FLOATING or theirs.dtype not in FLOATING:
        return mine.dtype == theirs.dtype  # position tables and masks: no training changes them
    if mine.dtype == theirs.dtype and (mine.quantisation is None) == (theirs.quantisation is None):
        return _digest(one, mine) == _digest(other, theirs)
    return _equal(one.read_tensor(mine), other.read_tensor(theirs))


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    # Comparing promotes both to a dtype that holds either exactly; in pieces, so that there is no wide copy of an embedding.
    pieces = zip(torch.split(one.flatten(), _PIECE), torch.split(other.flatten(), _PIECE), strict=True)
    return all(bool((a == b).all()) for a, b in pieces)


def _digest(checkpoint: Checkpoint, source: TensorSource) -> str:
    digest = hashlib.sha256()
    checkpoint.read_tensor(source, digest)
    return digest.hexdigest()
