"""``demo``: the whole way on a real model and real text, without a network.

The model and the texts ship inside packages of PyPI, which are opened as data and never imported.
"""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from svdbank import cache
from svdbank.core.specs import Progress, ProgressCallback, Struct, ignore_progress
from svdbank.lm.libraries import quiet_transformers
from svdbank.lm.measuring import summed_losses
from svdbank.lm.packaged import libraries, licence_texts, smollm2_folder
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


class DemoReport(Struct, frozen=True):
    """Figures and places. Losses are nats a token on held-out text with the standard error over windows; times are seconds.

    ``build_seconds`` is of a build in this run; ``weights_reused`` tells how many weights an earlier demo had left in the bank.
    ``peft_seconds`` is PEFT's own ``"mica"`` initialisation, ``attach_seconds`` the bank's; ``svd_free_load_seconds`` loads the folder.
    """

    model: str
    bank: str
    fresh_adapter: str
    trained_adapter: str
    weights: int
    weights_reused: int
    bank_bytes: int
    trainable_parameters: int
    build_seconds: float
    peft_seconds: float
    attach_seconds: float
    svd_free_load_seconds: float
    training_seconds: float
    steps: int
    tokens: int
    loss_before: float
    loss_before_error: float
    loss_after: float
    loss_after_error: float
    losses: tuple[float, ...]

    @property
    def speedup(self) -> float:
        """How many times faster the lookup is than PEFT's initialisation."""
        return self.peft_seconds / self.attach_seconds


def demo(
    output: str | os.PathLike[str] | None = None,
    *,
    settings: DemoSettings | None = None,
    progress: ProgressCallback | None = None,
) -> DemoReport:
    """SmolLM2-135M → bank → MiCA adapter → PEFT → training on licence texts; returns every figure. Minutes on two cores.

    ``output`` holds the bank and the adapters, by default ``demo`` in svdbank's own folder; the adapters of an earlier run there are
    replaced. Deterministic up to rounding and time. Raises :class:`MissingExtraError` with the pip command where a package is missing.
    """
    chosen = settings or DemoSettings()
    tell = progress or ignore_progress
    peft, transformers, torch = libraries()
    from svdbank.peft import get_peft_model, load_adapter
    from svdbank.verbs.build import BuildReport, build
    from svdbank.verbs.init import init

    root = cache.given_output(output) or cache.home() / "demo"
    texts = licence_texts()
    folder = smollm2_folder(progress=progress)
    reports: list[BuildReport] = []
    begun = time.perf_counter()
    bank = build(folder, root / "bank", rank=chosen.bank_rank, progress=progress, on_report=reports.append)
    built = time.perf_counter() - begun
    fresh, trained = root / "adapter-fresh", root / "adapter-trained"
    init(bank, rank=chosen.rank, output=fresh, base_model=str(folder), task_type="CAUSAL_LM", force=True)

    with quiet_transformers():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    config = peft.LoraConfig(r=chosen.rank, lora_alpha=chosen.rank, init_lora_weights="mica", target_modules="all-linear")

    tell(Progress("PEFT's own initialisation, for comparison", 0, 1, "run"))
    begun = time.perf_counter()
    wrapped = peft.get_peft_model(model, config)
    peft_seconds = time.perf_counter() - begun
    model = wrapped.unload()
    tell(Progress("PEFT's own initialisation, for comparison", 1, 1, "run"))
    begun = time.perf_counter()
    wrapped = get_peft_model(model, config, bank=bank)
    attach_seconds = time.perf_counter() - begun
    model = wrapped.unload()
    begun = time.perf_counter()
    tuned = load_adapter(model, fresh, bank=bank)
    load_seconds = time.perf_counter() - begun

    training, held_out = _windows(texts, tokenizer, chosen)
    before = _evaluate(tuned, held_out, tell, "held-out loss before")
    begun = time.perf_counter()
    losses = _train(tuned, training, chosen, tell)
    training_seconds = time.perf_counter() - begun
    after = _evaluate(tuned, held_out, tell, "held-out loss after")
    tuned.save_pretrained(str(trained))
    return DemoReport(
        model=str(folder),
        bank=bank.place,
        fresh_adapter=str(fresh),
        trained_adapter=str(trained),
        weights=len(bank),
        weights_reused=reports[0].reused,
        bank_bytes=bank.manifest.nbytes,
        trainable_parameters=sum(p.numel() for p in tuned.parameters() if p.requires_grad),
        build_seconds=built,
        peft_seconds=peft_seconds,
        attach_seconds=attach_seconds,
        svd_free_load_seconds=load_seconds,
        training_seconds=training_seconds,
        steps=chosen.steps,
        tokens=chosen.steps * chosen.batch * chosen.length,
        loss_before=before[0],
        loss_before_error=before[1],
        loss_after=after[0],
        loss_after_error=after[1],
        losses=tuple(losses),
    )


def _windows(texts: Sequence[str], tokenizer: Any, settings: DemoSettings) -> tuple[Tensor, Tensor]:
    """Token windows (n, length) for training and for measuring, from different licences, drawn by the seed."""
    shuffled = list(texts)
    random.Random(settings.seed).shuffle(shuffled)
    held_out = [text for i, text in enumerate(shuffled) if i % _HELD_OUT == 0]
    training = [text for i, text in enumerate(shuffled) if i % _HELD_OUT]
    return (
        token_windows(training, tokenizer, count=settings.steps * settings.batch, length=settings.length),
        token_windows(held_out, tokenizer, count=settings.held_out_windows, length=settings.length),
    )


def _evaluate(model: nn.Module, held_out: Tensor, tell: ProgressCallback, stage: str) -> tuple[float, float]:
    """Mean loss a token over windows and its standard error."""
    model.eval()
    losses = []
    for i, tokens in enumerate(held_out.tolist()):
        losses.append(summed_losses(model, [Window(tokens, ends=True)])[0] / (len(tokens) - 1))
        tell(Progress(stage, i + 1, len(held_out), "window"))
    return fmean(losses), standard_error(losses)


def _train(model: nn.Module, windows: Tensor, settings: DemoSettings, tell: ProgressCallback) -> list[float]:
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
