"""Losses of windows before and after, through the Trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from svdbank.core.specs import Progress, ProgressCallback, ignore_progress
from svdbank.lm.blocks import Collator
from svdbank.lm.dependence import note, with_and_without
from svdbank.lm.head import head_of, outgrows_memory
from svdbank.lm.marks import marks_of
from svdbank.lm.measuring import padded, row_losses
from svdbank.lm.scores import TextTally
from svdbank.lm.windows import Window
from svdbank.training.report import Change


def measure(
    trainer: Any, measured: Mapping[str, Sequence[Window]], tell: ProgressCallback, stage: str
) -> dict[str, list[float]]:
    """Summed loss of each window in nats, by text, through the Trainer's own evaluation, which knows about devices and processes."""
    losses = {}
    for i, (name, windows) in enumerate(measured.items()):
        tell(Progress(stage, i, len(measured), "text", name))
        by_size = sorted(range(len(windows)), key=lambda place: len(windows[place].tokens))  # least padding
        trainer.sums_alone = True
        try:
            found = trainer.predict([{"window": windows[place]} for place in by_size]).predictions
        finally:
            trainer.sums_alone = False
        sums = dict(zip(by_size, map(float, found), strict=True))
        losses[name] = [sums[place] for place in range(len(windows))]
        tell(Progress(stage, i + 1, len(measured), "text", name))
    return losses


def collator(tokenizer: Any, *, packing: bool = False) -> Callable[[Sequence[Any]], dict[str, Any]]:
    """Batches for the Trainer, of blocks to train on and of windows to measure."""
    blocks = Collator(len(marks_of(tokenizer).before), packing)

    def collate(rows: Sequence[Any]) -> dict[str, Any]:
        return padded([row["window"] for row in rows]) if "window" in rows[0] else blocks(rows)

    return collate


def needs_bos(trainer: Any, tokenizer: Any, windows: Sequence[Window]) -> str | None:
    """What to say where these windows cost less after the BOS that the tokenizer has and does not add; two short batches."""
    compared = with_and_without(tokenizer, windows)
    if compared is None:
        return None
    sums = measure(trainer, {"without": compared[0], "after": compared[1]}, ignore_progress, "")
    return note(tokenizer, compared[0], sums["without"], sums["after"])


def summed(logits: Any, labels: Any) -> Any:
    """(rows,) summed loss, so that no logits are kept."""
    return row_losses(logits[0] if isinstance(logits, tuple) else logits, labels)


def spare_memory(trainer: Any, tokens: int) -> None:
    """Where whole logits of ``tokens`` tokens are too much for the memory that is free, let the trainer compute its loss by pieces.

    The model then gives, to the trainer alone, what goes into its head. Nothing is done where weights lie in pieces (FSDP, DeepSpeed), or
    where the model's logits are not simply its head's.
    """
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or not outgrows_memory(trainer.model, tokens, training=True):
        return
    head = head_of(trainer.model)
    if head is None:
        return

    def loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        if getattr(trainer, "sums_alone", False):  # while measuring, the sums of rows are what counts
            return outputs.logits.new_zeros(())
        return head.loss(outputs.logits, labels, num_items_in_batch)

    def sums(hidden: Any, labels: Any) -> Any:
        return head.row_losses(hidden[0] if isinstance(hidden, tuple) else hidden, labels)

    head.take_apart()
    trainer.compute_loss_func, trainer.preprocess_logits_for_metrics = loss, sums


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


def change_of(name: str, windows: Sequence[Window], before: Sequence[float], after: Sequence[float]) -> Change:
    """Losses a token from summed losses of windows, with documents as the independent draws, as in ``eval``."""
    first, second = TextTally(), TextTally()
    last = {window.document: place for place, window in enumerate(windows)}
    for place, (window, one, other) in enumerate(zip(windows, before, after, strict=True)):
        closing = replace(window, ends=last[window.document] == place)
        first.add(closing, one, 0.0)
        second.add(closing, other, other - one)
    start, end = first.score("", name), second.score("", name)
    return Change(
        text=name,
        blocks=len(windows),
        tokens=start.tokens,
        before=start.loss,
        before_error=start.error,
        after=end.loss,
        after_error=end.error,
        change=end.change,
        change_error=end.change_error,
    )
