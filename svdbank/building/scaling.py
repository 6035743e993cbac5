"""How a build scales: time, efficiency, bytes and device-hours for 1 to 1024 workers, from its simulated schedule."""

from __future__ import annotations

import os

import msgspec

from svdbank.building.costs import SolveCost, publish_seconds, shard_costs, solve_costs
from svdbank.building.fetching import READERS, FetchPlan, files_of
from svdbank.building.memory import IN_FLIGHT, WRITERS
from svdbank.building.rates import Rates, read_rates
from svdbank.building.request import BuildRequest
from svdbank.building.shards import shard_works
from svdbank.building.simulation import Build, Staff, play
from svdbank.checkpoint.source import Checkpoint
from svdbank.core.errors import OptionError
from svdbank.core.specs import Plan, Struct, WeightSpec

#: Numbers of workers that are shown.
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)

#: Kinds of work that more workers share.
_SHARED = ("arithmetic", "reading", "hashing", "writing")
_STEPS = ("read", "hash", "disk", "upload", "solve", "write", "record")


class Scale(Struct, frozen=True):
    """A build on so many ``workers``. Seconds, bytes, hours.

    ``seconds`` is all of it: ``start``, ``work`` until the last record, ``publish``. ``efficiency`` is one worker's seconds over those of
    all together, ``most_bytes`` what one worker reads at most, ``read_rate`` what all together ask of the storage, in bytes a second.
    ``bound`` names what takes longest where all is shared evenly: ``arithmetic``, ``reading``, ``hashing``, ``writing`` (with files and
    records), ``publishing``, ``start``, or ``one shard`` where the largest alone takes longer than that.
    """

    workers: int
    seconds: float
    start: float
    work: float
    publish: float
    efficiency: float
    most_bytes: int
    read_rate: float
    device_hours: float
    bound: str


class Schedule(Struct, frozen=True):
    """A simulated schedule. ``asked`` is for the number of workers asked for, ``table`` for others.

    ``rates`` is the device whose rates were taken, ``measured`` whether they were (or are a data sheet's), ``notes`` what they say of
    themselves. ``stages`` are seconds of each step, summed over all shards, as if alone on the device. ``solves`` says of each family what
    one weight takes, and whether just that was measured.
    """

    rates: str
    measured: bool
    date: str
    notes: tuple[str, ...]
    threads: int
    jobs: int
    machine: int
    asked: Scale
    table: tuple[Scale, ...]
    stages: dict[str, float]
    solves: tuple[SolveCost, ...]


def given_rates(file: str | os.PathLike[str] | None, device: str) -> Rates:
    """Rates from a file, or taken now of ``device``, which needs a minute. OptionError for a file of another kind of device."""
    if file is None:
        from svdbank.building.calibration import measured_rates

        return measured_rates(device)
    rates = read_rates(file)
    name = device.partition(":")[0]
    if name not in ("auto", rates.kind, "cuda" if rates.kind != "cpu" else "cpu"):
        raise OptionError(
            f"{os.fspath(file)} has rates of {rates.device} ({rates.kind}), not of {device}", hint="--device auto"
        )
    return rates


def crew_request(
    request: BuildRequest, rates: Rates, *, workers: int | None, threads: int | None, jobs: int | None
) -> BuildRequest:
    """``request`` for workers that share the processors which the rates are of, as workers of this machine share those here."""
    each = threads or max(1, rates.processors // (workers or 1))
    if rates.kind == "cpu" and each > rates.processors:
        raise OptionError(
            f"--threads {each}: the rates are of a machine with {rates.processors} processors", hint="ask for fewer"
        )
    return msgspec.structs.replace(request, workers=workers or 1, threads=each, jobs=jobs or each)


def schedule(
    plan: Plan,
    weights: dict[str, WeightSpec],
    checkpoint: Checkpoint,
    fetch: FetchPlan,
    rates: Rates,
    *,
    workers: int,
    threads: int,
    jobs: int,
) -> Schedule:
    """Simulate a plan on ``workers`` and on each of :data:`COUNTS`, as many on a machine as its processors have room for."""
    works = shard_works(plan, weights, plan.shards)
    solves = solve_costs(plan, rates)
    costs = shard_costs(plan, works, rates, solves)
    places = {file.name: number for number, file in enumerate(checkpoint.files)}
    # Of a configuration alone there are no files: their order is that of the tensors.
    places |= {name: 0 for work in works for weight in work.weights for name in files_of(weight) if name not in places}
    build = Build(
        plan=plan,
        works=works,
        costs=costs,
        checkpoint=checkpoint,
        places=places,
        by_file=fetch.way == "shards",
        remote=fetch.way in ("shards", "ranges"),
    )
    machine = max(1, rates.processors // max(threads, jobs)) if rates.kind == "cpu" else 1
    published = publish_seconds(plan, rates)
    alone_seconds = _alone(build, rates, jobs, published)
    found: dict[int, Scale] = {}
    for count in sorted({*COUNTS, workers}):
        played = play(build, Staff(count, threads, jobs, machine), rates)
        seconds = rates.start + played.seconds + published
        alone = found[1].seconds if found else seconds
        found[count] = Scale(
            workers=count,
            seconds=round(seconds, 4),
            start=rates.start,
            work=round(played.seconds, 4),
            publish=round(published, 4),
            efficiency=round(alone / (count * seconds), 4),
            most_bytes=max(played.nbytes),
            read_rate=round(sum(played.nbytes) / played.seconds),
            device_hours=round(count * seconds / 3600, 5),
            bound=max(alone_seconds, key=lambda name: alone_seconds[name] / (count if name in _SHARED else 1)),
        )
    return Schedule(
        rates=rates.device,
        measured=rates.measured,
        date=rates.date,
        notes=rates.notes,
        threads=threads,
        jobs=jobs,
        machine=machine,
        asked=found[workers],
        table=tuple(found[count] for count in COUNTS),
        stages={name: round(sum(getattr(cost, name) for cost in costs.values()), 4) for name in _STEPS}
        | {"publish": round(published, 4)},
        solves=tuple(solves.values()),
    )


def _alone(build: Build, rates: Rates, jobs: int, published: float) -> dict[str, float]:
    """Seconds that each kind of work takes one worker, if it has to do nothing else."""
    on_gpu = rates.kind != "cpu"
    readers = READERS if build.remote else min(READERS, rates.processors) if on_gpu else 1
    found = dict.fromkeys((*_SHARED, "one shard"), 0.0)
    for work in build.works:
        cost = build.costs[work.shard.family, work.shard.index]
        at_once = jobs if work.shard.threads == 1 else 1
        found["arithmetic"] += cost.solve * rates.slowdown / rates.at_once if on_gpu else cost.solve / at_once
        found["reading"] += (cost.read + cost.disk) / readers
        found["hashing"] += cost.hash / readers
        found["writing"] += (cost.write + cost.record) / (IN_FLIGHT + WRITERS if on_gpu else at_once)
        longest = sum(getattr(cost, name) for name in _STEPS)
        found["one shard"] = max(found["one shard"], longest)
    return found | {"publishing": published, "start": rates.start}
