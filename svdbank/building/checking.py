"""Is this bank what was published, and what stands in it?"""

from __future__ import annotations

import os
import shlex
import stat
from collections.abc import Iterator
from pathlib import Path

from svdbank.bank.index import data_files
from svdbank.bank.layout import LOG, MANIFEST, FileRecord
from svdbank.bank.reading import Bank
from svdbank.cache import open as open_source
from svdbank.core import disk
from svdbank.core.basis import unresolved_ranks
from svdbank.core.errors import DamageError, WrongBaseError
from svdbank.core.specs import Progress, ProgressCallback, Struct, quantised_formats

#: Worst residual, over ‖W‖_F, of a basis cast to the storage dtype: entries off by 2⁻²⁵, 2⁻¹², 2⁻⁹ of themselves move a product by at
#: most that much of ‖W‖; the rest is room.
_STORED_RESIDUAL = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 1.6e-2}


class FamilyInfo(Struct, frozen=True):
    """One family of a bank. Residual and orthogonality are the worst of its weights; σ are ranges over them.

    ``tied`` more weights are stored nowhere, because one of these with its sides exchanged serves them.
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


class BankInfo(Struct, frozen=True):
    """What a bank holds. ``unresolved`` counts (weight, rank) pairs whose subspace the data do not define to 1e-6.

    ``quantised`` counts the weights that the base stores as codes and scales, by format; the bank describes their values. ``tied`` maps
    the weights that share a decomposition, sides exchanged, to the weight that it is stored of: an output head to its embedding.
    """

    path: str
    model: str
    revision: str | None
    base_digest: str
    format: int
    rank: int | str
    side: str
    dtype: str
    weights: int
    nbytes: int
    families: tuple[FamilyInfo, ...]
    paths: dict[str, int]
    fallbacks: dict[str, tuple[str, ...]]
    unresolved: int
    quantised: dict[str, int]
    tied: dict[str, str]


class Damage(Struct, frozen=True):
    """One thing that is not as published."""

    file: str
    what: str


class VerifyReport(Struct, frozen=True):
    """Outcome of a verification. ``sound`` is the verdict, ``next`` the command that helps when it is not.

    ``unrecorded`` are files that belong to no published part of the bank; no reader opens them.
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


def info(source: str | os.PathLike[str]) -> BankInfo:
    """Describe a bank, or the cached bank of a model, from its index. Errors as :func:`svdbank.open`."""
    bank = open_source(source)
    families, paths, fallbacks = [], dict[str, int](), dict[str, tuple[str, ...]]()
    tied = {alias.name: alias.of for alias in bank.index.aliases}
    for family in bank.index.families:
        certificates = [weight.certificate for weight in family.weights]
        sigma: list[list[float]] = bank.coordinate(family.spec.name, "sigma").tolist()  # type: ignore[assignment]
        families.append(
            FamilyInfo(
                name=family.spec.name,
                kind=family.spec.kind,
                weights=len(family.weights),
                out_features=family.spec.out_features,
                in_features=family.spec.in_features,
                rank=family.spec.rank,
                residual=max(c.residual for c in certificates),
                orthogonality=max(c.orthogonality for c in certificates),
                condition=max((c.sigma_max / c.sigma_min if c.sigma_min > 0 else float("inf")) for c in certificates),
                sigma_min=min(c.sigma_min for c in certificates),
                sigma_max=max(c.sigma_max for c in certificates),
                unresolved=sum(
                    len(unresolved_ranks(values, weight.certificate.sigma_next, weight.certificate.sigma_max))
                    for values, weight in zip(sigma, family.weights, strict=True)
                ),
                tied=sum(of in family.spec.weights for of in tied.values()),
            )
        )
        for weight in family.weights:
            paths[weight.certificate.path] = paths.get(weight.certificate.path, 0) + 1
            if weight.certificate.tried:
                fallbacks[weight.name] = weight.certificate.tried
    manifest = bank.manifest
    return BankInfo(
        path=str(bank.path),
        model=manifest.base.name,
        revision=manifest.base.revision,
        base_digest=manifest.base_digest,
        format=manifest.format,
        rank=manifest.options.rank,
        side=manifest.options.side,
        dtype=manifest.options.dtype,
        weights=len(bank),
        nbytes=manifest.nbytes,
        families=tuple(families),
        paths=paths,
        fallbacks=fallbacks,
        unresolved=sum(family.unresolved for family in families),
        quantised=quantised_formats(bank[name].dtype for name in bank),
        tied=tied,
    )


