"""Where banks live when no path is given, and how one is found again."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, overload

from svdbank.adapter.documents import Documents
from svdbank.bank.afar import open_afar
from svdbank.bank.claims import refuse_claimed
from svdbank.bank.files import Folder, read_regular
from svdbank.bank.index import read_manifest
from svdbank.bank.layout import LOG, MANIFEST, Manifest
from svdbank.bank.parts import allocated, read_origin, remembered
from svdbank.bank.reading import Bank, open_bank
from svdbank.bank.zarr_metadata import checked_metadata
from svdbank.core import disk
from svdbank.core.errors import (
    BankError,
    BankNotFoundError,
    DamageError,
    LockedError,
    OptionError,
    SvdbankError,
    WrongBaseError,
)
from svdbank.core.locks import locked
from svdbank.core.places import InStore, Nowhere, OnDisk, OnHub, far_bank, locate, refuse_address, refuse_empty
from svdbank.core.specs import BuildOptions, Plan, from_json

if TYPE_CHECKING:
    from svdbank.checkpoint import Checkpoint

#: Its time says when a cached bank was last opened. It belongs to no digest; readers ignore names that begin with a dot.
_USED = ".used"

#: Where a limit of the parts of banks that lie elsewhere is named, and how.
PARTS_LIMIT = "SVDBANK_PARTS_LIMIT"
_SIZE = re.compile(r"(\d{1,9}(?:\.\d{1,3})?)\s*([kmgtKMGT]?)[bB]?")

#: A folder's name may have 255 bytes, and twelve digits of a hash follow.
_LONGEST_SLUG = 200


def home() -> Path:
    """Folder of svdbank's own files: ``SVDBANK_HOME``, else a folder in huggingface_hub's assets cache."""
    if own := os.environ.get("SVDBANK_HOME"):
        return Path(own).expanduser()
    from huggingface_hub.constants import HF_ASSETS_CACHE

    return Path(HF_ASSETS_CACHE) / "svdbank"


def parts_home() -> Path:
    """Folder of the parts of banks that lie elsewhere."""
    return home() / "parts"


def is_parts(path: Path) -> bool:
    """True for a folder of parts in the cache. One elsewhere is not taken for one: it would name an address that nobody here asked for."""
    return not path.is_symlink() and path.is_dir() and path.resolve().parent == parts_home().resolve() and path.name[:1] != "."


def parts_limit() -> int:
    """Bytes of parts that may stay on this disk, those brought by ``pull`` not counted: ``SVDBANK_PARTS_LIMIT``, else 20 GB."""
    text = os.environ.get(PARTS_LIMIT, "").strip()
    found = _SIZE.fullmatch(text or "20GB")
    if found is None:
        raise OptionError(f"{PARTS_LIMIT}={text[:40]!r} is no size", hint=f"{PARTS_LIMIT}=20GB, 500MB, or 0 to keep nothing")
    return int(float(found[1]) * 1000 ** ("", "k", "m", "g", "t").index(found[2].lower()))


def model_folder(checkpoint: Checkpoint) -> Path:
    """Where the cached banks of a checkpoint lie: named for people, told apart by the identity of its weight files."""
    slug = re.sub(r"[^A-Za-z0-9._-]+", "--", checkpoint.name).strip("-.")[:_LONGEST_SLUG] or "model"
    return home() / "banks" / f"{slug}-{checkpoint.cache_key[:12]}"


def default_output(checkpoint: Checkpoint, options: BuildOptions) -> Path:
    """Where a bank goes when no path is given: below its model's folder, by what is stored."""
    suffix = f"-p{options.principal}" if options.principal else ""
    return model_folder(checkpoint) / f"r{options.rank}-{options.side}-{options.dtype}{suffix}"


def given_output(output: str | os.PathLike[str] | None) -> Path | None:
    """The bank's folder that an ``output=`` argument names, None where it names none; OptionError for an empty name."""
    if output is None:
        return None
    refuse_empty(output, "the bank's name", "leave -o out for a bank in the cache, or name a folder")
    refuse_address(output)
    return disk.expanded(output)


