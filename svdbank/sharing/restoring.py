"""A damaged bank on this disk, and the place elsewhere that holds its files: which of them are fetched, and put where they belong."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from svdbank import cache
from svdbank.bank.afar import Afar
from svdbank.bank.files import Folder
from svdbank.bank.index import data_files, parse_manifest, read_manifest, read_recorded
from svdbank.bank.layout import MANIFEST, FileRecord, Manifest
from svdbank.bank.parts import Parts, part_folders, read_origin
from svdbank.bank.reading import Bank
from svdbank.building.checking import Damage
from svdbank.building.repairing import WORKSHOP, move
from svdbank.core import disk
from svdbank.core.errors import BankError, DamageError, SvdbankError
from svdbank.core.places import far_bank
from svdbank.core.specs import Progress, ProgressCallback
from svdbank.sharing.pulling import fetch_files, open_there


def origin_of(root: Path, named: str | None, tell: ProgressCallback) -> Bank | None:
    """The bank elsewhere that ``named`` is the address of, as it is there now; else the one that the bank at ``root`` was pulled from, if
    the cache still knows. None, and a note, where that cannot be reached. Errors of an address that was named as :func:`svdbank.open`."""
    if named is not None:
        return open_there(named)
    for folder in part_folders(cache.parts_home()):
        origin, data = read_origin(folder), Parts(folder, 0).manifest()
        if origin is None or data is None:
            continue
        try:
            if not _is_of(root, parse_manifest(data, origin.place)) or (far := far_bank(origin.place)) is None:
                continue
            bank = cache.open_elsewhere(far, strict=True)
        except (SvdbankError, OSError) as error:
            _note_unreached(origin.place, error, tell)
            continue
        if bank.manifest.digest == origin.digest:
            return bank
    return None


def _note_unreached(place: str, error: Exception, tell: ProgressCallback) -> None:
    """Say that nothing comes from where the bank came from."""
    tell(Progress("repair", 0, 1, "note", f"nothing is fetched from {place}: {error}"))


def as_there(root: Path, far: Bank, why: str) -> tuple[Bank, list[Damage]]:
    """The bank at ``root``, whose manifest or index is lost, by those of ``far``; and as damage the manifest, where that is what is lost.

    BankError where it is another bank, as far as its manifest, or else its plans and the name of its index tell.
    """
    if not _is_of(root, far.manifest):
        raise BankError(
            f"{far.place} is not the bank that {root} was: their manifests, or else their plans and indexes, differ",
            hint="name the address that it came from, or leave --from out",
        )
    try:
        read_manifest(Folder(root))
    except SvdbankError:
        damage = [Damage(MANIFEST, why)]
    else:
        damage = []
    return Bank(Folder(root), far.manifest, far.index), damage


def _is_of(root: Path, manifest: Manifest) -> bool:
    """Whether the folder holds, or held, the bank of this manifest."""
    files = Folder(root)
    try:
        own = read_manifest(files)
    except SvdbankError:
        pass
    else:
        return own.digest == manifest.digest
    plans, indexes = ({path.name for path in root.glob(names)} for names in ("plan*.json", "index-*.json"))
    if not plans <= {*manifest.plans} or not indexes <= {manifest.index}:
        return False
    return any(
        _is_here(files, name, manifest.files[name]) for name in (*manifest.plans, manifest.index) if name in manifest.files
    )


def _is_here(files: Folder, name: str, record: FileRecord) -> bool:
    try:
        disk.safe_join(files.root, name, error=DamageError)
        read_recorded(files, name, record)
    except DamageError:
        return False
    return True


def fetchable(bank: Bank, far: Bank, damage: Sequence[Damage]) -> dict[str, FileRecord]:
    """The damaged files that the other place records as this bank does."""
    own, there = dict(_records(bank)), dict(_records(far))
    return {one.file: own[one.file] for one in damage if one.file in own and own[one.file] == there.get(one.file)}


def bring(root: Path, far: Bank, wanted: dict[str, FileRecord], *, manifest: bool, named: bool, tell: ProgressCallback) -> bool:
    """:func:`_bring`, True; where the place was not ``named`` an error of it is a note, and False."""
    try:
        _bring(root, far, wanted, manifest=manifest, progress=tell)
    except SvdbankError as error:
        if named:
            raise
        _note_unreached(far.place, error, tell)
        return False
    return True


def _bring(root: Path, far: Bank, wanted: dict[str, FileRecord], *, manifest: bool, progress: ProgressCallback) -> None:
    """Fetch files, and once all are the bytes recorded rename them over what stands there: the index last, then the ``manifest``.

    The caller holds the bank's lock. Raises DamageError for other bytes, BankError where the place cannot be reached or the disk is full;
    then nothing was replaced.
    """
    files = far.files
    assert isinstance(files, Afar)
    workshop = root / WORKSHOP
    if workshop.exists():
        disk.remove_tree(workshop)
    if (need := sum(record.size for record in wanted.values())) > (free := disk.free_bytes(root)):
        raise BankError(f"{root}: {need} bytes are to come, and {free} are free", hint="free some space")
    disk.make_dirs(workshop)
    index = far.manifest.index
    rest = {name: record for name, record in wanted.items() if name != index}
    try:
        fetch_files(files, rest, workshop, progress)
    except SvdbankError:
        disk.remove_tree(workshop)
        raise
    last = []
    if index in wanted:  # it was read when the place was opened
        disk.write_bytes(workshop / index, read_recorded(files, index, wanted[index]))
        last.append(index)
    if manifest:
        disk.write_bytes(workshop / MANIFEST, files.manifest)
        last.append(MANIFEST)
    for name in (*rest, *last):
        move(workshop / name, disk.safe_join(root, name, error=DamageError))
    disk.remove_tree(workshop)


def _records(bank: Bank) -> Iterator[tuple[str, FileRecord]]:
    yield from bank.manifest.files.items()
    for family in bank.index.families:
        yield from family.metadata.items()
        yield from data_files(family)
