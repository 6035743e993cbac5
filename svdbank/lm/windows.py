"""Windows of tokens to measure on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from svdbank.core.errors import OptionError
from svdbank.lm.blocks import document_marks

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Window:
    """Tokens to run, of which all but the first are predicted; ``ends`` the document."""

    tokens: list[int]
    ends: bool

    @property
    def predicted(self) -> int:
        return len(self.tokens) - 1


def windows(documents: Iterator[str], tokenizer: Any, length: int, limit: int | None) -> Iterator[Window]:
    """Windows of documents in order, in which every token of a document but its first is predicted once.

    Documents of a single token are left out, as nothing in them is predicted.
    """
    prefix, _ = document_marks(tokenizer)
    left = math.inf if limit is None else limit
    for text in documents:
        ids = [*prefix, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
        starts = range(0, len(ids) - 1, length - 1)
        for start in starts:
            if left <= 0:
                return
            tokens = ids[start : start + length][: int(min(left, length)) + 1]
            yield Window(tokens, ends=start == starts[-1])
            left -= len(tokens) - 1


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
