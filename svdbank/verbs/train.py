"""``train``: continued pretraining of an adapter. A thin recipe: ``datasets`` reads, PEFT attaches, ``transformers.Trainer`` trains."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from svdbank.adapter.methods import RESIDUAL_METHODS
from svdbank.building.stopwatch import Stopwatch
from svdbank.core import disk
from svdbank.core.errors import BankNotFoundError, OptionError
from svdbank.core.folders import output_folder
from svdbank.core.specs import ProgressCallback, ignore_progress
from svdbank.lm.libraries import quiet_transformers
from svdbank.lm.loading import check_quantiser, chosen_dtype, open_model
from svdbank.lm.memory import out_of_memory
from svdbank.lm.texts import check_source
from svdbank.training import checkpoints
from svdbank.training.arguments import training_arguments
from svdbank.training.data import read_data
from svdbank.training.options import TrainOptions, read_config, resolve, settled
from svdbank.training.report import TrainReport
from svdbank.training.run import Run

if TYPE_CHECKING:
    from svdbank.bank.reading import Bank

_LOWER = (
    "lower --batch-size (and raise --accumulation as much), shorten --length, add --gradient-checkpointing, or load the base with "
    "--load-in 4bit"
)


def train(
    model: str | Path | None = None,
    *,
    config: str | Path | Mapping[str, Any] | None = None,
    build: bool = False,
    force: bool = False,
    pull: str | None = None,
    find: bool = True,
    progress: ProgressCallback | None = None,
    **options: Any,
) -> TrainReport:
    """Train an adapter on text and write it as a PEFT folder; ``options`` are those of :class:`TrainOptions`.

    ``config`` is a flat TOML file (or a mapping) of the same options; what is given here overrides it. With ``build``, a model without
    a bank gets one in the cache first; ``pull`` and ``find`` are as in :func:`svdbank.init`. With ``force``, an adapter in the output and
    an unfinished run of other options give way.

    A run that was interrupted or killed goes on from its last whole checkpoint when it is called again: on the CPU in float32 it ends
    with the same weights, to the bit, as one that was never disturbed. Under ``accelerate launch`` or ``torchrun`` each process calls
    this and the main one writes.

    Before any weight is loaded, raises :class:`OptionError` for options that cannot be meant, an output in use, too little text, blocks
    longer than the model takes, a rank too large; :class:`CheckpointError` for what cannot be read; :class:`BankNotFoundError`;
    ``LockedError`` where a run into this output is under way. Later, ``OutOfMemoryError`` with what to lower, ``TrainingError`` where the
    loss is no number any more and no better state was kept. A run that made the text held out no better writes no adapter unless ``keep``
    is ``last``, and its report says ``worse``.
    """
    given = {**options, **({} if model is None else {"model": model})}
    chosen = resolve(read_config(config) if isinstance(config, str | Path) else (config or {}), given)
    for source in (*chosen.data, *chosen.retain):
        check_source(source)
    watch = Stopwatch()
    with watch.spending("opening"):
        run = _prepare(chosen, build=build, force=force, pull=pull, find=find, tell=progress or ignore_progress)
        run.watch = watch
    with watch.spending("imports"):
        # torch and PEFT, which nothing above needs to refuse what cannot be meant.
        from svdbank.adapter.folder import check_output
        from svdbank.training.ending import TrainingError
        from svdbank.training.loop import train_adapter
        from svdbank.training.rehearsal import rehearse

    with quiet_transformers(), out_of_memory(_LOWER):
        with run.arguments.main_process_first(desc="reading the text"), watch.spending("text"):
            data = read_data(run)
        held: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if run.is_main:
            with watch.spending("rehearsal"):
                rehearse(run.options, run.model, run.bank)
            held = checkpoints.begun(run.folder, run.record(data.digest), force=force)
        with held:
            try:
                if run.is_main:
                    check_output(run.output, force=force)  # again: a run that was waited for may have written it meanwhile
                run.processes.wait_for_everyone()
                with checkpoints.disk_errors(run.folder):
                    return train_adapter(run, data)
            except Exception as error:
                # A run that made no checkpoint, or came to nothing, leaves nothing to go on from.
                if run.is_main and (isinstance(error, TrainingError) or checkpoints.last_whole(run.folder) is None):
                    disk.remove_tree(run.folder)
                raise


def _prepare(options: TrainOptions, *, build: bool, force: bool, pull: str | None, find: bool, tell: ProgressCallback) -> Run:
    """Everything that can be refused before a text is read."""
    from svdbank.adapter.fetching import located
    from svdbank.adapter.folder import check_output

    output = output_folder(options.output)
    check_output(output, force=force)
    check_quantiser(options.load_in)
    model = open_model(options.model)
    options = settled(options, length=model.length(options.length), dtype=chosen_dtype(options.dtype))
    arguments = training_arguments(options, checkpoints.folder_of(output))
    run = Run(options, output, force, model, None, arguments, tell)
    if options.on_top_of:
        with arguments.main_process_first(desc="fetching the adapters beneath"):
            pinned = tuple(located(place)[1] for place in options.on_top_of)  # org/name@commit: a resumed run has the same
        run.options = msgspec.structs.replace(options, on_top_of=pinned)
    if options.method != "lora":
        with arguments.main_process_first(desc="opening the bank"):
            run.bank = _bank(run.options, build=build, pull=pull, find=find, tell=tell)
    return run


def _bank(options: TrainOptions, *, build: bool, pull: str | None, find: bool, tell: ProgressCallback) -> Bank:
    """The bank named, or pulled, else the model's own, which ``build`` makes where there is none, or none of the rank and sides needed."""
    from svdbank.sharing.finding import opened
    from svdbank.verbs.pull import pulled

    if pull is not None:
        if options.bank is not None:
            raise OptionError(f"--bank {options.bank} and --pull {pull} name two banks", hint="leave one of them out")
        return pulled(options.model, pull, tell)
    try:
        found = opened(options.bank or options.model, find=find and not build)
        if options.bank is not None or not build or _serves(found, options):
            return found
    except BankNotFoundError as missing:
        if options.bank is not None:
            raise
        if not build:
            raise BankNotFoundError(
                str(missing), hint=f"{missing.hint}; or add --build to have it built into the cache first"
            ) from missing
    from svdbank.verbs.build import build as build_bank

    if options.on_top_of:  # bands beside those of adapters that nobody has looked at yet
        return build_bank(options.model, targets=options.targets, progress=tell)
    residual = options.method in RESIDUAL_METHODS
    return build_bank(
        options.model,
        rank=options.rank,
        targets=options.targets,
        side="both" if residual else "left",
        principal=options.rank if options.method == "pissa" else 0,
        progress=tell,
    )


def _serves(bank: Bank, options: TrainOptions) -> bool:
    """Whether a bank has the directions and sides that a new adapter needs, as far as its options tell."""
    own = bank.manifest.options
    enough = own.rank == "all" or own.rank >= options.rank
    if options.method == "pissa":
        enough = enough and own.principal >= options.rank
    return enough and (options.method not in RESIDUAL_METHODS or own.side == "both")