def refuse_foreign_folder(root: Path, option: str = "-o") -> None:
    """OptionError for a place where no bank can be written, or where something else stands. ``option`` names another place."""
    if root.is_symlink() and not root.exists():
        raise OptionError(
            f"{root} is a link to {root.readlink()}, which is not there", hint=f"choose another place with {option}"
        )
    above = next((parent for parent in (root, *root.parents) if parent.exists()), Path())
    if not above.is_dir():
        raise OptionError(f"{above} is a file, not a folder for a bank", hint=f"choose another place with {option}")
    if above == root and not (root / MANIFEST).exists() and not (root / "plan.json").exists():
        ours = (LOG, *(path.name for path in root.glob("sources-*.json")))  # the last is what a build writes before its plan
        strangers = sorted(path.name for path in root.iterdir() if not path.name.startswith(".") and path.name not in ours)
        if strangers:
            raise OptionError(
                f"{root} is not empty and no bank (it holds {', '.join(strangers[:3])})",
                hint=f"choose an empty folder with {option}",
            )


def open(source: str | os.PathLike[str]) -> Bank:
    """Open a bank by its folder or address, or the cached bank of a model by the model's name or folder.

    ``hf://org/name[@revision]``, ``s3://…``, ``gs://…`` and ``https://…`` are banks elsewhere: only what is asked of them is fetched, held
    to the index and kept on this disk (:func:`parts_limit`). A branch, or an address without commits, means what it meant when it was
    first opened, until ``svdbank pull`` looks at it anew. ``hf://`` before a model whose bank is in the cache means
    that bank. Of several cached banks of one model the one that holds most is taken: largest rank, both sides, then the most weights.
    Raises BankNotFoundError where there is none, OptionError for an empty name or an address that is none.
    """
    refuse_empty(source, "the bank's name", "name a bank's folder or a model; svdbank ls shows the banks there are")
    far = far_bank(source)
    if far is not None and not is_base(far):
        if (copy := _pulled(far)) is None:
            return open_elsewhere(far)
        mark_used(copy)
        return open_bank(copy)
    place = locate(os.fspath(source))
    candidates: list[tuple[Path, Manifest]] = []
    if isinstance(place, OnDisk):
        path = place.path
        if is_parts(path) and (origin := read_origin(path)) is not None and (far := far_bank(origin.place)) is not None:
            return open_elsewhere(far)
        if (path / MANIFEST).is_file() or (path / "plan.json").is_file():
            if home() / "banks" in path.absolute().parents:
                mark_used(path)
            return open_bank(path)
        if not (path.is_file() or (path / "config.json").is_file() or any(path.glob("*.safetensors"))):
            return open_bank(path)
        from svdbank.checkpoint import open_checkpoint

        with open_checkpoint(path) as checkpoint:
            candidates = list(_published(bank_folders(model_folder(checkpoint))))
    elif isinstance(place, OnHub):
        commit = _commit(place)
        candidates = [
            (folder, manifest)
            for folder, manifest in _published(bank_folders())
            if manifest.base.name == place.repository
            # A local model is found by its folder: its name alone could be that of another one.
            and manifest.base.revision is not None
            and manifest.base.revision.startswith(commit)
        ]
    if isinstance(place, Nowhere) and place.is_path and "/" in place.text:  # a word alone may be a model of the Hub
        raise BankNotFoundError(f"{str(source)!r}: no such path", hint="svdbank ls shows the banks there are")
    if not candidates:
        is_far = isinstance(place, OnHub) and remembered(parts_home(), f"hf://{place}") is not None
        raise BankNotFoundError(
            f"no bank of {str(source)!r} in {home() / 'banks'}",
            hint=f"as a bank on the Hub it is named hf://{place}"
            if is_far
            else f"svdbank build {shlex.quote(os.fspath(source))}",
        )
    revisions = {manifest.base.revision for _, manifest in candidates}
    if len(revisions) > 1:
        raise BankError(
            f"{str(source)!r} has banks of {len(revisions)} revisions",
            hint=f"name one: {shlex.quote(str(source))}@{sorted(map(str, revisions))[0]}",
        )
    best, _ = max(candidates, key=lambda entry: _richness(entry[1]))
    mark_used(best)
    return open_bank(best)


def open_elsewhere(far: OnHub | InStore, *, anew: bool = False, strict: bool = False) -> Bank:
    """Open a bank by its address, also where a copy of it is here; see :func:`svdbank.bank.afar.open_afar`."""
    bank = open_afar(far, parts_home(), parts_limit(), anew=anew, strict=strict)
    mark_used(parts_home() / bank.manifest.digest[:32])
    return bank


def _pulled(far: OnHub | InStore) -> Path | None:
    """The whole copy in the cache of what an address meant when it was last looked at."""
    before = remembered(parts_home(), f"hf://{far}" if isinstance(far, OnHub) else far.address)
    if before is None:
        return None
    return next((folder for folder, manifest in _published(bank_folders()) if manifest.digest == before[1]), None)


