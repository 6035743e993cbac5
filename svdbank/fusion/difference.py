"""``extract``: the best LoRA of rank r of what a fine-tuning changed, one weight at a time.

For ``D = W' − W`` the best rank-r matrix in the Frobenius norm is its principal part (Eckart and Young 1936). It is found from the
eigenvectors of the Gram matrix of D's short side in float64. Squaring costs accuracy at the small end of the spectrum only; how far the
result is from the best is bounded for every weight and reported.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from svdbank.adapter.components import Free, Kind
from svdbank.adapter.documents import BaseIdentity
from svdbank.adapter.folder import check_apart, check_output
from svdbank.adapter.model import Adapter
from svdbank.adapter.settings import LoraSettings
from svdbank.adapter.weights import AdaptedWeight, BaseWeight
from svdbank.adapter.writing import write_adapter
from svdbank.bank.reading import Bank
from svdbank.cache import open as open_cached
from svdbank.cache import opened
from svdbank.checkpoint.dtypes import FLOATING
from svdbank.checkpoint.naming.selection import decomposable
from svdbank.checkpoint.naming.targets import ALL_LINEAR
from svdbank.checkpoint.source import Checkpoint, open_checkpoint
from svdbank.core.errors import BankError, NotFiniteError, OptionError
from svdbank.core.processors import available_cpus
from svdbank.core.specs import Progress, ProgressCallback, Struct, TensorSource, WeightSpec
from svdbank.solver import pinned_threads

#: σ relative to the largest below which a direction is the rounding of float32 factors, and is left out.
_ROUNDING = 2.0**-24

#: Short side up to which LAPACK's eigensolver gains nothing from a second thread.
_SMALL = 1024

#: Values compared at a time across dtypes.
_PIECE = 2**20


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
    """What :func:`extract` did.

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
        Tensors whose values differ too and that the adapter does not hold: they were not targeted, or are no matrices. The same values
        in a wider dtype do not differ.
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

    def __str__(self) -> str:
        return self.adapter


@dataclass(frozen=True)
class BestFactors:
    """``A`` (k, in) and ``B`` (out, k), float32, of equal column and row norms; ``sigma`` (k,) float64 descending.

    ``energy`` is ``‖D‖²``, ``kept`` what is in the factors, ``best`` an upper bound on what any matrix of that rank could hold.
    """

    A: Tensor
    B: Tensor
    sigma: Tensor
    energy: float
    kept: float
    best: float


def extract(
    base: str | os.PathLike[str],
    finetuned: str | os.PathLike[str],
    *,
    output: str | Path,
    rank: int = 16,
    targets: str | Sequence[str] = (ALL_LINEAR,),
    bank: Bank | str | os.PathLike[str] | None = None,
    task_type: str | None = None,
    force: bool = False,
    progress: ProgressCallback | None = None,
) -> ExtractReport:
    """Write the best rank-``rank`` LoRA of the difference between two checkpoints as a PEFT folder.

    Parameters
    ----------
    base, finetuned
        Folders, files or ``org/name[@revision]`` of models with the same weights.
    rank
        Of every weight; less where its difference has less.
    targets
        Which weights, in PEFT's language.
    bank
        A bank of the base, to say how much of the change lies in its minor directions: a bank, its folder, or a model whose bank is in
        the cache; by default the cached one if there is one.

    Weights are read one pair at a time. Raises :class:`OptionError` where the models do not have the same weights and shapes, or do not
    differ; :class:`NotFiniteError` for a weight with NaN or infinity.
    """
    if rank < 1:
        raise OptionError(f"a rank is at least 1, not {rank}")
    target = Path(output).expanduser().resolve()
    check_output(target, force=force)
    check_apart(target, [base, finetuned])
    with open_checkpoint(base) as one, open_checkpoint(finetuned) as other:
        chosen = [targets] if isinstance(targets, str) else list(targets)
        pairs = _pairs(one, other, chosen)
        held = opened(bank) if bank is not None else _cached(base)
        work = _Work(one, other, rank, held)
        found: list[ExtractedWeight] = []
        weights: dict[str, AdaptedWeight] = {}
        energies: list[tuple[float, ...]] = []
        experts = Counter(spec.module for spec, _ in pairs)
        results = {}
        for done, result in enumerate(_each(work, pairs)):
            results[result.spec.name] = result
            _tell(progress, done + 1, len(pairs), result.spec.name)
        ordered = [results[spec.name] for spec, _ in pairs]
        equal = [result.spec.name for result in ordered if result.factors is None]
        for result in ordered:
            if result.factors is None:
                continue
            spec, best = result.spec, result.factors
            found.append(_extracted(spec, best, result.size, result.minor))
            energies.append((best.energy, best.kept, *(result.minor or ())))
            weights[spec.name if spec.stacked else spec.module] = AdaptedWeight(
                out_features=spec.out_features,
                in_features=spec.in_features,
                components={"extracted": Free(best.A, best.B)},
                kind=_kind(spec),
                source=BaseWeight(spec.name, result.sha256),
                experts=experts[spec.module] if spec.stacked else 0,
            )
        if not weights:
            raise OptionError(
                f"{one.name} and {other.name}: the {len(pairs)} weights compared are the same to the bit",
                hint="check the paths, or name other modules with --targets",
            )
        outside = _outside(one, other, {source.name for spec, _ in pairs for source in spec.sources})
        settings = LoraSettings(r=rank, lora_alpha=rank, task_type=task_type)
        identity = BaseIdentity(str(base) if one.revision is None else one.name, one.revision)
        path = write_adapter(Adapter(weights, identity, "lora", settings), output, force=force)
        total = [math.fsum(column) for column in zip(*energies, strict=True)]
        return ExtractReport(
            adapter=str(path),
            base=one.name,
            finetuned=other.name,
            rank=rank,
            weights=tuple(found),
            equal=tuple(equal),
            kept=total[1] / total[0],
            minor=total[2] / total[0] if len(total) > 2 else None,
            minor_kept=total[3] / total[1] if len(total) > 2 else None,
            bank=None if len(total) < 3 or held is None else str(held.path),
            bank_rank=None if len(total) < 3 or held is None else max(held[spec.name].rank for spec, _ in pairs),
            outside=tuple(outside),
        )


