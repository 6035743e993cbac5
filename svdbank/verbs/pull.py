"""``pull``: a bank that lies elsewhere, whole or in part, brought to this disk."""

from __future__ import annotations

import os
from pathlib import Path
from shlex import quote
from typing import Literal, cast

from svdbank import cache
from svdbank.adapter.base import is_bank
from svdbank.bank.afar import Afar
from svdbank.bank.files import Folder
from svdbank.bank.index import read_manifest
from svdbank.bank.reading import Bank, open_bank
from svdbank.building.checking import examine
from svdbank.core.errors import BankError, BankNotFoundError, DamageError, OptionError
from svdbank.core.places import far_bank, refuse_empty
from svdbank.core.specs import ProgressCallback, Struct, ignore_progress
from svdbank.sharing.finding import check_named, with_found
from svdbank.sharing.pulling import lacking, open_there, pull_part, pull_whole


class PullReport(Struct, frozen=True):
    """What is on this disk now. ``place`` is the address with the commit where there is one, ``path`` the bank's folder, or of a part
    the folder of its chunks, which is no bank. ``rank`` and ``side`` are what is here, ``lacks`` what is not; ``fetched`` bytes came in
    ``requests``, ``size`` bytes lie here."""

    place: str
    path: str
    digest: str
    model: str
    revision: str | None
    weights: int
    rank: int | str
    side: str
    lacks: str | None
    fetched: int
    requests: int
    size: int


def pull(
    source: str,
    *,
    into: str | os.PathLike[str] | None = None,
    rank: int | None = None,
    side: Literal["both", "left"] | None = None,
    progress: ProgressCallback | None = None,
) -> PullReport:
    """Bring a bank from the Hub or an object store to this disk, and look at what stands there now.

    Parameters
    ----------
    source
        ``hf://org/name[@revision]`` or ``org/name[@revision]``; ``s3://…``, ``gs://…``, ``https://…``.
    into
        A folder for the whole bank, absent or empty; by default it goes into the cache, where its model's name finds it.
    rank, side
        Only the chunks of ranks up to ``rank``, of left vectors or of all: they are kept as parts, from which the bank's address is served
        without a request, and are not evicted. What else is asked for later is fetched then, or refused offline.

    Every byte is held to the manifest's digest before it counts. A whole bank appears in one step; told again after an interruption, it
    goes on. Raises what :func:`svdbank.open` raises for the address, OptionError for options that do not fit the bank, DamageError for
    bytes that are not those that were published, BankError where the place cannot be reached.
    """
    tell = progress or ignore_progress
    if into is not None and (rank is not None or side is not None):
        raise OptionError("a part of a bank is kept in the cache alone", hint="leave --into out, or --rank and --side")
    if into is not None:
        refuse_empty(into, "the bank's name", "leave --into out for a bank in the cache, or name a folder")
    if rank is not None and rank < 1:
        raise OptionError(f"rank {rank} is none", hint="--rank 16")
    try:
        bank = open_there(source)
    except BankNotFoundError as missing:
        raise with_found(missing, source, brings="svdbank pull") from missing.__cause__
    if rank is None and side is None:
        return _whole(bank, into, tell)
    if side == "both" and bank.side == "left":
        raise OptionError(f"{bank.place} holds left vectors only", hint="--side left")
    if rank is not None and rank > bank.rank:
        raise OptionError(f"{bank.place} stores ranks up to {bank.rank}, not {rank}", hint=f"--rank {bank.rank}")
    kept, of = bank.rank if rank is None else rank, side or cast(Literal["both", "left"], bank.side)
    pull_part(bank, kept, of, tell)
    files = cast(Afar, bank.files)
    return _report(
        bank, files.parts.root, rank=kept, side=of, lacks=lacking(bank, kept, of), size=cache.allocated_in(files.parts.root)
    )


def pulled(model: str | os.PathLike[str] | Bank, repository: str, progress: ProgressCallback | None) -> Bank:
    """The bank that ``--pull REPOSITORY`` names for a model, brought into the cache whole. WrongBaseError where it is of other weights:
    by the Hub's ids of their files before anything is fetched, or else by the weights themselves."""
    if isinstance(model, Bank) or is_bank(model) or far_bank(model) is not None:
        shown = model.place if isinstance(model, Bank) else os.fspath(model)
        raise OptionError(f"{shown} is a bank already", hint="leave --pull out, or name the model")
    compared = check_named(model, repository)
    bank = cache.open(pull(repository, progress=progress).path)
    if not compared:
        from svdbank.checkpoint import open_checkpoint
        from svdbank.sharing.bases import are_of

        with open_checkpoint(model) as checkpoint:
            are_of(checkpoint, bank, progress or ignore_progress)
    return bank


def _whole(bank: Bank, into: str | os.PathLike[str] | None, progress: ProgressCallback) -> PullReport:
    target = cache.given_output(into) or cache.pulled_output(bank.manifest)
    target = target.resolve()
    if not _is_here(bank, target):
        pull_whole(bank, target, progress)
    elif damage := examine(open_bank(target)).damage:
        raise DamageError(
            f"{target} is here already, and damaged: {damage[0].file}: {damage[0].what}",
            hint=f"svdbank repair {quote(str(target))} --from {quote(bank.place)}",
        )
    return _report(bank, target, rank=bank.manifest.options.rank, side=bank.side, lacks=None, size=cache.bytes_in(target))


def _is_here(bank: Bank, target: Path) -> bool:
    """Whether this bank stands at ``target``; OptionError where something else does."""
    cache.refuse_foreign_folder(target, "--into")
    if not target.is_dir() or not any(target.iterdir()):
        return False
    try:
        there = read_manifest(Folder(target)).digest
    except BankNotFoundError:
        raise OptionError(f"{target} is not empty", hint="name an empty folder with --into") from None
    except BankError:
        there = ""
    if there != bank.manifest.digest:
        raise OptionError(f"{target} holds another bank, or a damaged one", hint="name an empty folder with --into")
    return True


def _report(bank: Bank, path: Path, *, rank: int | str, side: str, lacks: str | None, size: int) -> PullReport:
    manifest, traffic = bank.manifest, cast(Afar, bank.files).source.traffic
    return PullReport(
        place=bank.place,
        path=str(path),
        digest=manifest.digest,
        model=manifest.base.name,
        revision=manifest.base.revision,
        weights=len(bank),
        rank=rank,
        side=side,
        lacks=lacks,
        fetched=traffic.nbytes,
        requests=traffic.requests,
        size=size,
    )
