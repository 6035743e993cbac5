"""``merge``: several adapters of one base become one that PEFT loads."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch

from svdbank.adapter.components import Component, InBank, singular_values, truncated
from svdbank.adapter.folder import check_apart, check_output
from svdbank.adapter.model import AdaptedWeight, Adapter, combination, joined
from svdbank.adapter.writing import write_adapter
from svdbank.bank.reading import Bank
from svdbank.composition.coordinates import common_coordinates
from svdbank.composition.fitting import FitOptions, FitReport, fit_weights
from svdbank.composition.inputs import Places, check_touching, named_places, notes_of, read_inputs
from svdbank.composition.sparsification import dropped, elected, summed, trimmed
from svdbank.core.errors import OptionError
from svdbank.core.specs import ProgressCallback, Struct

Method = Literal["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
METHODS: tuple[Method, ...] = get_args(Method)

#: Name of the one component that a merged adapter has.
MERGED = "merged"

#: Share of the coefficients that the sparsifying methods keep where nothing is asked for.
DENSITY = 0.5


class MergeReport(Struct, frozen=True):
    """What ``merge`` wrote.

    Attributes
    ----------
    weights
        By adapter, as they were used.
    density, seed
        None where the method has none.
    rank
        Largest rank of a weight; ``touched`` is the number of weights.
    in_bank
        True where every weight stands on directions of the bank; else some are free factors, put together by concatenation and QR.
    error
        ``‖ΔW − ΔW_k‖ / ‖ΔW‖`` over all weights (Frobenius) that truncating to rank k cost; 0 where nothing was cut. ``worst`` is the
        weight that lost most of its own norm, and that share.
    fit
        How the weights were chosen, where they were fitted.
    """

    adapter: str
    method: Method
    weights: dict[str, float]
    density: float | None
    seed: int | None
    rank: int
    touched: int
    in_bank: bool
    norm: float
    error: float
    worst: tuple[str, float] | None
    fit: FitReport | None
    notes: tuple[str, ...]


def merge(
    adapters: Places,
    *,
    output: str | Path,
    weights: Sequence[float] | None = None,
    method: Method = "linear",
    density: float | None = None,
    seed: int = 0,
    rank: int | None = None,
    bank: str | Path | Bank | None = None,
    rebase: str | Path | Bank | None = None,
    fit: FitOptions | None = None,
    force: bool = False,
    progress: ProgressCallback | None = None,
) -> MergeReport:
    """Merge PEFT adapter folders into one, from their coefficients or factors, without a model and without an (out, in) matrix.

    Parameters
    ----------
    adapters
        Two or more folders, ``NAME=DIR``, or folders by name. Ranks, alphas, rsLoRA, bands and sets of weights may differ.
    weights
        One for each adapter: by default 1/m each where the method sums, and 1 each for ``ties`` and ``dare_ties``, which take a mean.
    method
        ``linear``: Σ wᵢ ΔWᵢ, exact. ``ties`` (arXiv 2306.01708), ``dare_linear`` and ``dare_ties`` (arXiv 2311.03099) and
        ``magnitude_prune`` act on coefficients in the bank's coordinates, which gives other numbers than on the entries of ΔW.
    density
        Share of the coefficients that those four keep, 0.5 by default.
    seed
        Of DARE's draws. A weight's draws depend on the seed, its name and the place of the adapter, on nothing else.
    rank
        Cut every weight to its best approximation of this rank (Eckart–Young), after merging.
    bank, rebase
        As in :func:`svdbank.composition.inputs.read_inputs`.
    fit
        Choose the weights on held-out text, starting from ``weights``.

    Raises :class:`OptionError` for what cannot be meant, :class:`WrongBaseError` for adapters of different bases, before any work.
    """
    path = Path(output).expanduser().resolve()
    check_output(path, force=force)
    check_apart(path, (place for place, _ in named_places(adapters).values()))
    _check_options(method, density, rank)
    read = read_inputs(adapters, bank=bank, rebase=rebase)
    if len(read) < 2:
        raise OptionError("merging takes two adapters or more", hint="svdbank stack NAME --scale NAME=0.5 scales one")
    check_touching(read)
    used = _checked_weights(weights, method, len(read))
    if fit is None and not any(used):
        raise OptionError("every weight is 0: the result would change nothing", hint="--weights 0.5,0.5")
    kept = DENSITY if density is None else density

    def merged_with(chosen: Sequence[float]) -> tuple[Adapter, dict[str, float]]:
        whole = merged(read, chosen, method=method, density=kept, seed=seed)
        return _cut(whole, rank)

    fitted = None
    if fit is not None:
        fitted = fit_weights(lambda chosen: merged_with(chosen)[0], dict(zip(read, used, strict=True)), fit, progress)
        used = list(fitted.weights.values())
    result, lost = merged_with(used)
    write_adapter(result, path, force=force)
    norms = _squared_norms(result)
    sizes = {key: norms[key] + loss**2 for key, loss in lost.items()}
    whole = math.fsum(norms.values()) + math.fsum(loss**2 for loss in lost.values())
    shares = {key: lost[key] / math.sqrt(size) for key, size in sizes.items() if size > 0}
    worst = max(shares, key=shares.__getitem__, default=None)
    return MergeReport(
        adapter=str(path),
        method=method,
        weights=dict(zip(read, used, strict=True)),
        density=None if method == "linear" else kept,
        seed=seed if method.startswith("dare") else None,
        rank=result.rank,
        touched=len(result.weights),
        in_bank=all(weight.in_bank for weight in result.weights.values()),
        norm=math.sqrt(math.fsum(norms.values())),
        error=math.sqrt(math.fsum(loss**2 for loss in lost.values()) / whole) if whole else 0.0,
        worst=None if worst is None else (worst, shares[worst]),
        fit=fitted,
        notes=tuple(notes_of(read)),
    )


def merged(
    adapters: Mapping[str, Adapter],
    weights: Sequence[float],
    *,
    method: Method = "linear",
    density: float = DENSITY,
    seed: int = 0,
) -> Adapter:
    """The merge as a value, with one component called ``merged``; what :func:`merge` writes before it cuts ranks."""
    if method == "linear":
        total = combination(list(zip(weights, adapters.values(), strict=True)), name=MERGED)
    else:

        def by_coefficients(key: str, parts: Mapping[int, AdaptedWeight]) -> dict[str, Component]:
            own = [weights[number] for number in parts]
            components = [weight.total() for weight in parts.values()]
            return {MERGED: _by_coefficients(components, own, method, density, _seeds(seed, key, list(parts)))}

        total = joined(list(adapters.values()), by_coefficients)
    return replace(total, weights={key: _narrowed(weight) for key, weight in total.weights.items()})


def _by_coefficients(
    components: Sequence[Component], weights: Sequence[float], method: Method, density: float, seeds: Sequence[int]
) -> Component:
    at = common_coordinates(components)
    if method in ("ties", "magnitude_prune"):
        C = trimmed(at.C, at.rows, density)
    else:
        drawn = [dropped(part[None], density, np.random.default_rng(seed)) for part, seed in zip(at.C, seeds, strict=True)]
        C = torch.cat(drawn)
    return at.component(elected(C, weights) if method in ("ties", "dare_ties") else summed(C, weights))


def _seeds(seed: int, key: str, numbers: Sequence[int]) -> list[int]:
    """One for each adapter and weight, so that what is drawn does not depend on what else is merged in which order."""
    return [int.from_bytes(hashlib.sha256(f"{seed}/{number}/{key}".encode()).digest()[:7], "big") for number in numbers]


def _narrowed(weight: AdaptedWeight) -> AdaptedWeight:
    """Factors with more columns than the matrix has sides, as concatenation gives, cut to what the matrix can have: nothing is lost."""
    most = min(weight.out_features, weight.in_features)
    total = weight.total()
    return weight if total.max_rank <= most else replace(weight, components={MERGED: truncated(total, most)})


def _cut(adapter: Adapter, rank: int | None) -> tuple[Adapter, dict[str, float]]:
    """Truncated to ``rank``, with the Frobenius norm of what each cut weight lost."""
    lost: dict[str, float] = {}
    if rank is None:
        return adapter, lost
    for key, weight in adapter.weights.items():
        total = weight.total()
        if total.max_rank > rank:
            lost[key] = float(torch.linalg.vector_norm(singular_values(total)[rank:]))
    return adapter.truncate(rank), lost


def _squared_norms(adapter: Adapter) -> dict[str, float]:
    norms = {}
    for key, weight in adapter.weights.items():
        total = weight.total()
        if isinstance(total, InBank) and total.orthonormal:
            norms[key] = float(torch.linalg.vector_norm(total.C.double())) ** 2
        else:
            A, B = (factor.double() for factor in total.factors)
            norms[key] = max(0.0, float(((B.mT @ B) * (A @ A.mT)).sum()))
    return norms


def _check_options(method: str, density: float | None, rank: int | None) -> None:
    if method not in METHODS:
        raise OptionError(f"{method!r} is not a method: {', '.join(METHODS)}")
    if density is not None and method == "linear":
        raise OptionError("linear keeps every coefficient: it has no density", hint="--method ties, or leave --density out")
    if density is not None and not 0 < density <= 1:
        raise OptionError(f"density {density:g} is not above 0 and at most 1")
    if rank is not None and rank < 1:
        raise OptionError(f"rank {rank} is not positive")


def _checked_weights(weights: Sequence[float] | None, method: Method, count: int) -> list[float]:
    if weights is None:
        return [1.0 if method in ("ties", "dare_ties") else 1 / count] * count
    if len(weights) != count:
        raise OptionError(f"{len(weights)} weights for {count} adapters", hint="one weight for each adapter, in their order")
    if not all(math.isfinite(weight) for weight in weights):
        raise OptionError("a weight is not a finite number")
    return [float(weight) for weight in weights]