@dataclass(frozen=True)
class _Result:
    """One weight compared; ``factors`` is None where nothing differs. ``minor`` as of :func:`_minor`, ``size`` is ``‖W‖``."""

    spec: WeightSpec
    sha256: str
    factors: BestFactors | None = None
    size: float = 0.0
    minor: tuple[float, float] | None = None


@dataclass(frozen=True)
class _Work:
    one: Checkpoint
    other: Checkpoint
    rank: int
    bank: Bank | None

    def __call__(self, pair: tuple[WeightSpec, WeightSpec]) -> _Result:
        spec, theirs = pair
        W, sha256 = self.one.read_hashed(spec)
        D = self.other.read(theirs).double().sub_(W)
        if not bool(torch.isfinite(D).all()):
            raise NotFiniteError(f"{spec.name}: one of the two models holds NaN or infinity there")
        if not bool(D.any()):
            return _Result(spec, sha256)
        best = best_factors(D, self.rank)
        size = float(torch.linalg.vector_norm(W, dtype=torch.float64))
        return _Result(spec, sha256, best, size, _minor(self.bank, spec, D, best))


def _each(work: _Work, pairs: Sequence[tuple[WeightSpec, WeightSpec]]) -> Iterator[_Result]:
    """Small weights several at a time on one thread each, large ones one at a time on all threads, as they come."""
    small = [pair for pair in pairs if pair[0].rank_full <= _SMALL]
    with pinned_threads(1), ThreadPoolExecutor(available_cpus(), "svdbank-extract") as pool:
        yield from pool.map(work, small)
    for pair in pairs:
        if pair[0].rank_full > _SMALL:
            yield work(pair)


def _kind(spec: WeightSpec) -> Kind:
    return "expert" if spec.stacked else "embedding" if spec.kind == "embedding" else "linear"


def best_factors(D: Tensor, rank: int) -> BestFactors:
    """The best approximation of ``D`` (out, in; float64, not zero) of rank ``rank`` or the rank of D, if that is less.

    ``best``: the ``rank`` largest eigenvalues of the computed Gram matrix, plus what its rounding can hide of each (Weyl): entries of a
    product of length n are off by at most ``n·eps·‖row‖·‖column‖``, the matrix by at most ``n·eps·‖D‖²``.
    """
    turned = D.shape[0] > D.shape[1]
    M = D.mT if turned else D  # (k, n), k ≤ n
    values, vectors = torch.linalg.eigh(M @ M.mT)
    values, vectors = values.flip(0)[:rank].clamp_min(0), vectors.flip(1)[:, :rank]
    count = max(1, int((values > (_ROUNDING**2) * values[0]).sum()))
    Q = vectors[:, :count]
    # M ≈ Q Qᵀ M; the SVD of the thin part gives singular values to full accuracy.
    U, sigma, Vh = torch.linalg.svd(Q.mT @ M, full_matrices=False)
    root = sigma.sqrt()
    short, long = ((Q @ U) * root).float(), (root[:, None] * Vh).float()
    energy = float(torch.linalg.vector_norm(M)) ** 2
    hidden = rank * M.shape[1] * torch.finfo(torch.float64).eps * energy
    best = min(energy, float(values.sum()) + hidden)
    A, B = (short.mT, long.mT) if turned else (long, short)
    # ‖D‖² − ‖D − B A‖², so that the rounding of the factors counts.
    lost = float(torch.linalg.vector_norm(D - B.double() @ A.double())) ** 2
    return BestFactors(A.contiguous(), B.contiguous(), sigma, energy, energy - lost, best)


