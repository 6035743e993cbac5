"""What a bank says of itself: manifest, index, and the small arrays beside the vectors. Loads neither torch nor zarr.

Everything is checked before it is used: digests of the manifest and of whatever it names, strict types, numbers that fit each other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from math import ceil
from pathlib import Path
from shlex import quote

import msgspec

from svdbank.bank.chunks import checked_crc
from svdbank.bank.files import SMALL_FILE, Files, Folder, Range, read_small
from svdbank.bank.layout import (
    CRC_BYTES,
    INDEX_ENTRY,
    ITEMSIZE,
    MANIFEST,
    RANK_CHUNK,
    STORED,
    FamilyIndex,
    FileRecord,
    Index,
    Manifest,
    manifest_digest,
    rank_extent,
    shard_file,
    vector_arrays,
)
from svdbank.bank.sessions import current_session
from svdbank.bank.zarr_metadata import ArrayMetadata, checked_metadata
from svdbank.core.errors import BankError, BankNotFoundError, DamageError
from svdbank.core.specs import BuildOptions, from_json

#: Characters of a name of a file or folder, and of a weight; features of a weight.
_LONGEST_NAME, _LONGEST_WEIGHT, _LARGEST = 250, 4096, 1 << 31


def read_manifest(files: Files) -> Manifest:
    """The manifest of a published bank.

    Raises BankNotFoundError where there is none (or one whose build has not finished), DamageError when it is lost or not the bytes that
    were published, BankError for a format this version does not know.
    """
    try:
        data = read_small(files, MANIFEST)
    except FileNotFoundError:
        if isinstance(files, Folder) and lost_manifest(files.root):
            path = f"{files.place}/{MANIFEST}"
            raise DamageError(
                f"{path}: lost; the bank was published",
                hint=f"svdbank repair {quote(files.place)} --source MODEL",
            ) from None
        if _is_begun(files):
            raise BankNotFoundError(
                f"{files.place}: this bank's build has not finished", hint="run the same svdbank build again: it resumes"
            ) from None
        raise BankNotFoundError(
            f"{files.place}: no bank here", hint="svdbank ls shows the banks there are; svdbank build makes one"
        ) from None
    return parse_manifest(data, files.place, hint=f"svdbank repair {quote(files.place)} --source MODEL")


def lost_manifest(root: Path) -> bool:
    """True for the folder of a published bank that has no manifest: a build has records until it is published, and no index before all is
    recorded."""
    return not (root / MANIFEST).exists() and current_session(root) is None and any(root.glob("index-*.json"))


def parse_manifest(data: bytes, place: str, *, hint: str | None = None) -> Manifest:
    """A manifest from its bytes; DamageError where they are not those that were published, BankError for an unknown format."""
    path = f"{place}/{MANIFEST}"
    _check_format(data, path)
    manifest = from_json(data, Manifest, where=path, error=DamageError)
    if manifest_digest(data, manifest.digest) != manifest.digest:
        raise DamageError(f"{path}: not the manifest that was published", hint=hint)
    return manifest


def read_index(files: Files, manifest: Manifest, *, may_be_empty: bool = False) -> Index:
    """The index that the manifest names; DamageError when it is not the bytes that were published, does not fit itself, or is of no
    weight, which only what a repair is made of may be."""
    name = manifest.index
    record = manifest.files.get(name)
    if record is None or not _is_plain(name):
        raise DamageError(f"{files.place}/{MANIFEST}: {name!r} is not among its files")
    try:
        data = read_recorded(files, name, record)
    except DamageError as damage:
        raise DamageError(str(damage), hint=f"svdbank verify {quote(files.place)}") from None
    index = from_json(data, Index, where=f"{files.place}/{name}", error=DamageError)
    if not (index.families or may_be_empty):
        raise DamageError(f"{files.place}: the index holds no weight")
    _check_consistent(files.place, manifest, index)
    return index


def read_recorded(files: Files, name: str, record: FileRecord) -> bytes:
    """A small file; DamageError where it is not the bytes that were published."""
    return read_all_recorded(files, [(name, record)])[0]


def read_all_recorded(files: Files, wanted: Sequence[tuple[str, FileRecord]]) -> list[bytes]:
    """Small files in one round of reading, in order; DamageError where one is not the bytes that were published."""
    ranges: list[Range] = []
    for name, record in wanted:
        try:
            size = files.size(name)
        except FileNotFoundError:
            raise DamageError(f"{files.place}/{name}: missing") from None
        if size != record.size or size > SMALL_FILE:
            raise DamageError(f"{files.place}/{name}: not the bytes that were published")
        ranges.append((name, 0, size))
    try:
        found = files.read_many(ranges)
    except FileNotFoundError as cause:  # gone meanwhile
        raise DamageError(f"{cause}: missing") from None
    for (name, record), data in zip(wanted, found, strict=True):
        if hashlib.sha256(data).hexdigest() != record.sha256:
            raise DamageError(f"{files.place}/{name}: not the bytes that were published")
    return found


def check_vectors(files: Files, arrays: Sequence[tuple[FamilyIndex, str]], options: BuildOptions) -> None:
    """DamageError unless the ``zarr.json`` of each of these families' arrays of vectors is as published, and as format 1 says for its
    shape; one round of reading."""
    found = read_all_recorded(files, [_recorded(files, family, f"{array}/zarr.json") for family, array in arrays])
    for (family, array), data in zip(arrays, found, strict=True):
        rank, length = vector_arrays(family.spec, options.side)[array]
        metadata = _metadata(files, family, array, data, (len(family.weights), rank, length), STORED[options.dtype][0])
        if not metadata.is_sharded((family.spec.weights_per_shard, rank_extent(rank), length), (1, RANK_CHUNK, length)):
            raise DamageError(f"{files.place}/{family.spec.name}/{array}: not cut as format 1 says")


def read_coordinates(files: Files, array: str, wanted: Sequence[tuple[FamilyIndex, int]]) -> list[memoryview[float]]:
    """A float64 array along the weights (σ, probes) of each of some families, (weights, columns), with its number of columns; one round
    of reading. DamageError where one is not as published."""
    parts = ("zarr.json", "c/0/0")
    files_of = [_recorded(files, family, f"{array}/{part}") for family, _ in wanted for part in parts]
    found = read_all_recorded(files, files_of)
    arrays: list[memoryview[float]] = []
    for (family, columns), document, data in zip(wanted, found[::2], found[1::2], strict=True):
        shape = (len(family.weights), columns)
        place = f"{files.place}/{family.spec.name}/{array}"
        if not _metadata(files, family, array, document, shape, "float64").is_one_chunk:
            raise DamageError(f"{place}: not cut as format 1 says")
        if checked_crc(data) is None or len(data) != shape[0] * shape[1] * 8 + CRC_BYTES:
            raise DamageError(f"{place}/c/0/0: its bytes do not fit its checksum or its shape")
        arrays.append(memoryview(data)[:-CRC_BYTES].cast("d", shape))
    return arrays


def base_digest(source_hashes: dict[str, str]) -> str:
    """sha256 over sorted (weight name, sha256 of its stored bytes). Extending a bank leaves the digest of any subset unchanged."""
    digest = hashlib.sha256()
    for name in sorted(source_hashes):
        digest.update(f"{name}\0{source_hashes[name]}\n".encode())
    return digest.hexdigest()


def data_files(family: FamilyIndex) -> Iterator[tuple[str, FileRecord]]:
    """Names and records of a family's data files."""
    for array, records in family.files.items():
        for shard, record in enumerate(records):
            yield shard_file(family.spec.name, array, shard), record


