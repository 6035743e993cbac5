"""``verify``: is a bank what was published, and does it fit its model?"""

from __future__ import annotations

import os
from shlex import quote

import msgspec

from svdbank import cache
from svdbank.bank.afar import Afar
from svdbank.bank.layout import MANIFEST
from svdbank.bank.reading import Bank
from svdbank.building.checking import ANOTHER, Damage, examine, examine_parts, repair_command
from svdbank.building.sampling import Sample, draw
from svdbank.core.errors import DamageError, OptionError
from svdbank.core.places import far_bank
from svdbank.core.specs import ProgressCallback, Struct


class VerifyReport(Struct, frozen=True):
    """Outcome of a verification. ``sound`` is the verdict, ``next`` the command that helps when it is not.

    ``unrecorded`` are files that belong to no published part of the bank; no reader opens them. ``proven`` is how many weights' bases were
    measured against the model, ``sample`` which, where they were drawn.
    """

    path: str
    level: str
    files: int
    nbytes: int
    weights: int
    damage: tuple[Damage, ...]
    unrecorded: tuple[str, ...]
    sound: bool
    next: str | None
    proven: int = 0
    sample: Sample | None = None


def verify(
    source: str | os.PathLike[str],
    *,
    data: bool = False,
    model: str | os.PathLike[str] | None = None,
    sample: float | None = None,
    progress: ProgressCallback | None = None,
) -> VerifyReport:
    """Check a bank against its own records and, with ``model``, against the weights it was made from.

    The default looks at every file's presence and size and at all metadata. ``data`` hashes every byte. ``model`` reads each
    weight, compares its hash, and measures its stored basis: residual, orthogonality, and by one Cholesky factorisation that nothing
    smaller was missed (no SVD). ``sample`` is the share of each family's weights, drawn anew each time, that are measured: for a
    stranger's bank, before it is trusted.

    Damage is in the report, not an exception; errors are those of :func:`svdbank.open` (a bank without manifest or with an unknown
    format), of opening the model, and WrongBaseError for a model that the bank was not built from.
    """
    if sample is not None and model is None:
        raise OptionError("a sample of the weights is measured against their model", hint="--source MODEL --sample 5%")
    level = "source" if model is not None else "data" if data else "structure"
    far = far_bank(source)
    try:
        bank = cache.open(source) if far is None or cache.is_base(far) else cache.open_elsewhere(far)
    except DamageError as error:
        return _report(os.fspath(source), level, None, damage=(_unreadable(error, os.fspath(source)),), files=1)
    parts = far is None and isinstance(bank.files, Afar)
    if parts and model is None:
        level = "parts"
    examined = examine_parts(bank) if parts else examine(bank, data=data, progress=progress)
    damage, proven, drawn = examined.damage, 0, None
    if model is not None and not damage:
        from svdbank.building.proving import prove

        drawn = None if sample is None else draw(bank, sample)
        names = bank.names if drawn is None else drawn.names
        damage, proven = tuple(prove(bank, model, names, progress)), len(names)
    report = _report(
        os.fspath(source) if parts else bank.place,
        level,
        bank,
        damage,
        files=examined.files,
        nbytes=examined.nbytes,
        unrecorded=examined.unrecorded,
    )
    return msgspec.structs.replace(report, proven=proven, sample=drawn)


def _report(
    path: str,
    level: str,
    bank: Bank | None,
    damage: tuple[Damage, ...],
    *,
    files: int = 0,
    nbytes: int = 0,
    unrecorded: tuple[str, ...] = (),
) -> VerifyReport:
    return VerifyReport(
        path=path,
        level=level,
        files=files,
        nbytes=nbytes,
        weights=0 if bank is None else len(bank),
        damage=damage,
        unrecorded=unrecorded,
        sound=not damage,
        next=_next(path, bank, damage) if damage else None,
    )


def _unreadable(error: DamageError, place: str) -> Damage:
    """What makes a bank no bank: its manifest, or the index that this names."""
    name, sign, what = str(error).removeprefix(f"{place.rstrip('/')}/").partition(": ")
    return Damage(name, what) if sign and name.endswith(".json") and "/" not in name else Damage(MANIFEST, str(error))


def _next(path: str, bank: Bank | None, damage: tuple[Damage, ...]) -> str | None:
    """The command that helps; nobody can repair what lies elsewhere."""
    if damage[0].what == ANOTHER:
        return f"svdbank pull {quote(path)} takes that one"
    if bank is not None and isinstance(bank.files, Afar):
        return f"svdbank rm {quote(path)}" if far_bank(path) is None else None
    return repair_command(path) if far_bank(path) is None else None
