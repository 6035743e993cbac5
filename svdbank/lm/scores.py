"""Scores of adapters on texts: a mean loss a token and its standard error, from sums alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import stdev
from typing import Literal

from svdbank.core.specs import Struct
from svdbank.lm.windows import Window

#: The base's name in tables.
BASE = "base"


class Score(Struct, frozen=True):
    """One cell of the table: an adapter on a text.

    ``loss`` is nats a token, ``perplexity`` its exponential. ``error`` is the standard error of ``loss``, with ``over`` (documents, or
    windows where there is one document) as the independent draws: tokens of one document depend on each other. ``change`` is loss
    minus the base's, ``change_error`` its standard error over the same draws, in pairs.
    """

    adapter: str
    text: str
    loss: float
    error: float
    perplexity: float
    change: float
    change_error: float
    tokens: int
    draws: int
    over: Literal["documents", "windows"]


@dataclass
class Moments:
    """What a mean a token and its standard error need, of sums ``s`` over ``n`` tokens a draw; nothing a draw is kept."""

    draws: int = 0
    tokens: int = 0
    s: float = 0.0
    ss: float = 0.0
    sn: float = 0.0
    nn: float = 0.0

    def add(self, total: float, tokens: int) -> None:
        self.draws += 1
        self.tokens += tokens
        self.s += total
        self.ss += total * total
        self.sn += total * tokens
        self.nn += tokens * tokens

    def mean(self) -> float:
        """Σs / Σn."""
        return self.s / self.tokens

    def error(self) -> float:
        """Standard error of the ratio Σs / Σn with draws as clusters (Cochran, Sampling Techniques, 6.4); NaN for a single draw."""
        if self.draws < 2:
            return math.nan
        mean = self.mean()
        squares = max(0.0, self.ss - 2 * mean * self.sn + mean * mean * self.nn)
        return math.sqrt(squares * self.draws / (self.draws - 1)) / self.tokens


@dataclass
class TextTally:
    """Sums of one adapter on one text, by window and by document."""

    windows: tuple[Moments, Moments] = field(default_factory=lambda: (Moments(), Moments()))
    documents: tuple[Moments, Moments] = field(default_factory=lambda: (Moments(), Moments()))
    open: tuple[float, float, int] = (0.0, 0.0, 0)

    def add(self, window: Window, loss: float, change: float) -> None:
        for moments, value in zip(self.windows, (loss, change), strict=True):
            moments.add(value, window.predicted)
        self.open = (self.open[0] + loss, self.open[1] + change, self.open[2] + window.predicted)
        if window.ends:
            self._close()

    def _close(self) -> None:
        for moments, value in zip(self.documents, self.open[:2], strict=True):
            moments.add(value, self.open[2])
        self.open = (0.0, 0.0, 0)

    def score(self, adapter: str, text: str) -> Score:
        if self.open[2]:
            self._close()
        by_document = self.documents[0].draws > 1
        loss, change = self.documents if by_document else self.windows
        return Score(
            adapter=adapter,
            text=text,
            loss=loss.mean(),
            error=loss.error(),
            perplexity=math.exp(min(loss.mean(), 700.0)),
            change=change.mean(),
            change_error=change.error(),
            tokens=loss.tokens,
            draws=loss.draws,
            over="documents" if by_document else "windows",
        )


def standard_error(values: Sequence[float]) -> float:
    """Of the mean; NaN for fewer than two values."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
