"""``train``: continued pretraining of an adapter. A thin recipe: ``datasets`` reads, PEFT attaches, ``transformers.Trainer`` trains."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import msgspec
import numpy

from svdbank import cache
from svdbank.adapter.folder import check_output, new_folder
from svdbank.adapter.settings import TRAINING_CONFIG, TRAINING_FIGURES
from svdbank.bank.reading import Bank
from svdbank.core import disk
from svdbank.core.errors import BankNotFoundError, OptionError, SvdbankError, missing_extra
from svdbank.core.specs import Progress, ProgressCallback, ignore_progress, to_json
from svdbank.lm.blocks import collate, first, pack
from svdbank.lm.held_out import hold_out
from svdbank.lm.libraries import quiet_transformers
from svdbank.lm.loading import CausalModel, check_quantiser, chosen_dtype, load_model, open_model
from svdbank.lm.measuring import row_loss
from svdbank.lm.memory import out_of_memory
from svdbank.lm.texts import explained, read_documents
from svdbank.training import checkpoints
from svdbank.training.attaching import attach, initial_factors, rehearse, trainable_parameters, write_adapter
from svdbank.training.checkpoints import RunRecord
from svdbank.training.options import TrainOptions, read_config, resolve, to_toml
from svdbank.training.report import Change, TrainReport, card
from svdbank.training.watching import Clock, watcher

#: Peak learning rates where none is given (docs/training.md says where they come from).
RATES = {"mica": 2e-3, "milora": 3e-4, "pissa": 3e-4, "lora": 5e-4}

#: The name under which the text held out is measured.
HELD_OUT = "held out"

_LOWER = (
    "lower --batch-size (and raise --accumulation as much), shorten --length, add --gradient-checkpointing, or load the base with "
    "--load-in 4bit"
)


class TrainingError(SvdbankError):
    """A training that came to nothing."""


@dataclass(frozen=True)
class _Texts:
    """Blocks to train on and, by name, blocks to measure."""

    training: Any
    measured: dict[str, Any]
    digest: str


@dataclass
class _Run:
    """What the steps of a run share."""

    options: TrainOptions
    output: Path
    force: bool
    source: CausalModel
    bank: Bank | None
    arguments: Any
    tell: ProgressCallback
    clock: Clock = field(default_factory=Clock)

    @property
    def folder(self) -> Path:
        return checkpoints.folder_of(self.output)

    @property
    def length(self) -> int:
        assert self.options.length is not None
        return self.options.length

    @property
    def processes(self) -> Any:
        from accelerate import PartialState

        return PartialState()

    @property
    def is_main(self) -> bool:
        return bool(self.processes.is_main_process)

    def record(self, texts: _Texts) -> RunRecord:
        """What has to stay as it is for the run to go on: where the adapter goes and how often is saved may change."""
        kept = msgspec.structs.replace(self.options, output="", save_steps=None, save_minutes=None)
        return RunRecord(to_toml(kept).decode(), texts.digest, self.processes.num_processes)


def train(
    model: str | Path | None = None,
    *,
    config: str | Path | Mapping[str, Any] | None = None,
    build: bool = False,
    force: bool = False,
    progress: ProgressCallback | None = None,
    **options: Any,
) -> TrainReport:
    """Train an adapter on text and write it as a PEFT folder; ``options`` are those of :class:`TrainOptions`.

    ``config`` is a flat TOML file (or a mapping) of the same options; what is given here overrides it. With ``build``, a model without
    a bank gets one in the cache first. With ``force``, an adapter in the output and an unfinished run of other options give way.

    A run that was interrupted or killed goes on from its last whole checkpoint when it is called again: on the CPU in float32 it ends
    with the same weights, to the bit, as one that was never disturbed. Under ``accelerate launch`` or ``torchrun`` each process calls
    this and the main one writes.

    Before any weight is loaded, raises :class:`OptionError` for options that cannot be meant, an output in use, too little text, blocks
    longer than the model takes, a rank too large; :class:`CheckpointError` for what cannot be read; :class:`BankNotFoundError`. Later,
    ``OutOfMemoryError`` with what to lower.
    """
    given = {**options, **({} if model is None else {"model": model})}
    values = resolve(read_config(config) if isinstance(config, str | Path) else (config or {}), given)
    run = _prepare(values, build=build, force=force, tell=progress or ignore_progress)
    with quiet_transformers(), out_of_memory(_LOWER):
        with run.arguments.main_process_first(desc="reading the text"):
            texts = _texts(run)
        if run.is_main:
            rehearse(values, run.source, run.bank)
            checkpoints.begin(run.folder, run.record(texts), force=force)
        run.processes.wait_for_everyone()
        return _train(run, texts)


def _prepare(options: TrainOptions, *, build: bool, force: bool, tell: ProgressCallback) -> _Run:
    """Everything that can be refused before a text is read."""
    output = Path(options.output).expanduser().resolve()
    check_output(output, force=force)
    check_quantiser(options.load_in)
    source = open_model(options.model)
    options = msgspec.structs.replace(
        options,
        length=source.length(options.length),
        alpha=float(options.rank) if options.alpha is None else options.alpha,
        learning_rate=RATES[options.method] if options.learning_rate is None else options.learning_rate,
        dtype=chosen_dtype(options.dtype),
    )
    arguments = _arguments(options, checkpoints.folder_of(output))
    run = _Run(options, output, force, source, None, arguments, tell)
    if options.method != "lora":
        with arguments.main_process_first(desc="opening the bank"):
            run.bank = _bank(options, build=build, tell=tell)
    return run


def _bank(options: TrainOptions, *, build: bool, tell: ProgressCallback) -> Bank:
    try:
        return cache.open(options.bank or options.model)
    except BankNotFoundError as missing:
        if options.bank is not None:
            raise
        if not build:
            raise BankNotFoundError(
                str(missing), hint=f"svdbank build {options.model}, or add --build to have it built into the cache first"
            ) from missing
    from svdbank.verbs.build import build as build_bank

    return build_bank(options.model, progress=tell)


def _arguments(options: TrainOptions, folder: Path) -> Any:
    """Transformers' settings for the options. Raises :class:`OptionError` for a schedule it does not know."""
    import torch

    try:
        import accelerate  # noqa: F401 - the Trainer needs it
        import transformers
    except ImportError as cause:
        raise missing_extra("accelerate", "peft") from cause

    if options.schedule not in [kind.value for kind in transformers.SchedulerType]:
        raise OptionError(
            f"there is no schedule {options.schedule!r}", hint="--schedule cosine, linear or constant_with_warmup"
        )
    mixed = options.dtype if options.dtype != "float32" else None
    # Renamed in Transformers 5.
    fields = {entry.name for entry in dataclasses.fields(transformers.TrainingArguments)}
    recompute = "activation_checkpointing" if "activation_checkpointing" in fields else "gradient_checkpointing"
    return transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=options.steps or -1,
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulation,
        learning_rate=options.learning_rate,
        lr_scheduler_type=options.schedule,
        warmup_steps=options.warmup,
        weight_decay=options.weight_decay,
        max_grad_norm=options.clip,
        bf16=mixed == "bfloat16",
        fp16=mixed == "float16",
        use_cpu=not torch.cuda.is_available(),
        logging_steps=options.log_steps,
        logging_strategy="steps",
        logging_nan_inf_filter=False,
        save_strategy="steps",
        # Without a number of steps, the clock decides, and the Trainer saves at the end.
        save_steps=options.save_steps or 10**9,
        save_total_limit=2,
        seed=options.seed,
        data_seed=options.seed,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        **{recompute: options.gradient_checkpointing},
    )