def pulled_output(manifest: Manifest) -> Path:
    """Where a bank that was pulled whole goes: below a folder of its base, by what is stored, told apart by its digest."""
    slug = re.sub(r"[^A-Za-z0-9._-]+", "--", manifest.base.name).strip("-.")[:_LONGEST_SLUG] or "model"
    options = manifest.options
    suffix = f"-p{options.principal}" if options.principal else ""
    name = f"r{options.rank}-{options.side}-{options.dtype}{suffix}-{manifest.digest[:8]}"
    return home() / "banks" / f"{slug}-{manifest.base_digest[:12]}" / name


def is_base(far: OnHub | InStore) -> bool:
    """True for a repository that is a model whose bank is in the cache, and not a bank itself."""
    return isinstance(far, OnHub) and any(manifest.base.name == far.repository for _, manifest in _published(bank_folders()))


@overload
def opened(bank: Bank | str | os.PathLike[str]) -> Bank: ...
@overload
def opened(bank: Bank | str | os.PathLike[str] | None) -> Bank | None: ...
def opened(bank: Bank | str | os.PathLike[str] | None) -> Bank | None:
    """What a ``bank=`` argument names: a bank as it is, else what :func:`open` finds; None stays None."""
    return bank if bank is None or isinstance(bank, Bank) else open(bank)


def recorded_bank(adapter: Documents, kind: str) -> Bank:
    """The cached bank of the base that an adapter folder, PEFT's or a slim one, records; ``kind`` is what needs it.

    Raises :class:`BankError` where there is none, :class:`WrongBaseError` where it is of other weights than the adapter says.
    """
    needs = f"{adapter.path}: {kind} needs the bank of the adapter's base"
    bases = adapter.base_names(kind)
    if not bases:
        raise BankError(f"{needs}, which it does not record", hint="--bank BANK, or the model's name if it is cached")
    failed: SvdbankError | None = None
    for base in bases:
        try:
            bank = open(base)
        except SvdbankError as cause:
            failed = failed or cause
            continue
        if adapter.base.is_of(bank) is False:
            raise WrongBaseError(
                f"{adapter.path}: its base is {base}, whose cached bank {bank.place} is of other weights",
                hint="--bank BANK of its base",
            )
        return bank
    raise BankError(
        f"{needs} ({failed}); --bank names one elsewhere", hint=failed.hint if failed is not None else None
    ) from failed


def remove(root: Path) -> int:
    """Delete a bank's folder and return the bytes freed; LockedError where somebody writes into it or has claimed a shard.

    The folder leaves its name, and is no bank any more, in one step before anything in it goes: a build that starts meanwhile makes a new
    one, with a lock of its own. What a run that was killed then leaves is removed by the next one (:func:`remove_left`).
    """
    freed = remove_left(root)
    with locked(root):
        refuse_claimed(root)
        freed += bytes_in(root)
        aside = _aside(root)
        disk.replace(root, aside)
        disk.remove_tree(aside)
    return freed


def remove_left(root: Path) -> int:
    """Finish what a killed :func:`remove` of this place left; the bytes freed, 0 where there is nothing."""
    aside, freed = _aside(root), 0
    if aside.is_dir() and not aside.is_symlink():
        with locked(aside):  # LockedError where another one is at it now
            freed = bytes_in(aside)
            disk.remove_tree(aside)
    return freed


def left_of(root: Path) -> bool:
    """True where a killed :func:`remove` left something of a bank of this name."""
    return _aside(root).is_dir()


def _aside(root: Path) -> Path:
    """Where a bank goes to be deleted: always the same place for one name, so that it is found again."""
    return root.with_name(
        f".{hashlib.sha256(root.name.encode('utf-8', 'surrogateescape')).hexdigest()[:16]}.rm{disk.TEMPORARY}"
    )


def bytes_in(folder: Path) -> int:
    """Bytes of all files in a folder. What goes meanwhile counts nothing."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(f"{place}/{name}").st_size
    return total


def allocated_in(folder: Path) -> int:
    """Bytes that the files in a folder take on the disk: of files with holes only what was written."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += allocated(os.lstat(f"{place}/{name}"))
    return total


def mark_used(root: Path) -> None:
    """Note that a cached bank is used now, in a hidden file: times of access change when it is only listed, or never."""
    with contextlib.suppress(OSError):
        descriptor = os.open(
            root / _USED, os.O_WRONLY | os.O_CREAT | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0), 0o666
        )
        try:
            os.utime(descriptor)
        finally:
            os.close(descriptor)


