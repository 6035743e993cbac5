"""Windows of tokens to measure on."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from svdbank.core.errors import OptionError
from svdbank.lm.marks import marks_of

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Window:
    """Tokens to run, of which all but the first ``context`` are predicted; ``ends`` the document, which is the ``document``-th."""

    tokens: list[int]
    ends: bool
    context: int = 1
    document: int = 0

    @property
    def predicted(self) -> int:
        return len(self.tokens) - self.context


def windows(documents: Iterable[str], tokenizer: Any, length: int, limit: int | None = None) -> Iterator[Window]:
    """Windows of at most ``length`` tokens of the documents in order, in which every token of a document is predicted once.

    A window begins with what the tokenizer puts before a text (BOS). Where that is nothing, a document's first token is not predicted.
    A later window of a long document repeats the last token of the one before, as context. A document in which nothing is predicted is
    left out. ``limit`` bounds the predicted tokens.
    """
    before = list(marks_of(tokenizer).before)
    left = math.inf if limit is None else limit
    for document, text in enumerate(documents):
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        start = 0 if before else 1  # the next token to be predicted
        while start < len(ids) and left > 0:
            seen = [*before, *ids[max(0, start - 1) : start]]
            tokens = [*seen, *ids[start : start + int(min(left, length - len(seen)))]]
            start += len(tokens) - len(seen)
            left -= len(tokens) - len(seen)
            yield Window(tokens, start >= len(ids), len(seen), document)
        if left <= 0:
            return


def sample(documents: Any, tokenizer: Any, length: int, *, blocks: int, seed: int) -> list[Window]:
    """Windows of all documents; where these hold more tokens than ``blocks`` blocks of ``length``, as many as that, drawn by ``seed``.

    Drawn from the first four times as many of the documents in a drawn order: of a text of any size, no more is tokenised.
    """
    shuffled = documents.shuffle(seed=seed) if hasattr(documents, "select") else documents
    texts = (row["text"] for row in shuffled if row["text"] and not row["text"].isspace())
    pool = list(windows(texts, tokenizer, length, 4 * blocks * length))
    if sum(window.predicted for window in pool) > blocks * length:
        random.Random(seed).shuffle(pool)
        total = itertools.accumulate(window.predicted for window in pool)
        pool = [window for window, until in zip(pool, total, strict=True) if until <= blocks * length] or pool[:1]
    return sorted(pool, key=lambda window: window.document)


def batches(found: Iterator[Window], size: int) -> Iterator[list[Window]]:
    batch: list[Window] = []
    for window in found:
        batch.append(window)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def token_windows(texts: Sequence[str], tokenizer: Any, *, count: int, length: int) -> Tensor:
    """The first ``length`` tokens of each text that has as many, ``count`` texts in order: (count, length) int64."""
    import torch

    rows: list[list[int]] = []
    for text in texts:
        tokens = tokenizer(text[: 12 * length], add_special_tokens=False)["input_ids"][:length]
        if len(tokens) == length:
            rows.append(tokens)
        if len(rows) == count:
            return torch.tensor(rows)
    raise OptionError(f"only {len(rows)} of {count} texts have {length} tokens", hint="fewer steps or shorter windows")
