"""One run: attach, find a rate, measure, train or go on, measure, write the state to be kept."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import fmean
from typing import Any

import msgspec

from svdbank.core import disk
from svdbank.core.errors import SvdbankError
from svdbank.core.specs import Progress, from_json, to_json
from svdbank.lm.libraries import import_transformers
from svdbank.lm.loading import load_model
from svdbank.lm.packing import check_packing
from svdbank.lm.scores import standard_error
from svdbank.training import checkpoints
from svdbank.training.attaching import attach, left_out, trainable_parameters
from svdbank.training.best import Held, measured_every
from svdbank.training.calibration import calibrate
from svdbank.training.data import HELD_OUT, TrainingData
from svdbank.training.ending import Ending, end
from svdbank.training.losses import collator, measure, needs_bos, release, spare_memory, summed
from svdbank.training.noticing import Noticing
from svdbank.training.options import RATES
from svdbank.training.report import Calibration, TrainReport
from svdbank.training.run import Run
from svdbank.training.watching import peak_bytes, watcher
from svdbank.training.writing import initial_factors, write_output

#: Rates found, kept for a run that goes on.
RATE = "rate.json"


def train_adapter(run: Run, data: TrainingData) -> TrainReport:
    """Attach, find a rate, measure, train or go on, measure, write."""
    transformers = import_transformers()
    options, tell = run.options, run.tell
    tell(Progress("loading the model", 0, 1, "model", run.model.name))
    with run.watch.spending("loading"):
        base = load_model(run.model, dtype=options.dtype, load_in=options.load_in)
    base.config.use_cache = False
    if run.steps(data.blocks) == 1:
        run.arguments.warmup_steps = 0  # whose first step has a rate of 0
    if options.packing:
        check_packing(base, options.model)
    with run.watch.spending("attaching"):
        model = attach(base, options, run.bank)
    if options.gradient_checkpointing:
        model.enable_input_require_grads()
    tell(Progress("loading the model", 1, 1, "model", run.model.name))
    with run.watch.spending("preparing"):
        initial = initial_factors(model, options)
        trainer = transformers.Trainer(
            model=model,
            args=run.arguments,
            train_dataset=data.training,
            data_collator=collator(run.model.tokenizer, packing=options.packing),
            preprocess_logits_for_metrics=summed,
        )
        trainer.remove_callback(transformers.PrinterCallback)
        spare_memory(trainer, options.batch_size * run.length)
    noticing = Noticing(lambda text: tell(Progress("note", 1, 1, "note", text)), clip=options.clip)
    with run.watch.spending("measuring before"):
        before = _before(run, trainer, data, noticing)
    with run.watch.spending("calibration"):
        calibration = None if options.learning_rate else _calibration(run, trainer, data)
    if calibration is not None:
        run.arguments.learning_rate = calibration.rate
    whole = _checkpoint(run)
    resumed_from = None if whole is None else checkpoints.step_of(whole)
    held = _held(run, data, before, resumed_from)
    trainer.add_callback(watcher(run, trainer, held, noticing, _every(run, trainer, data, held)))
    # Measuring draws from the generators, and a run that goes on does not measure again.
    transformers.set_seed(options.seed)
    begun = time.perf_counter()
    with run.watch.spending("training"):
        trainer.train(resume_from_checkpoint=None if whole is None else str(whole))
    seconds = time.perf_counter() - begun
    noticing.ended()
    with run.watch.spending("measuring after"):
        ending = end(run, trainer, data, before, held)
    report = _report(run, data, trainer, ending, calibration, noticing, seconds, resumed_from)
    run.processes.wait_for_everyone()
    if run.is_main:
        if ending.kept == "nothing":
            disk.remove_tree(run.folder)
        else:
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


def _before(run: Run, trainer: Any, data: TrainingData, noticing: Noticing) -> dict[str, list[float]]:
    """Losses of the untrained adapter by window, measured once: a run that goes on reads them."""
    path = run.folder / "before.json"
    if path.is_file():
        known: dict[str, list[float]] = msgspec.json.decode(path.read_bytes(), type=dict[str, list[float]])
        return known
    begun = time.perf_counter()
    losses = measure(trainer, data.measured, run.tell, "loss before")
    for windows in data.measured.values():
        if text := needs_bos(trainer, run.model.tokenizer, windows):
            noticing.depends(text)
    release(trainer)
    run.clock.measuring += time.perf_counter() - begun
    run.processes.wait_for_everyone()
    if run.is_main:
        disk.write_bytes(path, to_json(losses))
    return losses


def _calibration(run: Run, trainer: Any, data: TrainingData) -> Calibration | None:
    """How the rate was found, once: a run that goes on reads it. None where factors lie in pieces: the method's usual rate has to do."""
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        usual = RATES[run.options.method]
        run.tell(
            Progress(
                "note", 1, 1, "note", f"no rate is looked for under FSDP and DeepSpeed: {usual:g}, or give --learning-rate"
            )
        )
        return None
    path = run.folder / RATE
    if path.is_file():
        return from_json(path.read_bytes(), Calibration, where=str(path), error=SvdbankError)
    found = calibrate(run, trainer, data.training)
    run.processes.wait_for_everyone()
    if run.is_main:
        disk.write_bytes(path, to_json(found))
    return found


def _held(run: Run, data: TrainingData, before: dict[str, list[float]], resumed_from: int | None) -> Held | None:
    """What is measured while training; None where nothing is held out."""
    if HELD_OUT not in data.measured:
        return None
    held = Held(run.folder, data.measured[HELD_OUT], before[HELD_OUT])
    held.resume(resumed_from or 0)
    return held


def _every(run: Run, trainer: Any, data: TrainingData, held: Held | None) -> int:
    """Steps from one measurement to the next; 0 for none."""
    if held is None or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return 0
    blocks = -(-sum(len(window.tokens) for window in held.windows) // run.length)
    return measured_every(run.steps(data.blocks), run.a_step, blocks, patience=run.options.patience)


def _report(
    run: Run,
    data: TrainingData,
    trainer: Any,
    ending: Ending,
    calibration: Calibration | None,
    noticing: Noticing,
    seconds: float,
    resumed_from: int | None,
) -> TrainReport:
    options = run.options
    steps = trainer.state.global_step
    timed = run.clock.steps[1:] or run.clock.steps
    training = max(sum(run.clock.steps), 1e-9)
    changes = dict(ending.changes)
    held_out = changes.pop(HELD_OUT, None)
    return TrainReport(
        adapter=str(run.output),
        model=run.model.name,
        method=options.method,
        rank=options.rank,
        bank=None if run.bank is None else run.bank.place,
        trainable_parameters=trainable_parameters(trainer.model),
        blocks=data.blocks,
        length=run.length,
        steps=steps,
        tokens=run.blocks_seen(steps, data.blocks) * run.length,
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
        learning_rate=run.arguments.learning_rate,
        calibration=calibration,
        kept=ending.kept,
        kept_step=ending.step,
        worse=ending.kept == "nothing" or (held_out is not None and held_out.change > 2 * held_out.change_error),
        measured=ending.measured,
        measuring_share=run.clock.measuring / training,
        calibration_share=calibration.seconds / training if calibration is not None else 0.0,
        notices=tuple(noticing.said),
        left_out=left_out(options, run.bank, run.model.config.model_type),
        stages=run.watch.seconds(),
    )