def last_used(root: Path) -> float:
    """When a bank was last opened or built, in seconds since 1970; of an unfinished or damaged one, when it last changed."""
    latest = 0.0
    for path in (root / _USED, root / MANIFEST, root / "plan.json", root / LOG):
        with contextlib.suppress(OSError):
            latest = max(latest, path.lstat().st_mtime)
    return latest or root.lstat().st_mtime


def left_in_cache(before: float) -> list[Path]:
    """What killed removals left in the cache, and what pulls that were stopped had brought when they last wrote, ``before`` that time."""
    left = [*(home() / "banks").glob(f"*/.*.rm{disk.TEMPORARY}"), *parts_home().glob(f".*.rm{disk.TEMPORARY}")]
    left += [path for path in (home() / "banks").glob(f"*/.*.pull{disk.TEMPORARY}") if _last_written(path) <= before]
    return [path for path in left if path.is_dir() and not path.is_symlink()]


def _last_written(folder: Path) -> float:
    """When something in a folder last changed, in seconds since 1970."""
    latest = 0.0
    for place, _, names in os.walk(folder):
        for name in ("", *names):
            with contextlib.suppress(OSError):
                latest = max(latest, os.lstat(f"{place}/{name}").st_mtime)
    return latest


def finish_removal(aside: Path, *, dry_run: bool) -> int:
    """Delete what a killed removal left; the bytes, also where ``dry_run`` leaves them. 0 where another process is at it."""
    if dry_run:
        return bytes_in(aside)
    with contextlib.suppress(LockedError), locked(aside):
        freed = bytes_in(aside)
        disk.remove_tree(aside)
        return freed
    return 0


def is_bank(root: Path) -> bool:
    """True for a folder that svdbank made, however damaged: by its root metadata, or by a plan. Names of files alone prove nothing."""
    try:
        metadata = checked_metadata(read_regular(root / "zarr.json"), where=str(root))
        if "svdbank" in metadata.attributes:
            return True
    except (DamageError, FileNotFoundError):
        pass
    try:
        from_json(read_regular(root / "plan.json"), Plan, where=str(root), error=DamageError)
    except (DamageError, FileNotFoundError):
        return False
    return True


def _commit(place: OnHub) -> str:
    """The commit that a branch or tag stood for when it was last seen; a commit stays as it is, empty where none was named."""
    from huggingface_hub.constants import HF_HUB_CACHE

    if place.revision is None:
        return ""
    reference = Path(HF_HUB_CACHE) / f"models--{place.repository.replace('/', '--')}" / "refs" / place.revision
    if ".." not in place.revision and reference.is_file():
        return reference.read_text().strip()
    return place.revision


def bank_folders(folder: Path | None = None) -> list[Path]:
    """Folders of banks, finished or not, below ``folder``, by default below the cache's."""
    folder = home() / "banks" if folder is None else folder
    marks = {
        mark.parent
        for name in (MANIFEST, "plan.json")
        for pattern in (name, f"*/{name}", f"*/*/{name}")
        for mark in folder.glob(pattern)
    }
    return sorted(marks)


def _published(folders: Iterable[Path]) -> Iterator[tuple[Path, Manifest]]:
    """Those of the folders that hold a finished bank, with its manifest."""
    for folder in folders:
        try:
            manifest = read_manifest(Folder(folder))
        except BankError:
            continue
        yield folder, manifest


def cached_banks(checkpoint: Checkpoint) -> list[Bank]:
    """The finished banks in the cache of just these weight files, or of this commit, the richest first."""
    own = model_folder(checkpoint)
    found = [
        (folder, manifest)
        for folder, manifest in _published(bank_folders())
        if own in folder.parents
        or (checkpoint.revision and (manifest.base.name, manifest.base.revision) == (checkpoint.name, checkpoint.revision))
    ]
    return [open_bank(folder) for folder, _ in sorted(found, key=lambda entry: _richness(entry[1]), reverse=True)]


def banks_of_memory(config_digest: str) -> list[Bank]:
    """The finished banks in the cache that were made of a loaded model's own weights, of this kind of model; the last made first."""
    found = [
        (last_used(folder), folder)
        for folder, manifest in _published(bank_folders())
        if manifest.base.revision is None and manifest.base.config_digest == config_digest
    ]
    return [open_bank(folder) for _, folder in sorted(found, reverse=True)]


def _richness(manifest: Manifest) -> tuple[float, bool, int]:
    rank = manifest.options.rank
    return (float("inf") if rank == "all" else float(rank), manifest.options.side == "both", manifest.weights)