class _Version(msgspec.Struct):
    """The one field that every version of the manifest has; the rest may be anything."""

    format: int


def _check_format(data: bytes, path: str) -> None:
    """An unknown major version is told apart from damage before the strict decode."""
    version = from_json(data, _Version, where=path, error=DamageError).format
    if version != 1:
        raise BankError(f"{path}: format {version}; this svdbank reads format 1", hint="pip install -U svdbank")


def _is_begun(files: Files) -> bool:
    """True where a build has frozen its plan."""
    try:
        return files.size("plan.json") >= 0
    except (FileNotFoundError, DamageError):
        return False


def _recorded(files: Files, family: FamilyIndex, name: str) -> tuple[str, FileRecord]:
    """Path inside the bank and record of one of a family's small files."""
    path = f"{family.spec.name}/{name}"
    record = family.metadata.get(path)
    if record is None:
        raise DamageError(f"{files.place}/{path}: the index does not record it")
    return path, record


def _metadata(files: Files, family: FamilyIndex, array: str, data: bytes, shape: tuple[int, ...], dtype: str) -> ArrayMetadata:
    """The ``zarr.json`` of a family's array; DamageError where it says other than ``dtype`` of ``shape``."""
    path = f"{family.spec.name}/{array}/zarr.json"
    metadata = checked_metadata(data, where=f"{files.place}/{path}")
    if not isinstance(metadata, ArrayMetadata):
        raise DamageError(f"{files.place}/{path}: a group where an array belongs")
    if (metadata.shape, metadata.data_type) != (shape, dtype):
        claim = f"claims {metadata.data_type} of {metadata.shape}, the index says {dtype} of {shape}"
        raise DamageError(f"{files.place}/{family.spec.name}/{array}: {claim}")
    return metadata


