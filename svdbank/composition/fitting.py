"""Weights of a merge, or scales of a stack, chosen on held-out text: few evaluations by a derivative-free optimiser."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from svdbank.adapter.model import Adapter
from svdbank.adapter.writing import write_adapter
from svdbank.core.errors import OptionError, missing_extra
from svdbank.core.specs import Progress, ProgressCallback, Struct
from svdbank.lm.loading import Dtype, LoadIn

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Weights are looked for from 0, without the adapter, to twice its full strength.
BOUNDS = (0.0, 2.0)

#: Weights closer than this are not told apart: a change of the loss by it is below the texts' own error.
RESOLUTION = 0.02


class FitOptions(Struct, frozen=True, kw_only=True):
    """What weights are chosen on.

    Attributes
    ----------
    model
        Folder or ``org/name[@revision]`` of the base.
    texts
        Held-out texts. What is lowered is the mean over texts of the loss in nats a token, so that each text counts the same.
    length, tokens
        Tokens of a window, and of each text that are measured.
    evaluations
        Adapters that are tried at most.
    """

    model: str
    texts: tuple[str, ...]
    length: int = 256
    tokens: int = 6144
    evaluations: int = 24
    batch_size: int = 4
    field: str = "text"
    split: str = "train"
    dtype: Dtype = "auto"
    load_in: LoadIn | None = None


class Trial(Struct, frozen=True):
    """Weights that were tried and the mean loss they gave."""

    weights: tuple[float, ...]
    loss: float


class FitReport(Struct, frozen=True):
    """What was chosen. ``start`` and ``loss`` are mean losses before and after, ``base`` that of the model alone."""

    weights: dict[str, float]
    base: float
    start: float
    loss: float
    trials: tuple[Trial, ...]


def fit_weights(
    candidate: Callable[[Sequence[float]], Adapter],
    start: Mapping[str, float],
    options: FitOptions,
    progress: ProgressCallback | None = None,
) -> FitReport:
    """The weights with the lowest mean loss of ``candidate(weights)`` that were found, starting from ``start``, inside :data:`BOUNDS`.

    COBYQA (Ragonneau, thesis, 2022), as in scipy: quadratic models in a trust region, no derivatives, deterministic. Each candidate is
    written as a folder and loaded by PEFT, so what is measured is what will be loaded.

    Raises :class:`OptionError` for what cannot be meant, :class:`MissingExtraError` without scipy, before the model is loaded.
    """
    try:
        from scipy.optimize import minimize
    except ImportError as cause:
        raise missing_extra("scipy", "fit") from cause
    from svdbank.lm.gauge import Gauge

    if options.evaluations < 2:
        raise OptionError("fitting takes two evaluations or more")
    low, high = BOUNDS
    if not all(low <= weight <= high for weight in start.values()):
        raise OptionError(f"fitting looks for weights from {low:g} to {high:g}, and does not start at {list(start.values())}")
    gauge = Gauge(
        options.model,
        options.texts,
        length=options.length,
        tokens=options.tokens,
        batch_size=options.batch_size,
        field=options.field,
        split=options.split,
        dtype=options.dtype,
        load_in=options.load_in,
    )
    base = _mean(gauge.losses(None))
    tried: dict[tuple[float, ...], float] = {}
    with tempfile.TemporaryDirectory(prefix="svdbank-fit-") as folder:

        def loss(point: NDArray | Sequence[float]) -> float:  # type: ignore[type-arg]
            weights = tuple(round(min(max(float(x), low), high), 4) for x in point)
            if weights not in tried:
                # An adapter of zeros is the base: nothing to write.
                place = Path(folder) / str(len(tried))
                tried[weights] = _mean(gauge.losses(write_adapter(candidate(weights), place))) if any(weights) else base
                if progress is not None:
                    shown = ", ".join(f"{weight:.2f}" for weight in weights)
                    progress(
                        Progress("fitting", len(tried), options.evaluations, "trials", f"{shown}: loss {tried[weights]:.4f}")
                    )
            return tried[weights]

        first = list(start.values())
        loss(first)
        settings = {"maxfev": options.evaluations, "initial_tr_radius": 0.3, "final_tr_radius": RESOLUTION}
        minimize(loss, first, method="COBYQA", bounds=[BOUNDS] * len(first), options=settings)
    best = min(tried, key=tried.__getitem__)
    trials = tuple(Trial(weights, value) for weights, value in tried.items())
    if not math.isfinite(tried[best]):
        raise OptionError("no weights gave a finite loss", hint="svdbank eval measures each adapter by itself")
    return FitReport(dict(zip(start, best, strict=True)), base, trials[0].loss, tried[best], trials)


def _mean(losses: Mapping[str, float]) -> float:
    return math.fsum(losses.values()) / len(losses)