def _extracted(spec: WeightSpec, best: BestFactors, size: float, minor: tuple[float, float] | None) -> ExtractedWeight:
    norm = math.sqrt(best.energy)
    return ExtractedWeight(
        name=spec.name,
        module=spec.module,
        rank=len(best.sigma),
        norm=norm,
        relative=norm / size if size else math.inf,
        kept=best.kept / best.energy,
        optimality=max(0.0, best.best - best.kept) / best.energy,
        minor=None if minor is None else minor[0] / best.energy,
        minor_kept=None if minor is None else minor[1] / best.kept,
    )


def _minor(bank: Bank | None, spec: WeightSpec, D: Tensor, best: BestFactors) -> tuple[float, float] | None:
    """``‖UᵀD‖²`` of the difference and of its kept part, U (out, R) all minor directions that the bank stores; None without them."""
    if bank is None or spec.name not in bank:
        return None
    U = bank.left([spec.name], bank[spec.name].rank)[spec.name].double()
    kept = (U.mT @ best.B.double()) @ best.A.double()
    return float(torch.linalg.vector_norm(U.mT @ D)) ** 2, float(torch.linalg.vector_norm(kept)) ** 2


def _cached(base: str | os.PathLike[str]) -> Bank | None:
    with contextlib.suppress(BankError):
        return open_cached(base)
    return None


def _pairs(one: Checkpoint, other: Checkpoint, targets: list[str]) -> list[tuple[WeightSpec, WeightSpec]]:
    """The targeted weights of both models, by name. Raises :class:`OptionError` where they do not correspond."""
    mine = {spec.name: spec for spec in decomposable(one, targets)[0]}
    theirs = {spec.name: spec for spec in decomposable(other, targets)[0]}
    lacking = [(name, other) for name in mine if name not in theirs] + [(name, one) for name in theirs if name not in mine]
    if lacking:
        name, where = lacking[0]
        raise OptionError(
            f"{where.name} lacks {len(lacking)} weights of the other model, first {name}: they are not of one architecture",
            hint="name a fine-tuned model and the base it was made from",
        )
    _check_vocabularies(one, other)
    for name, spec in mine.items():
        here, there = (spec.out_features, spec.in_features), (theirs[name].out_features, theirs[name].in_features)
        if here != there:
            raise OptionError(
                f"{name} is {here[0]}×{here[1]} in {one.name} and {there[0]}×{there[1]} in {other.name}",
                hint="name a fine-tuned model and the base it was made from",
            )
    return [(spec, theirs[name]) for name, spec in mine.items()]


def _check_vocabularies(one: Checkpoint, other: Checkpoint) -> None:
    """Embeddings and heads must agree even where they are not targeted: with other tokens the adapter is of no use on the base."""
    ends = [spec for spec in decomposable(one, (".*",))[0] if spec.kind in ("embedding", "head")]
    for source in (source for spec in ends for source in spec.sources):
        there = other.tensors.get(source.name)
        if there is not None and there.shape != source.shape:
            raise OptionError(
                f"{source.name} is {_shape(source.shape)} in {one.name} and {_shape(there.shape)} in {other.name}: the "
                "vocabulary was resized, and an adapter cannot add tokens to the base",
                hint=f"resize the base first: model.resize_token_embeddings({there.shape[0]}), then save_pretrained",
            )


def _shape(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def _outside(one: Checkpoint, other: Checkpoint, compared: set[str]) -> list[str]:
    """Names of the other tensors that differ, or which one of the models lacks; a wider dtype of the same values is no difference."""
    names = sorted((set(one.tensors) | set(other.tensors)) - compared)
    return [name for name in names if not _same(one, other, name)]


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


def _tell(progress: ProgressCallback | None, done: int, total: int, item: str) -> None:
    if progress is not None:
        progress(Progress("extract", done, total, "weights", item))
