"""``build``: make, resume or extend a bank, or refuse before any work."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from svdbank.bank.files import Folder
from svdbank.bank.index import read_manifest
from svdbank.bank.layout import MANIFEST, plan_name
from svdbank.bank.reading import Bank, open_bank
from svdbank.bank.writing import clean
from svdbank.building.checking import examine, rebuild_command
from svdbank.building.devices import working_device
from svdbank.building.execution import Execution
from svdbank.building.fetching import Fetch, FetchReport, checked_fetch, gigabytes
from svdbank.building.planning import bank_bytes, checked_jobs, checked_options, make_plan, read_plan, refuse_other_options
from svdbank.cache import default_output, output_folder, refuse_foreign_folder
from svdbank.checkpoint import Checkpoint, decomposable, open_checkpoint
from svdbank.core import disk
from svdbank.core.errors import DamageError, OptionError, SvdbankError, WrongBaseError
from svdbank.core.specs import (
    Plan,
    ProgressCallback,
    Side,
    StoredDtype,
    Struct,
    WeightSpec,
    ignore_progress,
    quantised_formats,
)


class BuildReport(Struct, frozen=True):
    """What a build did. ``solved`` weights were decomposed now, ``reused`` were there already.

    ``quantised`` counts the weights stored as codes and scales, by format: the bank describes their dequantised values. ``stages`` are
    seconds by what they were spent on, summed over threads that work beside each other: they come to more than ``seconds``.
    """

    bank: str
    weights: int
    solved: int
    reused: int
    nbytes: int
    seconds: float
    largest_residual: float
    fallbacks: tuple[str, ...]
    quantised: dict[str, int]
    fetch: FetchReport
    device: str
    stages: dict[str, float]
    same_bytes: bool = True


def build(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    rank: int | Literal["all"] = 128,
    targets: Sequence[str] = ("all-linear",),
    side: Side = "both",
    dtype: StoredDtype = "float32",
    solver: str = "auto",
    principal: int = 0,
    device: str = "auto",
    jobs: int | None = None,
    fetch: Fetch = "auto",
    disk_budget: int | None = None,
    keep: bool | None = None,
    progress: ProgressCallback | None = None,
    on_report: Callable[[BuildReport], None] | None = None,
) -> Bank:
    """Decompose a model's weights into a bank and open it.

    Parameters
    ----------
    model
        ``org/name[@revision]`` on the Hub, or a local folder or file of safetensors.
    output
        Bank folder; by default one in the cache, where :func:`svdbank.open` finds it by the model.
    rank
        Minor triplets to keep of each weight (clamped to ``min(out, in)``), or ``"all"``.
    targets
        Modules, in PEFT's language: suffixes of names, ``all-linear``, or one regular expression.
    side
        ``both``, or ``left`` to leave the right vectors out.
    dtype
        Storage of the vectors. They are computed in float64 whatever this says.
    solver, principal
        Solver path (``auto``: by shape and rank); triplets of the largest singular values to keep as well.
    device
        ``auto`` (CUDA if there), ``cpu``, ``cuda``, ``cuda:1`` …
    jobs
        Small weights solved at a time, by default one a processor. Does not change the bytes of the bank.
    fetch, disk_budget, keep
        How weights on the Hub come here: ``cache`` (all of them into the Hugging Face cache first), ``shards`` (file by file, the
        next while this one is solved), ``ranges`` (only the bytes needed, nothing on disk), or ``auto``, by what fits; the most bytes
        of them on disk at a time (default: what is free); whether they stay (default: where all fit). None of it changes a byte of
        the bank.
    progress, on_report
        Called with each step, and once with a summary.

    A build that was stopped resumes: finished shards are checked and kept. A published bank is extended by targets it lacks.

    Raises
    ------
    OptionError
        Options that cannot be meant, that differ from those of the bank at ``output``, or a folder there that is no bank.
    WrongBaseError
        The bank at ``output`` describes other weights; names the first that differs.
    NotFiniteError, SolverError, CheckpointError, LockedError
        As their names say. What was finished stays and is reused.
    """
    started = time.perf_counter()
    options = checked_options(rank=rank, side=side, dtype=dtype, solver=solver, principal=principal)
    fetching = checked_fetch(fetch=fetch, disk_budget=disk_budget, keep=keep)
    folder, at_once = output_folder(output), checked_jobs(jobs)
    where = working_device(device)
    with open_checkpoint(model) as checkpoint:
        weights, skips = decomposable(checkpoint, targets)
        root = folder or default_output(checkpoint, options)
        refuse_foreign_folder(root)
        with _nothing_left_of_a_refusal(root), disk.locked(root):
            run = Execution(checkpoint, root, where, at_once, fetching, progress or ignore_progress)
            published = read_manifest(Folder(root)) if (root / MANIFEST).exists() else None
            earlier, known, same_bytes = None, list[WeightSpec](), True
            if published is not None:
                refuse_other_options(root, published.options, options)
                earlier = open_bank(root)
                _refuse_damaged(earlier)
                known = _known_weights(checkpoint, earlier, weights)
                same_bytes = run.check_base(earlier, known)
                weights = [weight for weight in weights if weight.name not in earlier]
                if weights and not same_bytes:
                    raise WrongBaseError(
                        f"{root} holds the values of {checkpoint.name}, but was built from weights saved in another dtype",
                        hint=f"extend it from {earlier.manifest.base.name}, or give the bank another place with -o",
                    )
            generation = len(published.plans) if published else 0
            frozen = root / plan_name(generation)
            if published is not None and not frozen.exists():
                clean(root, published)
            if weights:
                plan = make_plan(checkpoint, weights, skips, options, generation=generation, known=known)
                if frozen.exists():
                    plan = _frozen_plan(frozen, plan)
                _refuse_full_disk(root, plan)
                run.execute(plan, weights, generation, earlier)
            bank = open_bank(root)
        if checkpoint.remote is not None:
            checkpoint.remote.remember()
    summary = BuildReport(
        bank=str(root),
        weights=len(bank),
        solved=run.solved,
        reused=run.reused + (len(earlier) if earlier else 0),
        nbytes=bank.manifest.nbytes,
        seconds=time.perf_counter() - started,
        largest_residual=max(bank[name].certificate.residual for name in bank),
        fallbacks=tuple(name for name in bank if bank[name].certificate.tried),
        quantised=quantised_formats(bank[name].dtype for name in bank),
        fetch=run.fetch_report(),
        device=str(where),
        stages=run.stages(),
        same_bytes=same_bytes,
    )
    if on_report is not None:
        on_report(summary)
    return bank


@contextlib.contextmanager
def _nothing_left_of_a_refusal(root: Path) -> Iterator[None]:
    """Folders that were made for a build which is then refused go again, as long as nothing is in them."""
    made = [folder for folder in (root, *root.parents) if not folder.exists()]
    try:
        yield
    except SvdbankError:
        for folder in made:
            disk.remove_empty(folder)
        raise


def _known_weights(checkpoint: Checkpoint, bank: Bank, asked: Sequence[WeightSpec]) -> list[WeightSpec]:
    """Where the weights of a published bank lie in the checkpoint; WrongBaseError for one that is not there with its shape."""
    specs = {weight.name: weight for weight in asked}
    if not all(name in specs for name in bank):
        everything, _ = decomposable(checkpoint, (".*",))
        specs = {weight.name: weight for weight in everything}
    known = []
    for name in bank:
        basis = bank[name]
        spec = specs.get(name)
        if spec is None or (spec.out_features, spec.in_features) != (basis.out_features, basis.in_features):
            raise WrongBaseError(
                f"{bank.path} was built from another model: {checkpoint.name} has no {name} of {basis.out_features}x{basis.in_features}",
                hint="give the bank another place with -o, or delete it",
            )
        known.append(spec)
    return known


def _frozen_plan(path: Path, plan: Plan) -> Plan:
    """The plan of an unfinished build or extension, which is carried out as it stands; errors name what is now asked otherwise."""
    frozen = read_plan(path)
    refuse_other_options(path.parent, frozen.options, plan.options)
    if frozen.base.config_digest != plan.base.config_digest:
        raise WrongBaseError(
            f"{path.parent} was begun for {frozen.base.name}, whose configuration is not that of {plan.base.name}",
            hint="give the bank another place with -o, or delete it",
        )
    if (frozen.families, frozen.aliases) != (plan.families, plan.aliases):
        ours = {name for family in plan.families for name in family.weights} | {alias.name for alias in plan.aliases}
        theirs = {name for family in frozen.families for name in family.weights} | {alias.name for alias in frozen.aliases}
        differs = sorted(ours ^ theirs)[:3] or ["the shape of a family"]
        names = sorted({re.sub(r"\.(weight|[0-9]+)$", "", name).rpartition(".")[2] for name in theirs})
        raise OptionError(
            f"{path.parent} has an unfinished build of other targets ({len(theirs)} weights, now {len(ours)}; e.g. {', '.join(differs)})",
            hint=f"finish it first (its modules end in {', '.join(names)}), then build again with more targets; or delete the bank",
        )
    return frozen


def _refuse_damaged(bank: Bank) -> None:
    """A published bank is reused or extended only if its files are there, whole by size, with their metadata as published."""
    if damage := examine(bank).damage:
        first, path = damage[0], str(bank.path)
        raise DamageError(
            f"{path} is damaged: {first.file}: {first.what} ({len(damage)} in all)", hint=rebuild_command(path, bank)
        )


def _refuse_full_disk(root: Path, plan: Plan) -> None:
    needed = bank_bytes(root, plan)
    if needed > (free := disk.free_bytes(root)):
        raise OptionError(
            f"{root}: the bank needs {gigabytes(needed)} more, {gigabytes(free)} are free",
            hint="choose another disk with -o, a smaller --rank, --side left, or --dtype float16",
        )
