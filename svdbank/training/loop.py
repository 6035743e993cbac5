"""One run: attach, measure, train or go on, measure."""

from __future__ import annotations

import math
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import msgspec

from svdbank.core import disk
from svdbank.core.errors import SvdbankError
from svdbank.core.specs import Progress, to_json
from svdbank.lm.libraries import import_transformers
from svdbank.lm.loading import load_model
from svdbank.lm.scores import standard_error
from svdbank.training import checkpoints
from svdbank.training.attaching import attach, left_out, trainable_parameters
from svdbank.training.data import HELD_OUT, TrainingData
from svdbank.training.losses import change_of, collator, measure, release, summed
from svdbank.training.report import Change, TrainReport
from svdbank.training.run import Run
from svdbank.training.watching import peak_bytes, watcher
from svdbank.training.writing import initial_factors, write_output


class TrainingError(SvdbankError):
    """A training that came to nothing."""


def train_adapter(run: Run, data: TrainingData) -> TrainReport:
    """Attach, measure, train or go on, measure, write."""
    transformers = import_transformers()
    options, tell = run.options, run.tell
    tell(Progress("loading the model", 0, 1, "model", run.model.name))
    base = load_model(run.model, dtype=options.dtype, load_in=options.load_in)
    base.config.use_cache = False
    model = attach(base, options, run.bank)
    if options.gradient_checkpointing:
        model.enable_input_require_grads()
    tell(Progress("loading the model", 1, 1, "model", run.model.name))
    initial = initial_factors(model, options)
    trainer = transformers.Trainer(
        model=model,
        args=run.arguments,
        train_dataset=data.training,
        data_collator=collator(run.model.tokenizer),
        preprocess_logits_for_metrics=summed,
        callbacks=[watcher(tell, run.clock, options.save_minutes, model)],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    before = _before(run, trainer, data)
    whole = _checkpoint(run)
    # Measuring draws from the generators, and a run that goes on does not measure again.
    transformers.set_seed(options.seed)
    begun = time.perf_counter()
    outcome = trainer.train(resume_from_checkpoint=None if whole is None else str(whole))
    seconds = time.perf_counter() - begun
    if not math.isfinite(outcome.training_loss):
        raise TrainingError(
            "the loss is not a number any more", hint="a lower --learning-rate, or --dtype bfloat16 instead of float16"
        )
    after = measure(trainer, data.measured, tell, "loss after")
    changes = {name: change_of(name, data.measured[name], before[name], after[name]) for name in data.measured}
    report = _report(run, data, trainer, changes, seconds, None if whole is None else checkpoints.step_of(whole))
    run.processes.wait_for_everyone()
    if run.is_main:
        write_output(run, model, initial, report)
    run.processes.wait_for_everyone()
    return report


def _checkpoint(run: Run) -> Path | None:
    """The checkpoint to go on from; what a killed run left unfinished is gone afterwards."""
    whole = checkpoints.last_whole(run.folder)
    run.processes.wait_for_everyone()
    if run.is_main:
        checkpoints.remove_others(run.folder, whole)
    run.processes.wait_for_everyone()
    return whole


def _before(run: Run, trainer: Any, data: TrainingData) -> dict[str, list[float]]:
    """Losses of the untrained adapter by block, measured once: a run that goes on reads them."""
    path = run.folder / "before.json"
    if path.is_file():
        known: dict[str, list[float]] = msgspec.json.decode(path.read_bytes(), type=dict[str, list[float]])
        return known
    losses = measure(trainer, data.measured, run.tell, "loss before")
    release(trainer)
    run.processes.wait_for_everyone()
    if run.is_main:
        disk.write_bytes(path, to_json(losses))
    return losses


def _report(
    run: Run, data: TrainingData, trainer: Any, changes: dict[str, Change], seconds: float, resumed_from: int | None
) -> TrainReport:
    options = run.options
    steps = trainer.state.global_step
    timed = run.clock.steps[1:] or run.clock.steps
    held_out = changes.pop(HELD_OUT, None)
    return TrainReport(
        adapter=str(run.output),
        model=run.model.name,
        method=options.method,
        rank=options.rank,
        bank=None if run.bank is None else str(run.bank.path),
        trainable_parameters=trainable_parameters(trainer.model),
        blocks=len(data.training) if hasattr(data.training, "select") else 0,
        length=run.length,
        steps=steps,
        tokens=steps * options.accumulation * options.batch_size * run.processes.num_processes * run.length,
        processes=run.processes.num_processes,
        dtype=options.dtype,
        seconds=seconds,
        step_seconds=fmean(timed) if timed else 0.0,
        step_seconds_error=standard_error(timed),
        peak_bytes=peak_bytes(),
        resumed_from=resumed_from,
        held_out=held_out,
        retained=tuple(changes.values()),
        curve=tuple((entry["step"], float(entry["loss"])) for entry in trainer.state.log_history if "loss" in entry),
        left_out=left_out(options, run.bank, run.model.config.model_type),
    )
