"""Up to which rate a step does no harm: the search of a range test."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import median

#: Nats a token that the loss lies higher at the rate looked for.
RISE = 0.2

#: Nats above the lowest loss on the way that are harm too: a text that costs a model nats more than it could falls by nats first.
FALL = 1.0

#: Where the search begins, between which rates it stays, and how many of them it tries at most.
BEGIN, LEAST, MOST, TRIES = 5e-3, 1e-8, 1e4, 20

#: The rate is known where two that were tried, below and above it, are no further apart than this factor, or the rise is as close.
WITHIN = 1.5

#: What stands for a loss that is no number, in nats.
NO_NUMBER = 1e6


def middle(after: Sequence[float], before: Sequence[float]) -> float:
    """The change of the middle one of the blocks, in nats a token; a loss that is no number counts as the largest."""
    changes = [now - then for now, then in zip(after, before, strict=True)]
    return median(change if math.isfinite(change) else NO_NUMBER for change in changes)


def find_limit(
    change: Callable[[float], float], *, begin: float = BEGIN, step: float = 4.0, within: float = WITHIN
) -> tuple[float | None, tuple[tuple[float, float], ...]]:
    """The rate at which ``change`` of the loss reaches :data:`RISE`, or :data:`FALL` above the lowest on the way, known ``within`` a
    factor; and what was tried, by rate.

    From ``begin`` it goes up or down by ``step`` until the limit lies between two. None where that is not between :data:`LEAST` and
    :data:`MOST`.
    """
    found: dict[float, float] = {}
    low = high = None
    rate = begin
    for _ in range(TRIES):
        found[rate] = change(rate)
        if RISE / within <= found[rate] <= RISE * within:
            return rate, _curve(found)
        if _harm(found, rate) < 0:
            low = rate
        else:
            high = rate
        if low is None or high is None:
            if rate in (LEAST, MOST):
                return None, _curve(found)
            rate = min(rate * step, MOST) if high is None else max(rate / step, LEAST)
            continue
        rate = _between(low, _harm(found, low), high, _harm(found, high))
        if high <= low * within:
            return rate, _curve(found)
    return rate, _curve(found)


def _harm(found: dict[float, float], rate: float) -> float:
    """By how much the change at a rate is more than it may be, in nats."""
    lowest = min((change for other, change in found.items() if other < rate), default=0.0)
    return max(found[rate] - RISE, found[rate] - lowest - FALL)


def _between(low: float, below: float, high: float, above: float) -> float:
    """Where a line over the logarithm of the rate is zero, kept off the ends; what is far off them pulls no further."""
    below, above = max(below, -2 * RISE), min(above, 3 * RISE)
    share = min(max(-below / (above - below), 0.2), 0.8)
    return float(low * (high / low) ** share)


def _curve(found: dict[float, float]) -> tuple[tuple[float, float], ...]:
    return tuple(sorted(found.items()))
