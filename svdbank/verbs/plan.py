"""``plan``: what a build would do and cost, from headers alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Literal

from svdbank.building.devices import planned_device
from svdbank.building.estimate import solve_rate
from svdbank.building.families import FamilySummary, family_flops, family_summaries
from svdbank.building.fetching import FETCHING, Fetch, FetchPlan, plan_fetch
from svdbank.building.memory import device_memory, peak_memory
from svdbank.building.planning import make_plan
from svdbank.building.request import build_request
from svdbank.building.scaling import Schedule, crew_request, given_rates, schedule
from svdbank.building.space import bank_bytes, file_count, refuse_many_files
from svdbank.building.survey import survey
from svdbank.checkpoint.configured import is_configuration, open_configuration
from svdbank.checkpoint.source import open_checkpoint
from svdbank.core import disk
from svdbank.core.processors import available_cpus
from svdbank.core.specs import Plan, Side, StoredDtype, Struct, quantised_formats


class PlanReport(Struct, frozen=True):
    """A plan with what it will cost. Bytes, seconds; ``seconds`` is an estimate from one timed matrix product (on a GPU: solve) and
    fixes nothing.

    ``present`` weights are in the bank at ``output`` already and left out of everything else. ``fetch`` says what is downloaded and how;
    ``fetch_bytes`` are read from the checkpoint, ``write_bytes`` and ``files`` written to ``output``, ``peak_bytes`` the memory bound.
    ``quantised`` counts the weights stored as codes and scales, by format: the bank describes their dequantised values. ``device`` is the
    kind of device that paths, ``seconds`` and ``device_bytes`` (its memory, of one solve or batch at a time; None on a CPU) are of;
    ``seconds`` is None where there is none of that kind here to time a solve on. ``decided`` and ``doubt`` are the plan's: who knew which
    matrices there are; ``decided_before`` are others who did so for what is in the bank already.
    Without ``weights_here`` there was a ``config.json`` alone: a build needs the weights. ``schedule`` is there where one was asked for.
    """

    model: str
    output: str
    device: str
    plan: Plan
    families: tuple[FamilySummary, ...]
    present: int
    fetch: FetchPlan
    fetch_bytes: int
    write_bytes: int
    files: int
    free_bytes: int
    peak_bytes: int
    device_bytes: int | None
    jobs: int
    seconds: float | None
    quantised: dict[str, int]
    decided: str
    doubt: str | None
    decided_before: tuple[str, ...]
    weights_here: bool = True
    schedule: Schedule | None = None


def plan(
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
    threads: int | None = None,
    fetch: Fetch = "auto",
    disk_budget: int | None = None,
    keep: bool | None = None,
    workers: int | None = None,
    device_rate: str | os.PathLike[str] | None = None,
) -> PlanReport:
    """What :func:`svdbank.build` with the same arguments would do now, to the bank that is at ``output`` or in an empty place.

    Reads configuration, index and headers only, of a model on the Hub too; writes no bank. ``model`` may also be a ``config.json``,
    or a folder of one without weights: Transformers then says which matrices there are.

    With ``workers`` the schedule on as many of them is simulated, and on 1 to 1024, from the rates of ``device_rate``, a file of
    :func:`svdbank.env`; without one the rates are taken of this machine's processors now, which takes a minute. ``device`` ``auto``
    is then the kind that the rates are of, and ``threads``, as ``jobs``, by default as many as its processors leave each of them.

    Raises OptionError for options that cannot be meant, differ from those of what is at ``output``, or do not fit the disk, for more
    files than the Hub takes in one commit, and for targets that match nothing; WrongBaseError for a bank at ``output`` that names and
    shapes show to be another model's; CheckpointError for a checkpoint that cannot be read.
    """
    request = build_request(
        model,
        output,
        rank=rank,
        targets=targets,
        side=side,
        dtype=dtype,
        solver=solver,
        principal=principal,
        device=device,
        jobs=jobs,
        fetch=fetch,
        disk_budget=disk_budget,
        keep=keep,
        workers=workers,
        threads=threads if workers is None and device_rate is None else None,
    )
    rates = given_rates(device_rate, request.device) if workers is not None or device_rate is not None else None
    kind, here = (rates.kind, None) if rates is not None else planned_device(request.device.partition(",")[0])
    if rates is not None:
        request = crew_request(request, rates, workers=workers, threads=threads, jobs=jobs)
    alone = is_configuration(request.model)
    with (open_configuration if alone else open_checkpoint)(request.model) as checkpoint:
        found = survey(checkpoint, request)
        left, made = found.left, found.plan
        if found.recorded:
            stored = [weight for weight in found.new if weight.name in found.recorded]
            known = (*found.known, *stored)
            made = make_plan(
                checkpoint,
                left,
                found.skips,
                request.options,
                threads=request.threads,
                generation=found.generation,
                known=known,
            )
        refuse_many_files(file_count(made), f"{found.root}: the bank")
        to_write = bank_bytes(found.root, found.plan)
        fetching = plan_fetch(checkpoint, left, request.fetch, root=found.root, bank_bytes=to_write)
        weights = {weight.name: weight for weight in left}
        families = family_summaries(made, kind)
        stored_weights = [weights[name] for family in made.families for name in family.weights]
        rate = None if here is None else solve_rate(here)
        at_once = min(request.jobs, available_cpus()) if kind == "cpu" else 1
        return PlanReport(
            model=checkpoint.name,
            output=str(found.root),
            device=kind,
            plan=made,
            families=families,
            present=len(found.asked) - len(left),
            fetch=fetching,
            fetch_bytes=sum(weight.nbytes for weight in stored_weights),
            write_bytes=sum(family.nbytes for family in families),
            files=file_count(made),
            free_bytes=disk.free_bytes(found.root),
            peak_bytes=peak_memory(made, weights, request.jobs, kind)
            + (FETCHING if fetching.way in ("shards", "ranges") else 0),
            device_bytes=None if kind == "cpu" else device_memory(made, weights, kind),
            jobs=request.jobs,
            seconds=None if rate is None else sum(family_flops(family) for family in families) / rate / at_once,
            quantised=quantised_formats(weight.dtype for weight in stored_weights),
            decided=made.decided,
            doubt=made.doubt,
            decided_before=found.decided_before,
            weights_here=not alone,
            schedule=None
            if rates is None or not made.shards
            else schedule(
                made,
                weights,
                checkpoint,
                fetching,
                rates,
                workers=request.workers or 1,
                threads=request.threads,
                jobs=request.jobs,
            ),
        )
