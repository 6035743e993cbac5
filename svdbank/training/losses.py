"""Losses of blocks before and after, through the Trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from svdbank.core.specs import Progress, ProgressCallback
from svdbank.lm.measuring import row_loss
from svdbank.lm.scores import standard_error
from svdbank.training.report import Change


def measure(trainer: Any, measured: Mapping[str, Any], tell: ProgressCallback, stage: str) -> dict[str, list[float]]:
    """Mean loss of each block, by text, through the Trainer's own evaluation, which knows about devices and processes."""
    losses = {}
    for i, (name, blocks) in enumerate(measured.items()):
        tell(Progress(stage, i, len(measured), "text", name))
        losses[name] = [float(value) for value in trainer.predict(blocks).predictions]
        tell(Progress(stage, i + 1, len(measured), "text", name))
    return losses


def row_losses(logits: Any, labels: Any) -> Any:
    """(rows,) mean loss a token, so that no logits are kept."""
    import torch

    logits = logits[0] if isinstance(logits, tuple) else logits
    return torch.stack(
        [row_loss(rows, tokens, len(tokens)) / (len(tokens) - 1) for rows, tokens in zip(logits, labels, strict=True)]
    )


def release(trainer: Any) -> None:
    """Let training prepare the model anew.

    For an evaluation, accelerate prepares a model without DistributedDataParallel and marks it prepared; training then takes it as it is,
    and each process would follow its own gradients. FSDP and DeepSpeed wrap it for both.
    """
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    trainer.accelerator.free_memory()
    trainer.model._is_accelerate_prepared = False


def change_of(name: str, length: int, before: Sequence[float], after: Sequence[float]) -> Change:
    differences = [b - a for a, b in zip(before, after, strict=True)]
    return Change(
        text=name,
        blocks=len(before),
        tokens=len(before) * (length - 1),
        before=fmean(before),
        before_error=standard_error(before),
        after=fmean(after),
        after_error=standard_error(after),
        change=fmean(differences),
        change_error=standard_error(differences),
    )