def _texts(run: _Run) -> _Texts:
    """Blocks for training and measuring. Raises :class:`OptionError` where there is too little."""
    options = run.options
    length = run.length

    def blocks(documents: Any) -> Any:
        return pack(documents, run.source.tokenizer, length)

    def enough(found: Any, what: str) -> Any:
        if len(found) == 0:
            raise OptionError(
                f"{what}: too little text for one block of {length} tokens",
                hint="more text, a smaller --length, or another --held-out",
            )
        return found

    run.tell(Progress("reading the text", 0, 1, "text"))
    streaming = options.streaming
    with explained(options.data):
        documents = read_documents(options.data, field=options.field, split=options.split, streaming=streaming)
        training, held_out = hold_out(documents, share=options.held_out, seed=options.seed)
        training = blocks(training)
        if streaming:
            enough(first(training, 1), ", ".join(options.data))
            training = training.shuffle(seed=options.seed, buffer_size=1000)
        else:
            enough(training, ", ".join(options.data))
        measured = {}
        if held_out is not None:
            chosen = blocks(held_out)
            chosen = chosen if streaming else chosen.shuffle(seed=options.seed)
            measured[HELD_OUT] = enough(first(chosen, options.held_out_blocks), "the text held out")
    for source in options.retain:
        with explained([source]):
            kept = blocks(read_documents([source], field=options.field, split=options.split))
            measured[source] = enough(first(kept.shuffle(seed=options.seed), options.held_out_blocks), source)
    run.tell(Progress("reading the text", 1, 1, "text"))
    return _Texts(training, measured, _text_digest(training, measured))


