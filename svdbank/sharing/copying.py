"""A bank copied into a folder of an object store: what is lacking, then the manifest, which makes it a bank; then old files go."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svdbank.bank.index import parse_manifest
from svdbank.bank.layout import MANIFEST, Manifest
from svdbank.bank.reading import Bank
from svdbank.core import stores
from svdbank.core.errors import BankError, DamageError, OptionError
from svdbank.core.places import InStore
from svdbank.core.specs import Progress, ProgressCallback
from svdbank.sharing.claim import CLAIM, Claim
from svdbank.sharing.inventory import LocalFile
from svdbank.sharing.replacing import is_of_a_bank

#: Files on their way at a time; larger ones go in parts of this many bytes, each a request that a slow line ends in time.
_AT_ONCE, _PART = 4, 8 << 20

#: The tag of a file that was put in one request, where tags are of bytes; and of one in parts, which depends on how it was cut.
_MD5 = re.compile(r"[0-9a-f]{32}")
_BYTES = re.compile(r"[0-9a-f]{32}(-\d+)?")


@dataclass(frozen=True)
class Copied:
    """What a copy took: files sent and their bytes, files removed, and whether there was no bank before."""

    sent: int
    nbytes: int
    removed: int
    created: bool


def copy_into(place: InStore, bank: Bank, files: Sequence[LocalFile], *, force: bool, progress: ProgressCallback) -> Copied:
    """Make ``place`` hold the bank; ``files`` are its inventory, the manifest last.

    Readers see the bank that was there until the manifest is put, or no bank where its files have to be overwritten. What is there with the
    same size and tag (md5, whole or by parts, as stores give it) is not sent again. Raises OptionError for another bank that is there and
    LockedError for another that is being put there, unless ``force``; LockedError where somebody else took the place meanwhile; BankError
    for what the store refuses.
    """
    store = stores.open_store(place.address)
    *data, manifest = files
    listed, before = _looked_at(store, place)
    if MANIFEST in listed and not force:
        _refuse_other(place, before, bank)
    was_there = MANIFEST in listed
    lacking, is_there, gone = _differences(listed, before, bank, files)
    if is_there and not lacking and not gone and CLAIM not in listed:
        return Copied(0, 0, 0, created=False)
    claim = Claim(store, place, bank.manifest.digest)
    claim.take(force=force)
    listed, before = _looked_at(store, place)  # another may have ended just before
    lacking, is_there, gone = _differences(listed, before, bank, files)
    if MANIFEST in listed and any(file.name in listed for file in lacking):
        claim.hold()
        _delete(store, place, MANIFEST)  # what its readers would meet is other bytes
        is_there = False
    put = _send(store, place, lacking, claim, progress)
    claim.hold()
    now = _listed(store, place)
    expected = {file.name: (file.size, put.get(file.name) or listed[file.name][1]) for file in data}
    wrong = [name for name, (size, tag) in expected.items() if name not in now or _differs(now[name], size, tag)]
    if wrong:
        raise DamageError(f"{place.address}: the store does not hold {wrong[0]} as it was sent", hint="push it again")
    if not is_there:
        _put(store, place, manifest)
    for name in gone:
        _delete(store, place, name)
    claim.give_up()
    sent = [*lacking, *([] if is_there else [manifest])]
    return Copied(len(sent), sum(file.size for file in sent), len(gone), not was_there)


def _looked_at(store: Any, place: InStore) -> tuple[dict[str, tuple[int, str]], Manifest | None]:
    """What is there, and the manifest among it."""
    listed = _listed(store, place)
    return listed, _manifest_there(store, place) if MANIFEST in listed else None


def _differences(
    listed: dict[str, tuple[int, str]], before: Manifest | None, bank: Bank, files: Sequence[LocalFile]
) -> tuple[list[LocalFile], bool, list[str]]:
    """The files but the manifest that are not there, whether that is, and the names of files that are of a bank and not of this one."""
    *data, manifest = files
    names = {file.name for file in files}
    same = before is not None and before.digest == bank.manifest.digest
    lacking = [file for file in data if not _is_there(listed.get(file.name), file, same)]
    gone = [name for name in sorted(listed) if name not in names and is_of_a_bank(name)]
    return lacking, _is_there(listed.get(MANIFEST), manifest, same), gone


def _differs(held: tuple[int, str], size: int, tag: str) -> bool:
    """Whether a file is another one than was put: by its size and, where both tags are of bytes, those."""
    return held[0] != size or (held[1] != tag and bool(_BYTES.fullmatch(held[1]) and _BYTES.fullmatch(tag)))


def _refuse_other(place: InStore, before: Manifest | None, bank: Bank) -> None:
    mine = bank.manifest
    if before is None or (before.base, before.options) != (mine.base, mine.options):
        what = (
            "a bank that cannot be read"
            if before is None
            else f"another bank: of {before.base.name}, rank {before.options.rank}"
        )
        raise OptionError(f"{place.address} holds {what}", hint="another address; or --force to replace it")


def _listed(store: Any, place: InStore) -> dict[str, tuple[int, str]]:
    """Size and tag of every file there."""
    with stores.explained(place.address, "its list of files"):
        entries = [entry for batch in store.list() for entry in batch]
    return {str(entry["path"]): (int(entry["size"]), _tag(entry)) for entry in entries}


def _manifest_there(store: Any, place: InStore) -> Manifest | None:
    try:
        with stores.explained(place.address, MANIFEST):
            data = bytes(store.get(MANIFEST).bytes())
    except FileNotFoundError:
        return None
    try:
        return parse_manifest(data, place.address)
    except BankError:
        return None


def _is_there(held: tuple[int, str] | None, file: LocalFile, same: bool) -> bool:
    """Whether the store holds these bytes, by size and tag; where its tags say nothing of bytes, ``same``: this bank's manifest is there,
    which was put after them."""
    if held is None or held[0] != file.size:
        return False
    return held[1] in _tags(file.path) or (same and _MD5.fullmatch(held[1]) is None)


def _tags(path: Path) -> Iterator[str]:
    """What a store may call a file: its md5, or that of the md5s of its parts."""
    whole, parts = hashlib.md5(usedforsecurity=False), list[bytes]()
    with path.open("rb") as file:
        while piece := file.read(_PART):
            whole.update(piece)
            parts.append(hashlib.md5(piece, usedforsecurity=False).digest())
    yield whole.hexdigest()
    yield f"{hashlib.md5(b''.join(parts), usedforsecurity=False).hexdigest()}-{len(parts)}"


def _send(store: Any, place: InStore, files: Sequence[LocalFile], claim: Claim, progress: ProgressCallback) -> dict[str, str]:
    """Put files; the tags that the store gives them."""

    def send(file: LocalFile) -> str:
        claim.hold()
        return _put(store, place, file)

    total, done, tags = sum(file.size for file in files), 0, dict[str, str]()
    with ThreadPoolExecutor(_AT_ONCE, "svdbank-push") as pool:
        waiting = [(file, pool.submit(send, file)) for file in files]
        try:
            for file, sent in waiting:
                tags[file.name] = sent.result()
                done += file.size
                progress(Progress("upload", done, total, "bytes", file.name))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return tags


def _put(store: Any, place: InStore, file: LocalFile) -> str:
    with stores.explained(place.address, file.name, doing="written"):
        made = store.put(file.name, file.path, use_multipart=file.size > _PART, chunk_size=_PART, max_concurrency=2)
    file.check()
    return _tag(made)


def _delete(store: Any, place: InStore, name: str) -> None:
    with stores.explained(place.address, name, doing="deleted"), suppress(FileNotFoundError):
        store.delete(name)


def _tag(meta: Any) -> str:
    return str(meta.get("e_tag") or "").strip('"')
