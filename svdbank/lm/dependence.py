"""Whether a text costs a model less after the BOS that its tokenizer has and does not put before a text."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

from svdbank.lm.marks import missing_bos
from svdbank.lm.scores import standard_error
from svdbank.lm.windows import Window

#: Windows that are compared, and tokens of each: two batches, whatever the text.
WINDOWS, TOKENS = 8, 128

#: Nats a token below which BOS is not missed.
LEAST = 0.05


def with_and_without(tokenizer: Any, windows: Iterable[Window]) -> tuple[list[Window], list[Window]] | None:
    """The heads of the first windows as they are, and the same after BOS; None, before any is made, where the tokenizer adds what it has,
    or has none."""
    bos = missing_bos(tokenizer)
    if bos is None:
        return None
    heads = [Window(window.tokens[:TOKENS], True, window.context) for window in itertools.islice(windows, WINDOWS)]
    heads = [head for head in heads if head.predicted > 0]
    return heads, [Window([bos, *head.tokens], True, head.context + 1) for head in heads]


def note(tokenizer: Any, heads: Sequence[Window], without: Sequence[float], after: Sequence[float]) -> str | None:
    """What to say of summed losses ``without`` BOS and ``after`` it; None where the difference is within its error, or small."""
    gains = [(one - other) / head.predicted for head, one, other in zip(heads, without, after, strict=True)]
    gain, error = fmean(gains), standard_error(gains)
    if not (math.isfinite(error) and gain > max(LEAST, 3 * error)):
        return None
    return (
        f"the text costs {gain:.2f} ± {error:.2f} nats a token less after the tokenizer's BOS ({tokenizer.bos_token}), which it does not "
        "put before a text: this model seems to need it. In Python: tokenizer.add_bos_token = True; tokenizer.save_pretrained(FOLDER)"
    )