def _text_digest(training: Any, measured: Mapping[str, Any]) -> str:
    """Hash over every token, of a stream over those measured: a run goes on only with the text it began with."""
    digest = hashlib.sha256()
    mapped = [training] if hasattr(training, "select") else []
    for blocks in (*mapped, *measured.values()):
        digest.update(len(blocks).to_bytes(8, "little"))
        for batch in blocks.with_format("numpy").iter(1000):
            digest.update(numpy.ascontiguousarray(batch["input_ids"], dtype=numpy.int32).tobytes())
    return digest.hexdigest()


def _train(run: _Run, texts: _Texts) -> TrainReport:
    """Attach, measure, train or go on, measure, write."""
    import transformers

    options, tell = run.options, run.tell
    tell(Progress("loading the model", 0, 1, "model", run.source.name))
    base = load_model(run.source, dtype=options.dtype, load_in=options.load_in)
    base.config.use_cache = False
    model = attach(base, options, run.bank)
    if options.gradient_checkpointing:
        model.enable_input_require_grads()
    tell(Progress("loading the model", 1, 1, "model", run.source.name))
    initial = initial_factors(model, options)
    trainer = transformers.Trainer(
        model=model,
        args=run.arguments,
        train_dataset=texts.training,
        data_collator=collate,
        preprocess_logits_for_metrics=_row_losses,
        callbacks=[watcher(tell, run.clock, options.save_minutes, model)],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    before = _before(run, trainer, texts)
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
    after = _measure(trainer, texts.measured, tell, "loss after")
    changes = {name: _change(name, run.length, before[name], after[name]) for name in texts.measured}
    report = _report(run, texts, trainer, changes, seconds, None if whole is None else checkpoints.step_of(whole))
    run.processes.wait_for_everyone()
    if run.is_main:
        _write(run, model, initial, report)
    run.processes.wait_for_everyone()
    return report


def _checkpoint(run: _Run) -> Path | None:
    """The checkpoint to go on from; what a killed run left unfinished is gone afterwards."""
    whole = checkpoints.last_whole(run.folder)
    run.processes.wait_for_everyone()
    if run.is_main:
        checkpoints.remove_others(run.folder, whole)
    run.processes.wait_for_everyone()
    return whole


def _before(run: _Run, trainer: Any, texts: _Texts) -> dict[str, list[float]]:
    """Losses of the untrained adapter by block, measured once: a run that goes on reads them."""
    path = run.folder / "before.json"
    if path.is_file():
        known: dict[str, list[float]] = msgspec.json.decode(path.read_bytes(), type=dict[str, list[float]])
        return known
    losses = _measure(trainer, texts.measured, run.tell, "loss before")
    _release(trainer)
    run.processes.wait_for_everyone()
    if run.is_main:
        disk.write_bytes(path, to_json(losses))
    return losses


def _release(trainer: Any) -> None:
    """Let training prepare the model anew.

    For an evaluation, accelerate prepares a model without DistributedDataParallel and marks it prepared; training then takes it as it is,
    and each process would follow its own gradients. FSDP and DeepSpeed wrap it for both.
    """
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    trainer.accelerator.free_memory()
    trainer.model._is_accelerate_prepared = False


def _measure(trainer: Any, measured: Mapping[str, Any], tell: ProgressCallback, stage: str) -> dict[str, list[float]]:
    """Mean loss of each block, by text, through the Trainer's own evaluation, which knows about devices and processes."""
    losses = {}
    for i, (name, blocks) in enumerate(measured.items()):
        tell(Progress(stage, i, len(measured), "text", name))
        losses[name] = [float(value) for value in trainer.predict(blocks).predictions]
        tell(Progress(stage, i + 1, len(measured), "text", name))
    return losses


def _row_losses(logits: Any, labels: Any) -> Any:
    """(rows,) mean loss a token, so that no logits are kept."""
    import torch

    logits = logits[0] if isinstance(logits, tuple) else logits
    return torch.stack(
        [row_loss(rows, tokens, len(tokens)) / (len(tokens) - 1) for rows, tokens in zip(logits, labels, strict=True)]
    )


def _change(name: str, length: int, before: Sequence[float], after: Sequence[float]) -> Change:
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


def standard_error(values: Sequence[float]) -> float:
    """Of the mean; NaN for fewer than two values."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def _report(
    run: _Run, texts: _Texts, trainer: Any, changes: dict[str, Change], seconds: float, resumed_from: int | None
) -> TrainReport:
    options = run.options
    steps = trainer.state.global_step
    timed = run.clock.steps[1:] or run.clock.steps
    held_out = changes.pop(HELD_OUT, None)
    return TrainReport(
        adapter=str(run.output),
        model=run.source.name,
        method=options.method,
        rank=options.rank,
        bank=None if run.bank is None else str(run.bank.path),
        trainable_parameters=trainable_parameters(trainer.model),
        blocks=len(texts.training) if hasattr(texts.training, "select") else 0,
        length=run.length,
        steps=steps,
        tokens=steps * options.accumulation * options.batch_size * run.processes.num_processes * run.length,
        processes=run.processes.num_processes,
        dtype=options.dtype,
        seconds=seconds,
        step_seconds=fmean(timed) if timed else 0.0,
        step_seconds_error=standard_error(timed),
        peak_bytes=_peak_bytes(),
        resumed_from=resumed_from,
        held_out=held_out,
        retained=tuple(changes.values()),
        curve=tuple((entry["step"], float(entry["loss"])) for entry in trainer.state.log_history if "loss" in entry),
    )


def _peak_bytes() -> int:
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: bytes


def _write(run: _Run, model: Any, initial: dict[str, Any], report: TrainReport) -> None:
    """The adapter's folder, whole or not at all; the checkpoints have done their work then."""
    with new_folder(run.output, force=run.force) as folder:
        write_adapter(model, folder, run.options, run.bank, initial, card(run.options, report))
        disk.write_bytes(folder / TRAINING_CONFIG, to_toml(run.options))
        disk.write_bytes(folder / TRAINING_FIGURES, to_json(report, indent=2))
        disk.fsync_tree(folder)
    disk.remove_tree(run.folder)