def verify(
    source: str | os.PathLike[str],
    *,
    data: bool = False,
    model: str | os.PathLike[str] | None = None,
    progress: ProgressCallback | None = None,
) -> VerifyReport:
    """Check a bank against its own records and, with ``model``, against the weights it was made from.

    The default looks at every file's presence and size and at all metadata. ``data`` hashes every byte. ``model`` reads each
    weight, compares its hash, and measures the residual of the stored basis (a few products, no SVD).

    Damage is in the report, not an exception; errors are those of :func:`svdbank.open` (a bank without manifest or with an unknown
    format), of opening the model, and WrongBaseError for a model that the bank was not built from.
    """
    bank: Bank | None = None
    damage: list[Damage] = []
    unrecorded: list[str] = []
    files = nbytes = 0
    try:
        bank = open_source(source)
    except DamageError as error:
        damage.append(Damage(MANIFEST, str(error)))
    if bank is not None:
        recorded = dict(_recorded(bank))
        for done, (name, record) in enumerate(recorded.items()):
            whole = data or "/c/" not in name or record.chunk_bytes == 0
            damage += _examine(bank.path, name, record, hashed=whole)
            files += 1
            nbytes += record.size
            if progress is not None and whole:
                progress(Progress("verify", done + 1, len(recorded), "files", name))
        unrecorded, irregular = _unrecorded(bank.path, set(recorded))
        damage += irregular
        if model is not None and not damage:
            damage += _against_model(bank, model, progress)
    path = str(bank.path) if bank is not None else os.fspath(source)
    return VerifyReport(
        path=path,
        level="source" if model is not None else "data" if data else "structure",
        files=files,
        nbytes=nbytes,
        weights=0 if bank is None else len(bank),
        damage=tuple(damage),
        unrecorded=tuple(unrecorded),
        sound=not damage,
        next=None
        if not damage
        else f"svdbank rm {shlex.quote(path)}, then svdbank build MODEL -o {shlex.quote(path)}{_same_options(bank)}",
    )


def _same_options(bank: Bank | None) -> str:
    """The options that make a build repeat a bank, as far as they are not the defaults."""
    if bank is None:
        return ""
    options = bank.manifest.options
    given = {
        "rank": (options.rank, 128),
        "side": (options.side, "both"),
        "dtype": (options.dtype, "float32"),
        "principal": (options.principal, 0),
    }
    return "".join(f" --{name} {value}" for name, (value, default) in given.items() if value != default)


def _recorded(bank: Bank) -> Iterator[tuple[str, FileRecord]]:
    yield from bank.manifest.files.items()
    for family in bank.index.families:
        yield from family.metadata.items()
        yield from data_files(family)


def _examine(root: Path, name: str, record: FileRecord, *, hashed: bool) -> Iterator[Damage]:
    path = disk.safe_join(root, name, error=DamageError)
    try:
        status = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        yield Damage(name, "missing")
        return
    if not stat.S_ISREG(status.st_mode):
        yield Damage(name, "not a regular file")
    elif status.st_size != record.size:
        yield Damage(name, f"{status.st_size} bytes, recorded were {record.size}")
    elif hashed and disk.sha256_file(path) != record.sha256:
        yield Damage(name, "not the bytes that were published")


def _unrecorded(root: Path, recorded: set[str]) -> tuple[list[str], list[Damage]]:
    """Files in a bank that nothing records, and links or other things that may not be there at all.

    No reader ever opens an unrecorded file; a build or extension under way leaves them. The log,
    and names that begin with a dot at the top (locks, version control), are ordinary.
    """
    found: list[str] = []
    damage: list[Damage] = []
    for folder, folders, names in os.walk(root):
        if Path(folder) == root:
            folders[:] = [name for name in folders if not name.startswith(".")]
            names = [name for name in names if not name.startswith(".") and name not in (MANIFEST, LOG, "README.md")]
        for name in (*names, *folders):
            path = Path(folder, name)
            relative = path.relative_to(root).as_posix()
            mode = path.lstat().st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                if relative not in recorded:
                    damage.append(Damage(relative, "not a regular file or folder"))
            elif stat.S_ISREG(mode) and relative not in recorded:
                found.append(relative)
    return sorted(found), damage


def _against_model(bank: Bank, model: str | os.PathLike[str], progress: ProgressCallback | None) -> Iterator[Damage]:
    """Hashes of the base's weights, and the residual of each stored basis against its weight."""
    from svdbank.checkpoint import decomposable, open_checkpoint
    from svdbank.solver import residual_check

    with open_checkpoint(model) as checkpoint:
        specs = {weight.name: weight for weight in decomposable(checkpoint, (".*",))[0]}
        for done, name in enumerate(bank):
            basis = bank[name]
            spec = specs.get(name)
            if spec is None or (spec.out_features, spec.in_features) != (basis.out_features, basis.in_features):
                raise WrongBaseError(
                    f"{bank.path} was built from another model: {checkpoint.name} has no {name} of "
                    f"{basis.out_features}x{basis.in_features}",
                    hint=f"verify it against {bank.manifest.base.name}",
                )
            weight, sha256 = checkpoint.read_hashed(spec)
            if sha256 != basis.source_sha256:
                raise WrongBaseError(
                    f"{bank.path} was built from another model: {name} of {checkpoint.name} has other bytes",
                    hint=f"verify it against {bank.manifest.base.name}",
                )
            right = basis.right(basis.rank).mT if bank.side == "both" else None
            residual = residual_check(weight, basis.left(basis.rank).mT, right, basis.sigma(basis.rank))
            if not residual <= _STORED_RESIDUAL[bank.dtype]:
                yield Damage(name, f"the stored basis misses the weight by {residual:.1e} of its norm")
            if progress is not None:
                progress(Progress("verify against model", done + 1, len(bank), "weights", name))
