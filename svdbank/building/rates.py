"""The rates of a device, as ``svdbank env --rates`` writes them: what a solve takes by shape and rank, and everything beside it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from math import dist, exp, isfinite, log
from typing import Literal

import msgspec

from svdbank.core import disk
from svdbank.core.errors import OptionError
from svdbank.core.specs import Struct, from_json, to_json
from svdbank.solver.planning import PATHS, flops

Origin = Literal["measured", "interpolated", "extrapolated"]

_LARGEST_FILE = 4 << 20
_HINT = "svdbank env --rates FILE writes such a file for this machine"

#: How far apart a wide and a tall weight of the same sides count, beside the logarithms of sides, ranks and ratios.
_TURNED = 0.35
#: How much farther than the outermost measured side still counts as between, and how close is the same.
_SLACK = 1.05


class SolveRate(Struct, frozen=True):
    """Seconds that one weight (out, in) takes at ``rank`` on ``path``, alone on the device; of a ``batch`` the seconds for each weight.

    ``threads`` are those of a CPU, 1 on a GPU. ``source`` says where the figure is from, where it was not measured with the file.
    """

    out_features: int
    in_features: int
    rank: int
    path: str
    threads: int
    batch: int
    seconds: float
    source: str = ""


class PublishRate(Struct, frozen=True):
    """Seconds that a publish takes: once, and for each family, shard and weight."""

    once: float
    family: float
    shard: float
    weight: float


class Rates(Struct, frozen=True):
    """What a worker on a device takes for each step of a build. Seconds, bytes a second.

    Attributes
    ----------
    kind, device
        Kind of device that plans go by, and its name.
    measured
        False where figures are of a data sheet; ``notes`` say which.
    date, versions, notes
        When, with which packages, and what a reader must know.
    processors
        Of the machine, for each worker with a GPU, or for all workers on CPUs.
    at_once, slowdown
        ``at_once`` solves beside each other (on a CPU of one thread) take ``slowdown`` times as long each as one alone.
    solves
        Seconds by shape, rank, path, threads and batch.
    read, hash, disk, upload
        Bytes a second of a thread that copies what is in memory, that hashes, of a disk with nothing in memory (None: not counted), to the
        device (None on a CPU).
    write, shard, weight, busy
        Bytes a second to the bank, durably; seconds beside it for each shard (files, record, claim) and for each of its weights; the part
        of all that in which a processor works.
    publish, start
        Seconds of a publish, and of a worker's beginning.
    """

    format: Literal[1]
    kind: Literal["cpu", "cuda", "cuda-low-float64"]
    device: str
    measured: bool
    date: str
    versions: dict[str, str]
    notes: tuple[str, ...]
    processors: int
    at_once: int
    slowdown: float
    solves: tuple[SolveRate, ...]
    read: float
    hash: float
    disk: float | None
    upload: float | None
    write: float
    shard: float
    weight: float
    busy: float
    publish: PublishRate
    start: float


class Estimate(Struct, frozen=True):
    """Seconds that a weight takes, and whether just that was measured."""

    seconds: float
    basis: Origin


def read_rates(path: str | os.PathLike[str]) -> Rates:
    """Rates from a file. OptionError for one that cannot be read, is no such file, or says what cannot be."""
    place = disk.expanded(os.fspath(path))
    try:
        with place.open("rb") as file:
            data = file.read(_LARGEST_FILE + 1)
    except OSError as cause:
        raise OptionError(f"{place}: rates cannot be read: {cause.strerror}", hint=_HINT) from cause
    if len(data) > _LARGEST_FILE:
        raise OptionError(f"{place}: too large for a file of rates", hint=_HINT)
    try:
        rates = from_json(data, Rates, where=str(place), error=OptionError)
    except OptionError as cause:
        raise OptionError(str(cause), hint=_HINT) from cause
    if wrong := _wrong(rates):
        raise OptionError(f"{place}: no rates of a device: {wrong}", hint=_HINT)
    return rates


def write_rates(path: str | os.PathLike[str], rates: Rates) -> None:
    """Write rates to ``path``, in place of rates that are there."""
    disk.write_bytes(disk.expanded(os.fspath(path)), to_json(rates, indent=1))


def refuse_other_file(path: str | os.PathLike[str]) -> None:
    """OptionError where ``path`` cannot be written, or is a file of something else."""
    place = disk.expanded(os.fspath(path))
    if not place.parent.is_dir():
        raise OptionError(f"{place}: there is no folder {place.parent}", hint=f"mkdir -p {place.parent}")
    if not os.access(place.parent, os.W_OK):
        raise OptionError(f"{place}: the folder cannot be written", hint="choose another place")
    if place.exists() or place.is_symlink():
        try:
            read_rates(place)
        except OptionError as cause:
            raise OptionError(
                f"{place} is there, and is no file of rates: it is not overwritten", hint="choose another name"
            ) from cause


def solve_seconds(
    rates: Rates, out_features: int, in_features: int, rank: int, *, path: str, threads: int, batch: int
) -> Estimate:
    """Seconds of one weight, alone on the device; in a batch where ``batch`` is more than 1.

    A batch of a shape that lies outside of those measured in batches takes what each alone takes: no more, as far as is known.
    What was not measured lies between neighbours: the logarithm of seconds over flops, weighted by how near they are in the logarithms of
    sides, ratio and rank. Outside of them, or on a path that was not measured, the nearest rate is taken (``extrapolated``).
    """
    asked = (out_features, in_features, rank)
    alone = [one for one in rates.solves if one.path == path and one.batch == 1]
    together = [one for one in rates.solves if one.path == path and one.batch > 1]
    in_batch = batch > 1 and _surrounded(together, asked)
    alike = together if in_batch else alone
    known = alike or together or list(rates.solves)
    counts = sorted({one.threads for one in known})
    lower = max((count for count in counts if count <= threads), default=counts[0])
    upper = min((count for count in counts if count >= threads), default=counts[-1])
    found = []
    for count in (lower, upper):
        these = [one for one in known if one.threads == count]
        exact = next((one for one in these if (one.out_features, one.in_features, one.rank) == asked and alike), None)
        rate = log(exact.seconds) if exact is not None else _between(these, asked, path)
        found.append((rate, exact is not None, exact is not None or _surrounded(these, asked)))
    share = 0.0 if upper == lower else log(threads / lower) / log(upper / lower)
    seconds = exp(found[0][0] + share * (found[1][0] - found[0][0]))
    inside = bool(alike) and lower <= threads <= upper and all(one[2] for one in found)
    if not inside:
        return Estimate(seconds, "extrapolated")
    measured = in_batch == (batch > 1) and threads in counts and found[0][1] and found[1][1]
    return Estimate(seconds, "measured" if measured else "interpolated")


def _between(known: Sequence[SolveRate], asked: tuple[int, int, int], path: str) -> float:
    """Logarithm of the seconds."""
    at, total, weights = _coordinates(*asked), 0.0, 0.0
    for one in known:
        mine = one.out_features, one.in_features, one.rank
        near = 1 / (dist(at, _coordinates(*mine)) + 1e-3) ** 3
        total += near * log(one.seconds / flops(*mine, one.path))
        weights += near
    return total / weights + log(flops(*asked, path))


def _coordinates(out_features: int, in_features: int, rank: int) -> tuple[float, ...]:
    k, n = sorted((out_features, in_features))
    turned = _TURNED if out_features > in_features else 0.0
    return log(k), log(n / k), turned, log(rank)


def _surrounded(known: Sequence[SolveRate], asked: tuple[int, int, int]) -> bool:
    """True where short side, long side and rank lie between those measured."""
    if not known:
        return False
    rows = [(*sorted((one.out_features, one.in_features)), one.rank) for one in known]
    sides = (*sorted(asked[:2]), asked[2])
    return all(
        min(column) / _SLACK <= side <= max(column) * _SLACK
        for column, side in zip(zip(*rows, strict=True), sides, strict=True)
    )


def _wrong(rates: Rates) -> str | None:
    """What cannot be in rates; None where all is well."""
    fields = msgspec.structs.asdict(rates) | {
        f"publish.{name}": value for name, value in msgspec.structs.asdict(rates.publish).items()
    }
    for name, value in fields.items():
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        may_be_nothing = name.startswith("publish.") or name in ("shard", "weight", "busy", "start", "format")
        if not isfinite(value) or value < 0 or (value == 0 and not may_be_nothing):
            return f"{name} is {value}"
    if rates.busy > 1 or rates.slowdown < 1 or rates.at_once < 1 or rates.processors < 1:
        return "busy is at most 1, slowdown, at_once and processors at least"
    if not rates.solves:
        return "no solve was measured"
    for one in rates.solves:
        shape = f"{one.out_features}x{one.in_features}"
        if not 1 <= one.rank <= min(one.out_features, one.in_features) or one.threads < 1 or one.batch < 1:
            return f"a solve of {shape} at rank {one.rank} with {one.threads} threads, {one.batch} at once"
        if one.path not in PATHS:
            return f"no solver path is called {one.path!r}"
        if not isfinite(one.seconds) or one.seconds <= 0:
            return f"{one.seconds} seconds for {shape}"
    return None
