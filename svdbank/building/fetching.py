"""How the weights of a build come to this machine: decided before the work, from sizes alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, Protocol, get_args

from svdbank.checkpoint.source import Checkpoint
from svdbank.core import disk
from svdbank.core.errors import OptionError
from svdbank.core.hub_ranges import PIECE, REQUESTS
from svdbank.core.specs import Progress, ProgressCallback, Struct, WeightSpec

Fetch = Literal["auto", "cache", "shards", "ranges"]

#: Threads that read weights over a network: many hide its latency. A disk is kept busy by one.
READERS = 8

#: Bytes read ahead of the solver over a network; from a disk the next group is enough.
READ_AHEAD = 64 << 20

#: Bytes of memory that fetching takes: requests under way and what is read ahead.
FETCHING = REQUESTS * PIECE + READ_AHEAD

#: Left free on a disk that files are downloaded to without a budget: others write there too.
_HEADROOM = 256 << 20


class FetchOptions(Struct, frozen=True):
    """What was asked for. ``disk_budget`` bounds the bytes of checkpoint files that are put on disk; None takes what is free.

    ``keep`` leaves downloaded files in the Hugging Face cache; None does so where all of them fit.
    """

    fetch: Fetch
    disk_budget: int | None
    keep: bool | None


class FetchPlan(Struct, frozen=True):
    """How the bytes will come. All counts are of what is not on this machine yet.

    ``way`` is ``local`` (nothing to fetch), ``cache`` (the whole model into the Hugging Face cache first), ``shards`` (file by file,
    ahead of the solver) or ``ranges`` (only the bytes of the weights, nothing on disk). ``nbytes`` are downloaded out of ``files``,
    ``disk_bytes`` is the most that lies on disk at a time, ``keep`` whether it stays. ``checked`` is true where whole files arrive
    and are held to the Hub's hash of them; the Hub has none for a range, so there only its place, size and ETag are compared, and
    what is here already (``local``) is trusted, not hashed again.
    """

    way: Literal["local", "cache", "shards", "ranges"]
    files: int
    nbytes: int
    disk_bytes: int
    keep: bool
    checked: bool


class FetchReport(Struct, frozen=True):
    """How the bytes came. ``waiting_seconds`` is the time in which a solver had nothing to do because they had not.

    ``nbytes``, ``requests`` and ``retries`` count what went over the network for weights and their headers. With ``way`` ``cache`` the Hub
    client makes the requests for the files and does not count them: ``requests`` and ``retries`` are then those for headers.
    ``checked`` is that of :class:`FetchPlan`.
    """

    way: Literal["local", "cache", "shards", "ranges"]
    checked: bool
    nbytes: int
    requests: int
    retries: int
    waiting_seconds: float


class Downloads(Protocol):
    """Told of each read that is over, so that what nobody needs any more can go."""

    def done(self, names: frozenset[str]) -> None: ...


class _NoDownloads:
    def done(self, names: frozenset[str]) -> None:
        """Nothing was put on disk for a read."""


def checked_fetch(*, fetch: str, disk_budget: int | None, keep: bool | None) -> FetchOptions:
    """Fetch options, or OptionError for what cannot be meant."""
    if fetch not in get_args(Fetch):
        raise OptionError(f"fetch is one of {', '.join(get_args(Fetch))}, not {fetch!r}")
    if disk_budget is not None and disk_budget < 0:
        raise OptionError(f"a disk budget is a number of bytes, not {disk_budget}")
    if fetch == "ranges" and keep:
        raise OptionError("byte ranges leave nothing to keep", hint="--fetch shards --keep, or leave --keep out")
    if fetch == "cache" and keep is False:
        raise OptionError("a whole download into the Hugging Face cache stays there", hint="--fetch shards --no-keep")
    return FetchOptions(fetch=fetch, disk_budget=disk_budget, keep=keep)  # type: ignore[arg-type]


def files_of(weight: WeightSpec) -> frozenset[str]:
    """The checkpoint files that reading a weight needs."""
    return frozenset(file for source in weight.sources for file, _, _ in source.pieces)


def plan_fetch(
    checkpoint: Checkpoint, weights: Sequence[WeightSpec], options: FetchOptions, *, root: Path, bank_bytes: int
) -> FetchPlan:
    """Choose the way for these weights. ``bank_bytes`` are still to be written below ``root``.

    ``auto`` is shards where all that is missing fits, shards deleted behind where the largest fits, else ranges. Raises OptionError
    where what was asked for does not fit.
    """
    remote = checkpoint.remote
    sizes = {name: file.source.size for name, file in remote.files.items() if file.copy is None} if remote is not None else {}
    needed = {name: sizes[name] for weight in weights for name in files_of(weight) if name in sizes}
    if remote is None or not needed:
        return FetchPlan(way="local", files=0, nbytes=0, disk_bytes=0, keep=True, checked=False)
    free = disk.free_bytes(remote.folder) - _HEADROOM
    if disk.same_disk(remote.folder, root):
        free -= bank_bytes
    room = max(0, free if options.disk_budget is None else min(free, options.disk_budget))
    total, largest, everything = sum(needed.values()), max(needed.values()), sum(sizes.values())
    limit = "the disk budget" if options.disk_budget is not None and options.disk_budget <= free else "the free space"
    if options.fetch == "cache":
        if everything > room:
            raise OptionError(
                f"{checkpoint.name}: {gigabytes(everything)} are to be downloaded, {limit} is {gigabytes(room)}",
                hint="--fetch auto takes what fits: shards deleted behind, or byte ranges",
            )
        return FetchPlan(way="cache", files=len(sizes), nbytes=everything, disk_bytes=everything, keep=True, checked=True)
    fits = total <= room
    if options.keep and not fits:
        raise OptionError(
            f"{checkpoint.name}: --keep needs {gigabytes(total)}, {limit} is {gigabytes(room)}",
            hint="leave --keep out, or raise --disk-budget",
        )
    if options.fetch == "shards" and largest > room:
        raise OptionError(
            f"{checkpoint.name}: the largest shard has {gigabytes(largest)}, {limit} is {gigabytes(room)}",
            hint="--fetch ranges needs no disk",
        )
    if options.fetch == "ranges" or largest > room:
        wanted = {piece for weight in weights for source in weight.sources for piece in source.pieces if piece[0] in needed}
        nbytes = sum(end - begin for _, begin, end in wanted)
        return FetchPlan(way="ranges", files=len(needed), nbytes=nbytes, disk_bytes=0, keep=False, checked=False)
    keep = fits and options.keep is not False
    return FetchPlan(
        way="shards", files=len(needed), nbytes=total, disk_bytes=total if keep else min(total, room), keep=keep, checked=True
    )


def fetch_report(checkpoint: Checkpoint, plan: FetchPlan, waited: float) -> FetchReport:
    """How the bytes of the weights came so far, by ``plan``; a solver had nothing to do for ``waited`` seconds."""
    traffic = checkpoint.remote.traffic if checkpoint.remote is not None else None
    return FetchReport(
        way=plan.way,
        checked=plan.checked,
        nbytes=traffic.nbytes if traffic is not None else 0,
        requests=traffic.requests if traffic is not None else 0,
        retries=traffic.retries if traffic is not None else 0,
        waiting_seconds=round(waited, 4),
    )


@contextlib.contextmanager
def fetched(
    checkpoint: Checkpoint, weights: Sequence[WeightSpec], plan: FetchPlan, progress: ProgressCallback
) -> Iterator[Downloads]:
    """Carry a fetch plan out around the reads of ``weights``, which are made in this order."""
    remote = checkpoint.remote
    if remote is None or plan.way == "local":
        yield _NoDownloads()
        return
    try:
        if plan.way == "shards":
            budget = None if plan.keep else plan.disk_bytes
            with remote.shards([files_of(weight) for weight in weights], budget=budget, keep=plan.keep) as shards:
                yield shards
            return
        if plan.way == "cache":
            remote.download(lambda stage, done, total: progress(Progress(stage, done, total, "bytes")))
        yield _NoDownloads()
    except BaseException:
        remote.close()  # what is being asked for would only be waited for
        raise


def gigabytes(nbytes: int) -> str:
    """``nbytes`` for an error: in GB, or in MB where that would round to little."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.2f} MB"
