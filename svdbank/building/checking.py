"""Is a bank what was published, does it fit its model, and how exact are its families?"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from svdbank.bank.afar import Afar
from svdbank.bank.direct import Direct
from svdbank.bank.files import Files, Folder
from svdbank.bank.index import check_vectors, data_files, read_manifest, read_recorded
from svdbank.bank.layout import CARD, LEGAL, LOG, MANIFEST, FamilyIndex, FileRecord
from svdbank.bank.reading import Bank
from svdbank.bank.spectrum import rank_marks
from svdbank.bank.zarr_metadata import checked_metadata
from svdbank.core import disk
from svdbank.core.basis import unresolved_ranks
from svdbank.core.errors import BankError, DamageError
from svdbank.core.specs import Progress, ProgressCallback, Struct

#: What is wrong with a manifest that is a bank's, and not this one's.
ANOTHER = "of another bank than when this address was last looked at"

#: Bytes hashed at a time.
_PIECE = 8 << 20


class FamilyInfo(Struct, frozen=True):
    """One family of a bank. Residual and orthogonality are the worst of its weights; σ are ranges over them.

    ``curve`` holds (i, median over the weights of σ_i / σ_max), σ_1 the smallest. ``tied`` more weights are stored nowhere, because one
    of these with its sides exchanged serves them.
    """

    name: str
    kind: str
    weights: int
    out_features: int
    in_features: int
    rank: int
    residual: float
    orthogonality: float
    condition: float
    sigma_min: float
    sigma_max: float
    unresolved: int
    tied: int = 0
    curve: tuple[tuple[int, float], ...] = ()


class Damage(Struct, frozen=True):
    """One thing that is not as published."""

    file: str
    what: str


class Examination(Struct, frozen=True):
    """What :func:`examine` found: how many files of how many bytes are recorded, what is not as published, and what nothing records."""

    files: int
    nbytes: int
    damage: tuple[Damage, ...]
    unrecorded: tuple[str, ...]


def family_info(bank: Bank, family: FamilyIndex) -> FamilyInfo:
    """Worst figures and ranges of a family's certificates; DamageError where its σ are not as published."""
    spec = family.spec
    certificates = [weight.certificate for weight in family.weights]
    sigma: list[list[float]] = bank.coordinate(spec.name, "sigma").tolist()  # type: ignore[assignment]
    return FamilyInfo(
        name=spec.name,
        kind=spec.kind,
        weights=len(family.weights),
        out_features=spec.out_features,
        in_features=spec.in_features,
        rank=spec.rank,
        residual=max(c.residual for c in certificates),
        orthogonality=max(c.orthogonality for c in certificates),
        condition=max((c.sigma_max / c.sigma_min if c.sigma_min > 0 else float("inf")) for c in certificates),
        sigma_min=min(c.sigma_min for c in certificates),
        sigma_max=max(c.sigma_max for c in certificates),
        unresolved=sum(
            len(unresolved_ranks(values, c.sigma_next, c.sigma_max)) for values, c in zip(sigma, certificates, strict=True)
        ),
        tied=sum(alias.of in spec.weights for alias in bank.index.aliases),
        curve=tuple(
            (mark, median(values[mark - 1] / (c.sigma_max or 1.0) for values, c in zip(sigma, certificates, strict=True)))
            for mark in rank_marks(spec.rank)
        ),
    )


def examine(bank: Bank, *, data: bool = False, progress: ProgressCallback | None = None) -> Examination:
    """Every recorded file's presence and size, and the bytes of all metadata; with ``data`` the bytes of every file. Of a bank elsewhere
    as the place has them now."""
    files = Direct(bank.files) if isinstance(bank.files, Afar) else bank.files
    recorded = dict(_recorded(bank))
    damage = list(_same_manifest(files, bank)) if isinstance(files, Direct) else []
    if any(one.what == ANOTHER for one in damage):  # of which nothing else is as here either
        return Examination(len(recorded), sum(record.size for record in recorded.values()), tuple(damage), ())
    hashed = [name for name, record in recorded.items() if data or "/c/" not in name or record.chunk_bytes == 0]
    for name in recorded.keys() - set(hashed):
        damage += _examine_file(files, name, recorded[name], hashed=False)
    for done, name in enumerate(files.in_batches(hashed) if isinstance(files, Direct) else hashed):
        damage += _examine_file(files, name, recorded[name], hashed=True)
        if progress is not None:
            progress(Progress("verify", done + 1, len(hashed), "files", name))
    if not damage:
        damage += _contradictions(bank)
    listed = files if isinstance(files, Direct) else Folder(bank.path)
    unrecorded, irregular = _unrecorded(listed, set(recorded))
    nbytes = sum(record.size for record in recorded.values())
    order = {name: place for place, name in enumerate(recorded)}
    damage.sort(key=lambda one: order.get(one.file, -1))
    return Examination(len(recorded), nbytes, (*damage, *irregular), tuple(unrecorded))


