"""What a run does that its user should hear of while it runs, with what to change."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from statistics import fmean, median

#: Points of the curve whose means are compared.
_POINTS = 3

#: So many standard errors are no chance. The lowest of many means is low by chance: at six, one flat run of 100 points in 25 said so.
_SURE = 8.0


class Noticing:
    """Reads figures as they come and says each thing once, through ``say``. ``said`` is all of it."""

    def __init__(self, say: Callable[[str], None], *, clip: float) -> None:
        self.said: list[str] = []
        self._say = say
        self._clip = clip
        self._losses: list[float] = []
        self._norms: list[float] = []
        self._kinds: set[str] = set()

    def logged(self, step: int, loss: float, norm: float | None, rate: float) -> None:
        """A point of the curve: mean training loss, and the gradient's norm before it was clipped."""
        if not math.isfinite(loss):
            self._once("finite", f"step {step}: the training loss is no number; a lower --learning-rate than {rate:.2g}")
            return
        self._losses.append(loss)
        if norm is not None:
            self._norms.append(norm)
        if risen := _risen(self._losses):
            self._once(
                "rises",
                f"step {step}: the training loss rises, {risen[0]:.3f} at its lowest and {risen[1]:.3f} over the last {_POINTS} points; "
                f"a lower --learning-rate than {rate:.2g}",
            )

    def depends(self, text: str) -> None:
        """That the model depends on a BOS which its tokenizer does not add, in the words of :mod:`svdbank.lm.dependence`."""
        self._once("bos", text)

    def measured(self, step: int, change: float, error: float, rate: float) -> None:
        """Change of the loss on the text held out since the start, with its standard error."""
        if change > 2 * error:
            self._once(
                "worse",
                f"step {step}: the text held out is worse than before, by {change:.3f} ± {error:.3f}; "
                f"a lower --learning-rate than {rate:.2g}, or more text",
            )

    def ended(self) -> None:
        """Said of the whole run: a gradient that was clipped at every point."""
        if self._clip and len(self._norms) >= 5 and min(self._norms) > self._clip:
            self._once(
                "clipped",
                f"the gradient was longer than --clip {self._clip:g} at every point of the curve, {median(self._norms):.2g} in the middle: "
                "its length said nothing any more, and a batch of outliers weighed as much as any; "
                f"--clip {_rounded(2 * median(self._norms)):g} cuts outliers alone",
            )

    def _once(self, kind: str, text: str) -> None:
        if kind not in self._kinds:
            self._kinds.add(kind)
            self.said.append(text)
            self._say(text)


def _risen(losses: list[float]) -> tuple[float, float] | None:
    """(lowest mean of neighbouring points, mean of the last ones) where the rise is beyond the points' own scatter."""
    if len(losses) < 3 * _POINTS:
        return None
    means = [fmean(losses[i : i + _POINTS]) for i in range(len(losses) - _POINTS + 1)]
    lowest, last = min(means[:-_POINTS]), means[-1]
    # Differences of neighbours do not see a slow rise: the median of two independent normals' is 0.954 of their deviation.
    scatter = median(abs(b - a) for a, b in itertools.pairwise(losses)) / 0.954
    return (lowest, last) if last - lowest > _SURE * scatter * math.sqrt(2 / _POINTS) else None


def _rounded(value: float) -> float:
    """One digit that a person would write."""
    return float(f"{value:.1g}")