def _check_consistent(place: str, manifest: Manifest, index: Index) -> None:
    """Names must be plain and unique and the counts must fit before any of them is used as a path."""
    for plan in manifest.plans:
        if not _is_plain(plan) or plan not in manifest.files:
            raise DamageError(f"{place}/{MANIFEST}: the plan {plan[:200]!r} is not among its files")
    seen: set[str] = set()
    named = [*(weight.name for family in index.families for weight in family.weights), *(alias.name for alias in index.aliases)]
    if not all(0 < len(name) <= _LONGEST_WEIGHT for name in named):
        raise DamageError(f"{place}: a weight's name is empty, or longer than {_LONGEST_WEIGHT} characters")
    for family in index.families:
        _check_family(place, manifest, family)
        if seen & set(family.spec.weights):
            raise DamageError(f"{place}: weights stand in two families")
        seen |= set(family.spec.weights)
    stored = frozenset(seen)
    for alias in index.aliases:
        if manifest.options.side != "both" or alias.of not in stored or alias.name in seen:
            raise DamageError(f"{place}: {alias.name} cannot be {alias.of} with the sides exchanged")
        seen.add(alias.name)
    if len(seen) != manifest.weights:
        raise DamageError(f"{place}: {len(seen)} weights in the index, {manifest.weights} in the manifest")


def _check_family(place: str, manifest: Manifest, family: FamilyIndex) -> None:
    spec = family.spec
    if not _is_family_name(spec.name):
        raise DamageError(f"{place}: {spec.name!r} is not a family name")
    if tuple(weight.name for weight in family.weights) != spec.weights or not spec.weights:
        raise DamageError(f"{place}: the weights of {spec.name} disagree with its description")
    full = min(spec.out_features, spec.in_features)
    if not (0 < spec.out_features <= _LARGEST and 0 < spec.in_features <= _LARGEST):
        raise DamageError(f"{place}: {spec.name} claims {spec.out_features}x{spec.in_features}")
    if not (1 <= spec.rank <= full and 0 <= spec.principal <= full and 1 <= spec.weights_per_shard <= len(spec.weights)):
        raise DamageError(f"{place}: {spec.name} claims rank {spec.rank} for {spec.out_features}x{spec.in_features}")
    for path in family.metadata:
        parts = path.split("/")
        if len(parts) < 2 or parts[0] != spec.name or not all(_is_plain(part) for part in parts[1:]):
            raise DamageError(f"{place}: {path[:200]!r} is no metadata of {spec.name}")
    # A data file without a record would be read unchecked.
    arrays = vector_arrays(spec, manifest.options.side)
    shards = ceil(len(spec.weights) / spec.weights_per_shard)
    if {array: len(records) for array, records in family.files.items()} != dict.fromkeys(arrays, shards):
        raise DamageError(f"{place}: the index does not record every data file of {spec.name}")
    # Sizes follow from the shapes; an index that claims others would make a lookup allocate or divide by what it says.
    for array, (rank, length) in arrays.items():
        chunk_bytes = RANK_CHUNK * length * ITEMSIZE[manifest.options.dtype] + CRC_BYTES
        table_bytes = spec.weights_per_shard * rank_extent(rank) // RANK_CHUNK * INDEX_ENTRY + CRC_BYTES
        for record in family.files[array]:
            if record.chunk_bytes != chunk_bytes or record.size != len(record.chunks) * chunk_bytes + table_bytes:
                raise DamageError(f"{place}: the index claims chunks of {spec.name}/{array} that its shape does not have")


def _is_family_name(name: str) -> bool:
    """``[a-z0-9_-][a-z0-9._-]*``, and short enough for a folder."""
    return _is_plain(name) and not any(ch.isupper() for ch in name)


def _is_plain(name: str) -> bool:
    """``[A-Za-z0-9_-][A-Za-z0-9._-]*``, and short enough for a file or folder."""
    plain = all(ch.isascii() and (ch.isalnum() or ch in "._-") for ch in name)
    return 0 < len(name) <= _LONGEST_NAME and plain and not name.startswith(".")
