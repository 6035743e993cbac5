"""What a plan and a build are asked for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from svdbank.bank.layout import STORED
from svdbank.building.fetching import FetchOptions, checked_fetch
from svdbank.cache import given_output
from svdbank.core.errors import OptionError
from svdbank.core.processors import available_cpus
from svdbank.core.specs import BuildOptions, Side, StoredDtype, Struct
from svdbank.solver.planning import PATHS

#: Largest rank that may be asked for; no weight has more.
_LARGEST = 2**31 - 1

#: Most weights solved at a time: each takes a thread. More than processors only cost memory.
MOST_JOBS = 1024


class BuildRequest(Struct, frozen=True):
    """What was asked for, checked as far as it can be without looking at the model.

    ``output`` is None for a bank in the cache; ``device`` is a name as it was given, or several with commas; each of ``workers`` (None:
    one a device; on a CPU they are threads of one process) solves a large weight with ``threads`` and ``jobs`` small ones at a time.
    """

    model: str | Path
    output: Path | None
    targets: tuple[str, ...]
    options: BuildOptions
    device: str
    jobs: int
    fetch: FetchOptions
    workers: int | None = None
    threads: int = 1


def build_request(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str] | None,
    *,
    rank: int | Literal["all"],
    targets: Sequence[str] = ("all-linear",),
    side: Side = "both",
    dtype: StoredDtype = "float32",
    solver: str = "auto",
    principal: int = 0,
    device: str = "auto",
    jobs: int | None = None,
    fetch: str = "auto",
    disk_budget: int | None = None,
    keep: bool | None = None,
    workers: int | None = None,
    threads: int | None = None,
    processors: int | None = None,
) -> BuildRequest:
    """The request that these arguments of ``svdbank.plan`` and ``svdbank.build`` make; OptionError for one that cannot be meant.

    ``processors`` is how many a worker may have, by default those of this process.
    """
    here = available_cpus() if processors is None else processors
    beside = max(_number(workers, "workers") or 1, len(device.split(",")))
    each = _number(threads, "threads") or max(1, here // beside)
    if each > here:
        raise OptionError(
            f"--threads {each}: this process may use {here} processors (affinity and cgroup limits count)",
            hint="ask for fewer; SVDBANK_THREADS=N takes the machine as having N",
        )
    return BuildRequest(
        model=model if isinstance(model, str) else Path(model),
        output=given_output(output),
        targets=(targets,) if isinstance(targets, str) else tuple(targets),
        options=_options(rank=rank, side=side, dtype=dtype, solver=solver, principal=principal),
        device=device,
        jobs=_number(jobs, "jobs") or each,
        workers=_number(workers, "workers"),
        threads=each,
        fetch=checked_fetch(fetch=fetch, disk_budget=disk_budget, keep=keep),
    )


def _options(*, rank: int | Literal["all"], side: Side, dtype: StoredDtype, solver: str, principal: int) -> BuildOptions:
    if rank != "all" and not (type(rank) is int and 1 <= rank <= _LARGEST):
        raise OptionError(
            f"rank is a positive number up to {_LARGEST}, or 'all', not {rank!r}",
            hint="--rank 128 is the default, --rank all keeps every triplet",
        )
    if side not in ("both", "left"):
        raise OptionError(f"side is 'both' or 'left', not {side!r}")
    if dtype not in STORED:
        raise OptionError(f"dtype is one of {', '.join(STORED)}, not {dtype!r}")
    if solver != "auto" and solver not in PATHS:
        raise OptionError(f"solver is auto or one of {', '.join(PATHS)}, not {solver!r}")
    if not (type(principal) is int and 0 <= principal <= _LARGEST):
        raise OptionError(
            f"principal is a number of triplets up to {_LARGEST}, not {principal!r}",
            hint="--principal 0 keeps none, and is the default",
        )
    return BuildOptions(rank=rank, side=side, dtype=dtype, solver=solver, principal=principal)


def _number(given: int | None, name: str) -> int | None:
    if given is not None and not (type(given) is int and 1 <= given <= MOST_JOBS):
        raise OptionError(
            f"{name} is a number from 1 to {MOST_JOBS}, not {given!r}", hint=f"leave --{name} out: the processors decide"
        )
    return given
