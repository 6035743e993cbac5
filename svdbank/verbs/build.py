"""``build``: make, resume or extend a bank, or refuse before any work."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Literal

import msgspec

from svdbank.bank.reading import Bank, open_bank
from svdbank.building.execution import WorkReport
from svdbank.building.fetching import Fetch, FetchReport, fetch_report
from svdbank.building.joining import Workplace, finished, joined
from svdbank.building.request import MOST_JOBS, build_request
from svdbank.building.shares import parse_share
from svdbank.building.teams import LocalTeam, RayTeam, Team
from svdbank.core.errors import OptionError
from svdbank.core.processors import available_cpus
from svdbank.core.specs import ProgressCallback, Side, StoredDtype, Struct, ignore_progress, quantised_formats


class BuildReport(Struct, frozen=True):
    """What a build did. ``solved`` weights were decomposed now, ``reused`` were there already.

    ``quantised`` counts the weights stored as codes and scales, by format: the bank describes their dequantised values. ``stages`` are
    seconds by what they were spent on, summed over threads that work beside each other: they come to more than ``seconds``. ``decided``,
    ``doubt`` and ``decided_before`` as in :class:`~svdbank.verbs.plan.PlanReport`.
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
    decided: str = "table"
    doubt: str | None = None
    decided_before: tuple[str, ...] = ()


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
    workers: int | None = None,
    threads: int | None = None,
    shard: str | None = None,
    ray: str | None = None,
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
        ``auto`` (CUDA if there), ``cpu``, ``cuda`` (every GPU there is, a worker each), ``cuda:1`` …, or several with commas, a worker
        each, also the same twice.
    workers, threads, jobs
        Workers on a CPU (1), beside each other in this process, threads of each for a large weight (the processors divided among
        them; fixed in the plan, since bytes depend on it), and small weights that each solves at a time (as many as threads;
        changes no byte).
    fetch, disk_budget, keep
        How weights on the Hub come here: ``cache`` (all of them into the Hugging Face cache first), ``shards`` (file by file, the
        next while this one is solved), ``ranges`` (only the bytes needed, nothing on disk), or ``auto``, by what fits; the most bytes
        of them on disk at a time (default: what is free); whether they stay (default: where all fit). None of it changes a byte of
        the bank.
    shard
        ``I/N``, or ``auto[/N]`` in a Slurm array, an indexed Job or under torchrun: work beside other processes, on any machines that
        see the bank's folder, beginning with part I of N. An order of preference and no bound; whoever is done helps, takes over what
        dead workers held and waits for the rest, and the bank is published once.
    ray
        ``local`` (a Ray of its own on this machine), ``auto`` or ``HOST:PORT`` (one that runs): workers are actors of Ray, a GPU each or
        ``threads`` processors, as many as there is room for, or ``workers``. All machines must see the bank's folder and the model.
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
        threads=threads,
        processors=available_cpus() if ray is None else MOST_JOBS,
    )
    share, tell = None if shard is None else parse_share(shard, os.environ), progress or ignore_progress
    if share is not None and ray is not None:
        raise OptionError("--shard and --ray: Ray's workers share the work by themselves", hint="leave --shard out")
    asked: Team = LocalTeam(request, share) if ray is None else RayTeam(ray, request, threads=threads, jobs=jobs)
    with (
        asked as team,
        joined(team.request, device=team.device, join=team.joins, on_cpu=team.on_cpu, progress=tell) as here,
    ):
        checkpoint, prepared = here.checkpoint, here.prepared
        done = _worked(here, team, tell)
        fetching = fetch_report(checkpoint, prepared.fetch, done.waited)
        finished(
            prepared,
            progress=tell,
            facts=lambda: {"solved": done.solved, "reused": prepared.recorded, "fetch": msgspec.to_builtins(fetching)},
        )
        bank = open_bank(prepared.root)
        if checkpoint.remote is not None:
            checkpoint.remote.remember()
    summary = BuildReport(
        bank=str(prepared.root),
        weights=len(bank),
        solved=done.solved,
        reused=prepared.recorded + prepared.published,
        nbytes=bank.manifest.nbytes,
        seconds=time.perf_counter() - started,
        largest_residual=max(bank[name].certificate.residual for name in bank),
        fallbacks=tuple(name for name in bank if bank[name].certificate.tried),
        quantised=quantised_formats(bank[name].dtype for name in bank),
        fetch=fetching,
        device=team.device,
        stages=done.stages,
        same_bytes=prepared.same_bytes,
        decided=prepared.plan.decided,
        doubt=prepared.plan.doubt,
        decided_before=prepared.decided_before,
    )
    if on_report is not None:
        on_report(summary)
    return bank


def _worked(here: Workplace, team: Team, progress: ProgressCallback) -> WorkReport:
    """The work, by all workers, where there is something to do."""
    if here.prepared.session is None:
        return WorkReport(solved=0, elsewhere=(), stages={}, waited=0.0)
    done, (nbytes, requests, retries) = team.work(here, progress)
    if here.checkpoint.remote is not None:
        here.checkpoint.remote.traffic.add(nbytes=nbytes, requests=requests, retries=retries)
    return done