def examine_parts(bank: Bank) -> Examination:
    """What is on this disk of a bank elsewhere: how many files and bytes are held, and what of them is not as recorded. Asks nothing."""
    if not isinstance(bank.files, Afar):
        raise BankError(f"{bank.place} is on this disk, whole")
    held, damage = list(bank.files.held()), list[Damage]()
    for name, _, wrong in held:
        damage += [Damage(name, what) for what in wrong]
    return Examination(len(held), sum(size for _, size, _ in held), tuple(damage), ())


def _same_manifest(files: Direct, bank: Bank) -> Iterator[Damage]:
    try:
        if read_manifest(files).digest != bank.manifest.digest:
            yield Damage(MANIFEST, ANOTHER)
    except BankError as error:
        yield Damage(MANIFEST, str(error).removeprefix(f"{files.place}/{MANIFEST}: "))


def _contradictions(bank: Bank) -> Iterator[Damage]:
    """Metadata whose hashes fit, and which another Zarr reader would believe, but which say what format 1 does not."""
    for family in bank.index.families:
        for name, record in family.metadata.items():
            array = name.split("/")[1]
            try:
                if array in family.files:
                    check_vectors(bank.files, [(family, array)], bank.manifest.options)
                elif name.endswith("zarr.json"):
                    checked_metadata(read_recorded(bank.files, name, record), where=f"{bank.files.place}/{name}")
            except DamageError as error:
                yield Damage(name, str(error).removeprefix(f"{bank.files.place}/{name}: "))


def repair_command(path: str) -> str:
    """The command that puts a damaged bank in order."""
    return f"svdbank repair {shlex.quote(path)} --source MODEL"


def _recorded(bank: Bank) -> Iterator[tuple[str, FileRecord]]:
    yield from bank.manifest.files.items()
    for family in bank.index.families:
        yield from family.metadata.items()
        yield from data_files(family)


def _examine_file(files: Files, name: str, record: FileRecord, *, hashed: bool) -> Iterator[Damage]:
    disk.safe_join(Path(), name, error=DamageError)
    try:
        size = files.size(name)
        if size != record.size:
            yield Damage(name, f"{size} bytes, recorded were {record.size}")
        elif hashed and _sha256(files, name, size) != record.sha256:
            yield Damage(name, "not the bytes that were published")
    except FileNotFoundError:
        yield Damage(name, "missing")
    except DamageError as error:
        yield Damage(name, str(error).removeprefix(f"{files.place}/{name}: "))


def _sha256(files: Files, name: str, size: int) -> str:
    digest = hashlib.sha256()
    for start in range(0, size, _PIECE):
        digest.update(files.read_many([(name, start, min(start + _PIECE, size))])[0])
    return digest.hexdigest()


def _unrecorded(folder: Folder | Direct, recorded: set[str]) -> tuple[list[str], list[Damage]]:
    """Files in a bank that nothing records, and links or other things that may not be there at all.

    No reader ever opens an unrecorded file; a build or extension under way leaves them. The manifest, the log and a README
    are ordinary.
    """
    unrecorded: list[str] = []
    damage: list[Damage] = []
    for name, is_regular in folder.names():
        if name in recorded or name in (MANIFEST, LOG, CARD) or LEGAL.fullmatch(name):
            continue
        if is_regular:
            unrecorded.append(name)
        else:
            damage.append(Damage(name, "not a regular file or folder"))
    return sorted(unrecorded), damage
