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
    """Names of the tensors beside ``compared`` that differ, or that one of the models lacks; the same values in a wider dtype do not."""
    names = (set(one.tensors) | set(other.tensors)) - {source.name for spec in compared for source in spec.sources}
    return [name for name in sorted(names) if not _same(one, other, name)]


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


def _same(one: Checkpoint, other: Checkpoint, name: str) -> bool:
    mine, theirs = one.tensors.get(name), other.tensors.get(name)
    if mine is None or theirs is None or mine.shape != theirs.shape:
        return False
    if mine.dtype not in FLOATING or theirs.dtype not in FLOATING:
        return mine.dtype == theirs.dtype  # position tables and masks: no training changes them
    if mine.dtype == theirs.dtype and (mine.quantisation is None) == (theirs.quantisation is None):
        return _digest(one, mine) == _digest(other, theirs)
    ours, others = one.read_tensor(mine).flatten(), other.read_tensor(theirs).flatten()
    # Comparing promotes both to a dtype that holds either exactly; in pieces, so that there is no wide copy of an embedding.
    return all(bool((a == b).all()) for a, b in zip(torch.split(ours, _PIECE), torch.split(others, _PIECE), strict=True))


def _digest(checkpoint: Checkpoint, source: TensorSource) -> str:
    digest = hashlib.sha256()
    checkpoint.read_tensor(source, digest)
    return digest.hexdigest()
