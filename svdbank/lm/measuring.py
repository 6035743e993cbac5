"""Loss of a base and its adapters on windows of tokens."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from svdbank.core.errors import NotFiniteError
from svdbank.core.specs import Progress, ProgressCallback
from svdbank.lm.adapters import acting
from svdbank.lm.blocks import IGNORED
from svdbank.lm.dependence import note, with_and_without
from svdbank.lm.head import head_of, outgrows_memory
from svdbank.lm.scores import BASE, Score, TextTally
from svdbank.lm.windows import Window, batches, windows

if TYPE_CHECKING:
    from torch import Tensor


def measure(
    model: Any,
    tokenizer: Any,
    stacks: Mapping[str, Sequence[str]],
    text: str,
    documents: Iterator[str],
    length: int,
    limit: int | None,
    batch_size: int,
    tell: ProgressCallback,
) -> list[Score]:
    """Scores of the base and every adapter on one text."""
    tallies = {name: TextTally() for name in (BASE, *stacks)}
    seen = 0
    for batch in batches(windows(documents, tokenizer, length, limit), batch_size):
        sums = {}
        for name in tallies:
            with acting(model, stacks.get(name, ())):
                sums[name] = summed_losses(model, batch)
        if not all(math.isfinite(value) for values in sums.values() for value in values):
            name = next(name for name, values in sums.items() if not all(map(math.isfinite, values)))
            raise NotFiniteError(
                f"{text}: the loss of {'the base' if name == BASE else name} is NaN or infinite",
                hint="--dtype float32, or other weights",
            )
        for name, tally in tallies.items():
            for window, own, base in zip(batch, sums[name], sums[BASE], strict=True):
                tally.add(window, own, own - base)
        seen += sum(window.predicted for window in batch)
        tell(Progress(f"measuring on {text}", seen, limit or seen, "tokens"))
    return [tally.score(name, text) for name, tally in tallies.items()]


def needs_bos(model: Any, tokenizer: Any, text: str, documents: Iterator[str], length: int, batch_size: int) -> list[str]:
    """What to say where a text costs the base less after the BOS that its tokenizer has and does not add; two short batches."""
    compared = with_and_without(tokenizer, windows(documents, tokenizer, length))
    if compared is None:
        return []
    with acting(model, ()):
        sums = [
            [value for batch in batches(iter(side), batch_size) for value in summed_losses(model, batch)] for side in compared
        ]
    said = note(tokenizer, compared[0], *sums)
    return [] if said is None else [f"{text}: {said}"]


def summed_losses(model: Any, batch: Sequence[Window]) -> list[float]:
    """Summed loss of each window in nats, by the model with the adapters that act."""
    import torch

    inputs = padded(batch)
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    labels = inputs.pop("labels")
    head = head_of(model) if outgrows_memory(model, labels.numel(), training=False) else None
    with torch.inference_mode(), contextlib.nullcontext() if head is None else head.apart():
        found = model(**inputs, use_cache=False).logits
        found = found if head is None else head.row_losses(found, labels)
    losses = row_losses(found, labels) if head is None else found
    sums: list[float] = losses.tolist()  # at once: a GPU is waited for at every number that it is asked for
    return sums


def padded(batch: Sequence[Window]) -> dict[str, Tensor]:
    """Windows as ``input_ids``, ``attention_mask`` and ``labels`` (windows, longest) int64; −100 where nothing is predicted."""
    import torch

    longest = max(len(window.tokens) for window in batch)
    tokens = torch.zeros(len(batch), longest, dtype=torch.int64)
    mask, labels = tokens.clone(), torch.full_like(tokens, IGNORED)
    for row, window in enumerate(batch):
        count = len(window.tokens)
        tokens[row, :count] = torch.tensor(window.tokens)
        mask[row, :count] = 1
        labels[row, window.context : count] = tokens[row, window.context : count]
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def row_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """(rows,) summed loss in nats of predicting ``labels`` (rows, length), −100 for not, from ``logits`` (rows, length, vocabulary)."""
    import torch

    losses = [
        torch.nn.functional.cross_entropy(row[:-1].float(), wanted[1:], reduction="sum", ignore_index=IGNORED)
        for row, wanted in zip(logits, labels, strict=True)
    ]
    return torch.stack(losses)
