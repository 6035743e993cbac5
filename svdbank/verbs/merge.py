"""``merge``: several adapters of one base become one that PEFT loads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from svdbank.adapter.folder import check_apart, check_output
from svdbank.adapter.writing import write_adapter
from svdbank.bank.reading import Bank
from svdbank.composition.fitting import FitOptions, FitReport, fit_weights
from svdbank.composition.inputs import Places, check_touching, named_places, notes_of, read_inputs
from svdbank.composition.merging import DENSITY, METHODS, Cut, MergeMethod, cut, merged, sizes_of
from svdbank.core.errors import OptionError
from svdbank.core.folders import output_folder
from svdbank.core.specs import ProgressCallback, Struct


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
    method: MergeMethod
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
    method: MergeMethod = "linear",
    density: float | None = None,
    seed: int = 0,
    rank: int | None = None,
    bank: str | Path | Bank | None = None,
    rebase: str | Path | Bank | None = None,
    base: str | Path | None = None,
    fit: FitOptions | None = None,
    force: bool = False,
    progress: ProgressCallback | None = None,
) -> MergeReport:
    """Merge PEFT adapters into one, from their coefficients or factors, without a model and without an (out, in) matrix.

    Parameters
    ----------
    adapters
        Two or more folders, or ``org/name[@revision]`` on the Hub, also as ``NAME=PLACE`` or by name. Ranks,
        alphas, rsLoRA, bands and sets of weights may differ.
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
    bank, rebase, base
        As in :func:`svdbank.composition.inputs.read_inputs`.
    fit
        Choose the weights on held-out text, starting from ``weights``.

    Raises :class:`OptionError` for what cannot be meant, :class:`WrongBaseError` for adapters of different bases, before any work.
    """
    path = output_folder(output)
    check_output(path, force=force)
    check_apart(path, (place for place, _ in named_places(adapters).values()))
    _check_options(method, density, rank)
    read = read_inputs(adapters, bank=bank, rebase=rebase, base=base)
    if len(read) < 2:
        raise OptionError("merging takes two adapters or more", hint="svdbank stack NAME --scale NAME=0.5 scales one")
    check_touching(read)
    for name, adapter in read.items() if fit is not None else ():
        adapter.whole.refuse_replacing(name, "fitting moves factors alone")
    used = _checked_weights(weights, method, len(read))
    if fit is None and not any(used):
        raise OptionError("every weight is 0: the result would change nothing", hint="--weights 0.5,0.5")
    kept = DENSITY if density is None else density

    def candidate(chosen: Sequence[float]) -> Cut:
        return cut(merged(read, chosen, method=method, density=kept, seed=seed), rank)

    fitted = None
    if fit is not None:
        fitted = fit_weights(lambda chosen: candidate(chosen).adapter, dict(zip(read, used, strict=True)), fit, progress)
        used = list(fitted.weights.values())
    result = candidate(used)
    write_adapter(result.adapter, path, force=force)
    sizes = sizes_of(result)
    return MergeReport(
        adapter=str(path),
        method=method,
        weights=dict(zip(read, used, strict=True)),
        density=None if method == "linear" else kept,
        seed=seed if method.startswith("dare") else None,
        rank=result.adapter.rank,
        touched=len(result.adapter.weights),
        in_bank=all(weight.in_bank for weight in result.adapter.weights.values()),
        norm=sizes.norm,
        error=sizes.error,
        worst=sizes.worst,
        fit=fitted,
        notes=tuple(notes_of(read)),
    )


def _check_options(method: str, density: float | None, rank: int | None) -> None:
    if method not in METHODS:
        raise OptionError(f"{method!r} is not a method: {', '.join(METHODS)}")
    if density is not None and method == "linear":
        raise OptionError("linear keeps every coefficient: it has no density", hint="--method ties, or leave --density out")
    if density is not None and not 0 < density <= 1:
        raise OptionError(f"density {density:g} is not above 0 and at most 1")
    if rank is not None and rank < 1:
        raise OptionError(f"rank {rank} is not positive")


def _checked_weights(weights: Sequence[float] | None, method: MergeMethod, count: int) -> list[float]:
    if weights is None:
        return [1.0 if method in ("ties", "dare_ties") else 1 / count] * count
    if len(weights) != count:
        raise OptionError(f"{len(weights)} weights for {count} adapters", hint="one weight for each adapter, in their order")
    if not all(math.isfinite(weight) for weight in weights):
        raise OptionError("a weight is not a finite number")
    return [float(weight) for weight in weights]
