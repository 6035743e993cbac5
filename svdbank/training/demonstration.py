"""The training of the demo: a plain loop on licence texts, fixed so that its figures repeat."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from svdbank.core.specs import Progress, ProgressCallback, Struct
from svdbank.lm.measuring import summed_losses
from svdbank.lm.scores import standard_error
from svdbank.lm.windows import Window, token_windows

if TYPE_CHECKING:
    from torch import Tensor, nn

#: One licence text in so many is held out for measuring.
_HELD_OUT = 10


class DemoSettings(Struct, frozen=True, kw_only=True):
    """What the demo trains, fixed so that its figures repeat. ``rate`` is AdamW's learning rate after a warm-up of a tenth."""

    bank_rank: int = 128
    rank: int = 16
    steps: int = 30
    batch: int = 2
    length: int = 128
    rate: float = 2e-3
    held_out_windows: int = 12
    seed: int = 0


def demo_windows(texts: Sequence[str], tokenizer: Any, settings: DemoSettings) -> tuple[Tensor, Tensor]:
    """Token windows (n, length) for training and for measuring, from different licences, drawn by the seed."""
    shuffled = list(texts)
    random.Random(settings.seed).shuffle(shuffled)
    held_out = [text for i, text in enumerate(shuffled) if i % _HELD_OUT == 0]
    training = [text for i, text in enumerate(shuffled) if i % _HELD_OUT]
    return (
        token_windows(training, tokenizer, count=settings.steps * settings.batch, length=settings.length),
        token_windows(held_out, tokenizer, count=settings.held_out_windows, length=settings.length),
    )


def mean_loss(model: nn.Module, held_out: Tensor, tell: ProgressCallback, stage: str) -> tuple[float, float]:
    """Mean loss a token over windows and its standard error."""
    model.eval()
    losses = []
    for i, tokens in enumerate(held_out.tolist()):
        losses.append(summed_losses(model, [Window(tokens, ends=True)])[0] / (len(tokens) - 1))
        tell(Progress(stage, i + 1, len(held_out), "window"))
    return fmean(losses), standard_error(losses)


def train_demo(model: nn.Module, windows: Tensor, settings: DemoSettings, tell: ProgressCallback) -> list[float]:
    """Plain AdamW on what requires a gradient, linear warm-up over a tenth of the steps and cosine decay; returns the losses."""
    import torch

    model.train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=settings.rate, weight_decay=0.01)

    def rate(step: int) -> float:
        warm = max(1, settings.steps // 10)
        return min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * step / settings.steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    losses = []
    for step, batch in enumerate(windows.split(settings.batch)):  # type: ignore[no-untyped-call]
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        tell(Progress("training", step + 1, settings.steps, "step", f"loss {losses[-1]:.3f}"))
    return losses
