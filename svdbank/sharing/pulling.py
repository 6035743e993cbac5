"""A bank that lies elsewhere brought to this disk: whole, as a bank, or the chunks of some ranks, as parts."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Literal

from svdbank import cache
from svdbank.bank.afar import Afar
from svdbank.bank.chunks import read_chunks
from svdbank.bank.index import data_files, read_all_recorded
from svdbank.bank.layout import CARD, LEGAL, MANIFEST, FileRecord
from svdbank.bank.parts import Brought
from svdbank.bank.reading import Bank, open_bank
from svdbank.bank.sources import OfflineError, read_all
from svdbank.core import disk
from svdbank.core.errors import BankError, BankNotFoundError, DamageError
from svdbank.core.locks import locked
from svdbank.core.places import far_bank, refuse_empty
from svdbank.core.specs import Progress, ProgressCallback, SourceFile

#: What a copy keeps that belongs to no digest, where a place has no listing: the card, and the usual names of what push sends of the
#: base's licence. The largest such file.
_LEGAL_NAMES = ("LICENSE", "LICENCE", "NOTICE", "COPYING", "USE_POLICY")
_BESIDE = (CARD, *(f"{name}{end}" for name in _LEGAL_NAMES for end in ("", ".md", ".txt")))
_BESIDE_BYTES = 4 << 20

#: Small files of a family that its lookups read.
_COORDINATES = ("sigma", "probe")


def pull_whole(bank: Bank, target: Path, progress: ProgressCallback) -> None:
    """Copy a bank to ``target``, which is absent or empty and appears whole: every file is the bytes that its record says.

    It grows in a hidden folder beside ``target``, under the writer's lock. What a run that was stopped left there is hashed and kept.
    Raises DamageError for bytes that are not those that were published, BankError where the place cannot be reached or the disk is full.
    """
    files = _afar(bank)
    work = target.with_name(f".{target.name}.pull{disk.TEMPORARY}")
    folder = work / "new"
    disk.make_dirs(target.parent)
    try:
        with locked(work):
            disk.make_dirs(folder)
            left = dict(_left(bank, folder, progress))
            need = sum(record.size for record in left.values())
            if need > (free := disk.free_bytes(folder)):
                raise BankError(
                    f"{target}: {need} bytes are to come, and {free} are free",
                    hint="free some space, or name another disk with --into",
                )
            fetch_files(files, left, folder, progress)
            for name, size in files.source.sizes(_BESIDE).items():
                if (name == CARD or LEGAL.fullmatch(name)) and size <= _BESIDE_BYTES:
                    disk.write_bytes(folder / name, files.source.whole(name, _BESIDE_BYTES))
            disk.write_bytes(folder / MANIFEST, files.manifest)
            open_bank(folder)
            disk.replace(folder, target)
            disk.fsync_dir(work)
    finally:
        disk.remove_empty(work)


def pull_part(bank: Bank, rank: int, side: Literal["both", "left"], progress: ProgressCallback) -> None:
    """Have the chunks of ranks up to ``rank`` on this disk, of the left vectors or of both, with what lookups read beside them.

    ``bank`` was opened ``strict``. They are not evicted. Errors as :func:`pull_whole`; what had come stays.
    """
    files = _afar(bank)
    arrays: tuple[Literal["left", "right"], ...] = ("left",) if side == "left" else ("left", "right")
    reads = [read for array in arrays for read in bank.shard_reads(array, rank)]
    total = sum(len(read.rows) * read.chunks * read.record.chunk_bytes for read in reads)
    if total > (free := disk.free_bytes(files.parts.root)):  # what is here already counts too: it is little beside a disk
        raise BankError(f"{files.parts.root}: up to {total} bytes are to come, and {free} are free", hint="free some space")
    files.parts.note(Brought(rank, side, whole=False))
    names = [f"{array}/zarr.json" for array in arrays]
    names += [f"{array}/{part}" for array in _COORDINATES for part in ("zarr.json", "c/0/0")]
    read_all_recorded(
        files,
        [
            (path, family.metadata[path])
            for family in bank.index.families
            for path in (f"{family.spec.name}/{name}" for name in names)
            if path in family.metadata
        ],
    )
    done = 0
    for read, _ in zip(reads, read_chunks(files, reads), strict=True):
        done += len(read.rows) * read.chunks * read.record.chunk_bytes
        progress(Progress("pull", done, total, "bytes", read.file))
    # Another process may have made room before it saw what is brought.
    read_again = [read for read in reads if not files.parts.vectors(read.file).exists()]
    for _ in read_chunks(files, read_again):
        pass
    files.parts.note(Brought(rank, side, whole=True))


def lacking(bank: Bank, rank: int, side: str) -> str | None:
    """What of a bank is beyond ranks up to ``rank`` of ``side``; None where that is all."""
    beyond = [f"ranks {rank + 1} to {bank.rank}"] if bank.rank > rank else []
    if bank.side == "both" and side == "left":
        beyond.append("right vectors")
    if any(family.spec.principal for family in bank.index.families):
        beyond.append("the largest triplets")
    return ", ".join(beyond) or None


def open_there(address: str) -> Bank:
    """The bank at ``hf://org/name[@revision]``, ``org/name[@revision]``, ``s3://…``, ``gs://…`` or ``https://…`` as it is there now;
    offline as it was when it was last looked at."""
    refuse_empty(address, "the bank's name", "name it as hf://org/name")
    far = far_bank(address) or far_bank(f"hf://{address}")
    assert far is not None  # an hf:// address is one, or an error
    try:
        return cache.open_elsewhere(far, anew=True, strict=True)
    except OfflineError:
        return cache.open_elsewhere(far, strict=True)


def _afar(bank: Bank) -> Afar:
    if not isinstance(bank.files, Afar):
        raise BankError(f"{bank.place} is on this disk already")
    return bank.files


def _left(bank: Bank, folder: Path, progress: ProgressCallback) -> Iterator[tuple[str, FileRecord]]:
    """The files that are not in ``folder`` as they are recorded; what else stands there is removed."""
    recorded = dict(bank.manifest.files)
    for family in bank.index.families:
        recorded |= family.metadata
        recorded.update(data_files(family))
    taken = {*recorded, MANIFEST}
    for name in recorded:
        if name == MANIFEST or any(str(above) in taken for above in PurePosixPath(name).parents):
            raise DamageError(f"{bank.place}: {name[:200]!r} stands below a file, or is the manifest")
    for place, folders, names in os.walk(folder):
        for entry in (*names, *folders):
            path = Path(place, entry)
            if (path.is_symlink() or not path.is_dir()) and path.relative_to(folder).as_posix() not in recorded:
                disk.unlink(path)
    for done, (name, record) in enumerate(recorded.items()):
        path = disk.safe_join(folder, name, error=DamageError)
        if path.is_symlink() or path.exists():
            if path.is_file() and not path.is_symlink() and path.stat().st_size == record.size:
                progress(Progress("check what is here", done, len(recorded), "files", name))
                if disk.sha256_file(path) == record.sha256:
                    continue
            disk.unlink(path)
        yield name, record


def fetch_files(files: Afar, left: dict[str, FileRecord], folder: Path, progress: ProgressCallback) -> None:
    """Write each file once its bytes are those recorded; one that comes wrong is asked for once more."""
    total, done = sum(record.size for record in left.values()), 0
    wanted = [(SourceFile(name, record.size, record.sha256), 0, record.size) for name, record in left.items()]
    for part, data in zip(wanted, _missing_named(files, read_all(files.source, wanted)), strict=True):
        file = part[0]
        if hashlib.sha256(data).hexdigest() != file.identity:
            data = next(_missing_named(files, read_all(files.source, [part])))
            if hashlib.sha256(data).hexdigest() != file.identity:
                raise DamageError(
                    f"{files.place}/{file.name}: not the bytes that were published", hint="tell whoever published the bank"
                )
        path = folder / file.name
        disk.make_dirs(path.parent)
        disk.write_bytes(path, data)
        done += file.size
        progress(Progress("pull", done, total, "bytes", file.name))


def _missing_named(files: Afar, data: Iterator[bytes]) -> Iterator[bytes]:
    """A file that is not there is damage: the index records it."""
    try:
        yield from data
    except BankNotFoundError:
        raise
    except FileNotFoundError as cause:
        raise DamageError(f"{cause}: missing", hint="tell whoever published the bank") from cause
