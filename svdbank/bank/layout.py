"""Bank format 1: which files a bank has, what stands in them, and how the arrays are cut.

``docs/format.md`` is the normative text; this module is its implementation.
"""

from __future__ import annotations

import hashlib
import re
from math import ceil
from typing import Final, Literal

from svdbank.core.basis import Certificate
from svdbank.core.specs import Alias, BaseSpec, BuildOptions, FamilySpec, Struct

FORMAT: Final = 1
MANIFEST = "manifest.json"
RECORDS = "records"
LOG = "build.log.jsonl"

#: Files at the top that belong to no digest: the card, and what goes with whatever is made of a model: its licence, notices, terms of use.
CARD = "README.md"
LEGAL = re.compile(r"(licen[cs]e|notice|copying|use[_-]?policy)([._-][\w.-]*)?", re.IGNORECASE)

#: Singular triplets in one inner chunk: a rank-16 lookup reads one, a rank-1 lookup reads sixteen times too much of very little.
RANK_CHUNK = 16

#: Bytes of a checksum behind each inner chunk and behind the shard index, and of one index entry: offset and length, uint64 each.
CRC_BYTES = 4
INDEX_ENTRY = 16

#: Families up to this size get a file a weight; larger ones (experts) share files, so that counts stay inside the Hub's limits.
SINGLE_SHARD_WEIGHTS = 128

#: Aim for shared shards, bytes per array.
SHARD_BYTES = 64 << 20

#: numpy dtype of the stored vectors, and the Zarr fill value that makes a lost chunk visible. bfloat16 is kept as its bits.
STORED = {"float32": ("float32", "NaN"), "float16": ("float16", "NaN"), "bfloat16": ("uint16", 0x7FC0)}

#: Bytes of a stored value.
ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}


class FileRecord(Struct, frozen=True):
    """One file: size and sha256; of a shard also the bytes of an inner chunk, each one's crc32c in file order, and the shard index's."""

    size: int
    sha256: str
    chunk_bytes: int
    chunks: tuple[int, ...]
    index_crc32c: int


class WeightRecord(Struct, frozen=True):
    """One weight in the index. ``dtype`` and ``source_sha256`` describe the base's stored bytes."""

    name: str
    module: str
    layer: int | None
    expert: int | None
    dtype: str
    source_sha256: str
    certificate: Certificate


class ShardRecord(Struct, frozen=True):
    """Written when a shard's files are durable; folded into the index at publish.

    ``files`` maps array name to its file in this shard; until the publish that file has the name of the ``attempt`` that wrote it
    (:func:`attempt_file`). ``sigma``, ``probe`` (and ``principal_sigma``) become arrays at publish.
    """

    family: str
    index: int
    attempt: str
    weights: tuple[WeightRecord, ...]
    files: dict[str, FileRecord]
    sigma: tuple[tuple[float, ...], ...]
    principal_sigma: tuple[tuple[float, ...], ...]
    probe: tuple[tuple[float, ...], ...]


class FamilyIndex(Struct, frozen=True):
    """A published family: its shape, its weights in array order, its data files by array and shard, its metadata files."""

    spec: FamilySpec
    weights: tuple[WeightRecord, ...]
    files: dict[str, tuple[FileRecord, ...]]
    metadata: dict[str, FileRecord]


class Index(Struct, frozen=True, omit_defaults=True):
    """Everything a lookup needs to find and check bytes. ``aliases`` are weights that are another one with the sides exchanged."""

    families: tuple[FamilyIndex, ...]
    aliases: tuple[Alias, ...] = ()


class Manifest(Struct, frozen=True):
    """What makes a bank complete. ``files`` holds size and sha256 of the index, the plans and the root metadata.

    ``digest`` is the sha256 of the manifest's own bytes with these 64 digits as zeros.
    """

    format: Literal[1]
    created_by: str
    base: BaseSpec
    base_digest: str
    options: BuildOptions
    weights: int
    nbytes: int
    index: str
    plans: tuple[str, ...]
    files: dict[str, FileRecord]
    digest: str


#: Stands for the manifest's digest while that is computed.
NO_DIGEST = "0" * 64


def manifest_digest(data: bytes, digest: str) -> str:
    """sha256 of a manifest's bytes in which ``digest`` is zeros."""
    return hashlib.sha256(data.replace(digest.encode(), NO_DIGEST.encode(), 1)).hexdigest()


def plan_name(generation: int) -> str:
    """File name of the plan of the first build (0) or of the n-th extension."""
    return "plan.json" if generation == 0 else f"plan-{generation}.json"


def weights_per_shard(count: int, *, out_features: int, in_features: int, rank: int, itemsize: int) -> int:
    """How many weights of a family of ``count`` share a data file: a static rule, part of what fixes the bytes."""
    if count <= SINGLE_SHARD_WEIGHTS:
        return 1
    each = rank_extent(rank) * max(out_features, in_features) * itemsize
    return max(1, min(count, SHARD_BYTES // each))


def rank_extent(rank: int) -> int:
    """Rank axis of a shard: a whole number of inner chunks."""
    return ceil(rank / RANK_CHUNK) * RANK_CHUNK


def vector_arrays(family: FamilySpec, side: str) -> dict[str, tuple[int, int]]:
    """Arrays of singular vectors of a family: name → (stored rank, length of a vector)."""
    arrays = {"left": (family.rank, family.out_features)}
    if side == "both":
        arrays["right"] = (family.rank, family.in_features)
    if family.principal:
        arrays["principal_left"] = (family.principal, family.out_features)
        if side == "both":
            arrays["principal_right"] = (family.principal, family.in_features)
    return arrays


def bytes_read(family: FamilySpec, side: str, dtype: str, rank: int) -> int:
    """Bytes of vectors that a lookup of the ``rank`` most minor triplets of a family's weights reads of ``side``: whole chunks."""
    length = family.out_features + (family.in_features if side == "both" else 0)
    return len(family.weights) * rank_extent(min(rank, family.rank)) * length * ITEMSIZE[dtype]


def shard_file(family: str, array: str, shard: int) -> str:
    """Path of a data file inside the bank."""
    return f"{family}/{array}/c/{shard}/0/0"


def attempt_file(family: str, array: str, shard: int, attempt: str) -> str:
    """Path of a data file until its bank is published: each attempt at a shard has names of its own."""
    return f"{family}/{array}/c/{shard}/0/.{attempt}.tmp"


def sources_name(data: bytes) -> str:
    """File name of what a plan says of its checkpoint, by content."""
    return f"sources-{hashlib.sha256(data).hexdigest()[:16]}.json"
