"""Writing a bank: arrays, records, publish. Nothing published is ever written again; the manifest comes last.

Order of a shard: data files under names of their own (each fsynced), their folders, then the record, which can be made once. Order of a
publish: the recorded files get their names, coordinate arrays, index, manifest. A crash anywhere leaves either the last published bank or
a folder without a manifest, and a record only for a shard whose files are durable.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec

from svdbank.bank.chunks import crc_before
from svdbank.bank.coordinates import CoordinateColumns
from svdbank.bank.files import read_regular
from svdbank.bank.index import base_digest
from svdbank.bank.layout import (
    CRC_BYTES,
    FORMAT,
    MANIFEST,
    NO_DIGEST,
    RANK_CHUNK,
    RECORDS,
    STORED,
    FamilyIndex,
    FileRecord,
    Index,
    Manifest,
    ShardRecord,
    WeightRecord,
    attempt_file,
    manifest_digest,
    plan_name,
    rank_extent,
    shard_file,
    vector_arrays,
)
from svdbank.bank.records import fits
from svdbank.bank.sessions import Session
from svdbank.bank.sharding import shard_bytes
from svdbank.bank.store import BankStore, file_record
from svdbank.core import disk
from svdbank.core.basis import Basis, Triplets
from svdbank.core.errors import BankError
from svdbank.core.specs import FamilySpec, Plan, ShardSpec, to_json

_CREATED_BY = "svdbank format 1"
#: torch dtype of the stored vectors.
STORED_TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class BankWriter:
    """Writes one generation of a bank: a first build, or an extension of a published bank by new families.

    Holds no lock: who begins or publishes does. Shards may be written from several threads and processes. ``session`` is needed by
    what reads or writes records.
    """

    def __init__(self, root: Path, plan: Plan, *, generation: int, session: Session | None = None) -> None:
        self.root = root
        self.plan = plan
        self.generation = generation
        self._session = session
        self._families = {family.name: family for family in plan.families}
        self._store = BankStore(root)

    def begin(self) -> None:
        """Create groups and arrays, and remove what attempts left that no record names. Repeats harmlessly; no worker may be alive."""
        self._sweep()
        if self.generation == 0:
            self._group("", {"svdbank": {"format": FORMAT}})
        for family in self.plan.families:
            self._group(family.name, {"svdbank": {"kind": family.kind}, "weights": list(family.weights)})
            for array, (rank, length) in vector_arrays(family, self.plan.options.side).items():
                self._vectors(family, array, rank, length)

    def whole(self, shard: ShardSpec) -> ShardRecord | None:
        """The record of a shard whose files are, to the byte, what it says; None where there is no such record."""
        record = self.session.read(shard.family, shard.index)
        if record is None or not self._fits(shard, record):
            return None
        for array, expected in record.files.items():
            file = self._where(record, array)
            if not file.is_file() or file.stat().st_size != expected.size or disk.sha256_file(file) != expected.sha256:
                return None
        return record

    def write_shard(self, shard: ShardSpec, bases: Sequence[Basis], record: ShardRecord) -> ShardRecord | None:
        """Write the vectors of a shard's weights, then its record; None where the shard is recorded already: then nothing is left.

        ``record`` comes without ``files`` and ``attempt``; returned with them. FileNotFoundError where the session is over.
        """
        attempt = secrets.token_hex(8)
        family = self._families[shard.family]
        fill = STORED[self.plan.options.dtype][1]
        files: dict[str, FileRecord] = {}
        names = [attempt_file(shard.family, array, shard.index, attempt) for array in self._arrays_of(shard)]
        try:
            for array, name in zip(self._arrays_of(shard), names, strict=True):
                rows = self._stored([_vectors_of(basis, array) for basis in bases])
                data, files[array] = shard_bytes(rows, family.weights_per_shard, np.nan if fill == "NaN" else fill)
                # A worker that was woken after its bank was deleted makes no folders where that was.
                path = self.root / name
                disk.make_dirs(path.parent, below=self.root / shard.family / array)
                disk.write_new(path, data)
                disk.fsync_dir(path.parent)
            complete = msgspec.structs.replace(record, attempt=attempt, files=files)
            if self.session.add(complete):
                return complete
            for name in names:
                disk.unlink(self.root / name)
            return None
        except Exception:
            for name in names:
                with contextlib.suppress(OSError):
                    disk.unlink(self.root / name)
            raise

    def place(self, progress: Callable[[int, int], None]) -> list[ShardSpec]:
        """Give the files of all records their names, durably; the shards that cannot be published. The caller holds the bank's lock.

        Only a file that a record names as its attempt's gets a name that is published, and it is held to the record by its size and the
        checksums at its end; a record that does not hold is removed.
        """
        missing, folders = [], []
        for number, shard in enumerate(self.plan.shards):
            record = self.session.read(shard.family, shard.index)
            placed = None if record is None else self._placed(shard, record)
            if placed is None:
                self.session.forget(shard.family, shard.index)
                missing.append(shard)
            else:
                folders += placed
            progress(number + 1, len(self.plan.shards))
        for folder in folders:
            disk.fsync_dir(folder)
        return missing

    def _placed(self, shard: ShardSpec, record: ShardRecord) -> list[Path] | None:
        """The folders in which files of a record have their names now; None where the record does not hold."""
        if not self._fits(shard, record):
            return None
        folders = []
        for array, expected in record.files.items():
            final = self.root / shard_file(shard.family, array, shard.index)
            found = self._where(record, array)
            if not _holds(found, expected):
                return None
            if found != final:
                disk.rename(found, final)
            for path in final.parent.iterdir():
                if path.name.endswith(disk.TEMPORARY):  # of an attempt that was stopped
                    disk.unlink(path)
            folders.append(final.parent)
        return folders

    @property
    def session(self) -> Session:
        """Where the records are."""
        assert self._session is not None
        return self._session

    def _where(self, record: ShardRecord, array: str) -> Path:
        """A file of a record: under its attempt's name, or under its own where a publish that was stopped gave it that."""
        attempt = self.root / attempt_file(record.family, array, record.index, record.attempt)
        return attempt if attempt.exists() else self.root / shard_file(record.family, array, record.index)

    def _fits(self, shard: ShardSpec, record: ShardRecord) -> bool:
        return record.files.keys() == self._arrays_of(shard).keys() and fits(record, shard, self._families[shard.family])

    def _arrays_of(self, shard: ShardSpec) -> dict[str, tuple[int, int]]:
        return vector_arrays(self._families[shard.family], self.plan.options.side)

    def _sweep(self) -> None:
        for path in (*self.root.glob(f".*{disk.TEMPORARY}"), *self.root.glob(f"{RECORDS}/.*{disk.TEMPORARY}")):
            disk.unlink(path)
        for path in self.root.glob("sources-*.json"):
            if path.name != self.plan.sources:
                disk.unlink(path)
        for family in self.plan.families:
            for array in vector_arrays(family, self.plan.options.side):
                for path in (self.root / family.name / array).glob(f"c/*/0/.*{disk.TEMPORARY}"):
                    record = self.session.read(family.name, int(path.parents[1].name))
                    if record is None or path.name != f".{record.attempt}{disk.TEMPORARY}":
                        disk.unlink(path)

    def publish(self, *, earlier: Manifest | None, earlier_index: Index | None) -> Manifest:
        """Fold the records into coordinate arrays and the index, then write the manifest and drop the records."""
        families = [self._fold(family) for family in self.plan.families]
        index = Index(
            families=(*(earlier_index.families if earlier_index else ()), *families),
            aliases=(*(earlier_index.aliases if earlier_index else ()), *self.plan.aliases),
        )
        hashes = {weight.name: weight.source_sha256 for family in index.families for weight in family.weights}
        hashes.update({alias.name: hashes[alias.of] for alias in index.aliases})
        data = to_json(index)
        # Named by its content: the manifest of the last publish keeps its index until the new manifest is in place.
        index_record = file_record(data)
        index_file = f"index-{index_record.sha256[:16]}.json"
        disk.write_bytes(self.root / index_file, data)
        named = {index_file: index_record}
        if earlier is not None:
            # As they were published: what has changed since is damage, not news.
            named.update({name: earlier.files[name] for name in ("zarr.json", *earlier.plans)})
        plans = (*(earlier.plans if earlier else ()), plan_name(self.generation))
        for name in ("zarr.json", *plans):
            if name not in named:
                named[name] = file_record((self.root / name).read_bytes())
        manifest = Manifest(
            format=FORMAT,
            created_by=_CREATED_BY,
            base=self.plan.base,
            base_digest=base_digest(hashes),
            options=self.plan.options,
            weights=sum(len(family.weights) for family in index.families) + len(index.aliases),
            nbytes=sum(file.size for family in index.families for files in family.files.values() for file in files),
            index=index_file,
            plans=plans,
            files=named,
            digest=NO_DIGEST,
        )
        data = to_json(manifest, indent=1)
        manifest = msgspec.structs.replace(manifest, digest=manifest_digest(data, NO_DIGEST))
        disk.write_bytes(self.root / MANIFEST, to_json(manifest, indent=1))
        clean(self.root, manifest)
        return manifest

    def _fold(self, family: FamilySpec) -> FamilyIndex:
        """Write a family's coordinate arrays from its records and return its part of the index."""
        arrays = vector_arrays(family, self.plan.options.side)
        weights: list[WeightRecord] = []
        files: dict[str, list[FileRecord]] = {array: [] for array in arrays}
        with CoordinateColumns(family, self.root / family.name) as coordinates:
            for shard in (s for s in self.plan.shards if s.family == family.name):
                record = self.session.read(family.name, shard.index)
                names = family.weights[shard.start : shard.stop]
                if record is None or tuple(weight.name for weight in record.weights) != names:
                    raise BankError(
                        f"{self.root}: the records of {family.name} are not those of its plan",
                        hint="delete the bank, build again",
                    )
                coordinates.add(record)
                weights += record.weights
                for array in arrays:
                    files[array].append(record.files[array])
                del record  # its samples, one by one, are the most that a publish holds
        for name, (shape, dims, chunk) in coordinates.wide().items():
            self._coordinate(family, name, shape, np.dtype(np.float64), dims)
            self._store.written[f"{family.name}/{name}/c/0/0"] = chunk
        for name, (values, dims) in coordinates.arrays().items():
            self._coordinate(family, name, values.shape, values.dtype, dims)[...] = values
        begun = (f"{family.name}/zarr.json", *(f"{family.name}/{array}/zarr.json" for array in arrays))
        metadata = {key: file_record(read_regular(self.root / key)) for key in begun}
        metadata |= {key: file for key, file in self._store.written.items() if key.startswith(f"{family.name}/")}
        return FamilyIndex(
            spec=family,
            weights=tuple(weights),
            files={array: tuple(records) for array, records in files.items()},
            metadata=metadata,
        )

    def _group(self, path: str, attributes: dict[str, Any]) -> None:
        key = f"{path}/zarr.json" if path else "zarr.json"
        self._written_anew(key)
        zarr.create_group(self._store, path=path, attributes=attributes, zarr_format=3, overwrite=False)

    def _vectors(self, family: FamilySpec, array: str, rank: int, length: int) -> None:
        dtype, fill = STORED[self.plan.options.dtype]
        self._written_anew(f"{family.name}/{array}/zarr.json")
        zarr.create_array(
            self._store,
            name=f"{family.name}/{array}",
            shape=(len(family.weights), rank, length),
            dtype=dtype,
            chunks=(1, RANK_CHUNK, length),
            shards=(family.weights_per_shard, rank_extent(rank), length),
            fill_value=np.nan if fill == "NaN" else fill,
            filters=None,
            compressors=[Crc32cCodec()],
            dimension_names=(
                "weight",
                "principal_rank" if array.startswith("principal_") else "rank",
                "out" if array.endswith("left") else "in",
            ),
            attributes={"stored": self.plan.options.dtype},
            zarr_format=3,
            config={"write_empty_chunks": True},
        )

    def _coordinate(
        self, family: FamilySpec, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], dims: tuple[str, ...]
    ) -> zarr.Array[Any]:
        path = f"{family.name}/{name}"
        self._written_anew(f"{path}/zarr.json")
        return zarr.create_array(
            self._store,
            name=path,
            shape=shape,
            dtype=dtype,
            chunks=shape,
            fill_value=np.nan if dtype.kind == "f" else 0,
            filters=None,
            compressors=[Crc32cCodec()],
            dimension_names=dims,
            zarr_format=3,
            config={"write_empty_chunks": True},
        )

    def _written_anew(self, key: str) -> None:
        """A metadata file left by a run that was stopped gives way: its content follows from the plan."""
        path = self.root / key
        if path.exists():
            disk.unlink(path)

    def _stored(self, rows: list[torch.Tensor]) -> NDArray[Any]:
        """(R, n) tensors as one (weights, R, n) array of the stored dtype."""
        here = [row.to(device="cpu") for row in rows]
        stacked = (torch.stack(here) if len(here) > 1 else here[0][None]).to(STORED_TORCH[self.plan.options.dtype])
        if stacked.dtype == torch.bfloat16:
            stacked = stacked.view(torch.uint16)
        return stacked.numpy()


def clean(root: Path, manifest: Manifest) -> None:
    """Remove what a published bank no longer needs: records, sources, and indexes that the manifest does not name."""
    if (root / RECORDS).is_dir():
        disk.remove_tree(root / RECORDS)
    for path in (*root.glob("index-*.json"), *root.glob("sources-*.json")):
        if path.name != manifest.index:
            disk.unlink(path)
    for path in root.glob(f".*{disk.TEMPORARY}"):
        disk.unlink(path)


def _vectors_of(basis: Basis, array: str) -> torch.Tensor:
    """The (R, n) tensor of a basis that belongs into an array of the given name."""
    end: Triplets | None = basis.principal if array.startswith("principal_") else basis.minor
    if end is None:
        raise BankError(f"the basis has no vectors for {array}")
    vectors = end.left if array.endswith("left") else end.right
    if vectors is None:
        raise BankError(f"the basis has no vectors for {array}")
    return vectors


def _holds(path: Path, record: FileRecord) -> bool:
    """True where a shard's file has the size recorded and ends in the checksums recorded: of its last chunk and of its table.

    One read of some hundred bytes; the whole is hashed when a build resumes, and by ``verify --data``.
    """
    table = record.size - len(record.chunks) * record.chunk_bytes
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size != record.size or not record.chunks:
                return False
            end = os.pread(file.fileno(), CRC_BYTES + table, record.size - table - CRC_BYTES)
    except FileNotFoundError:
        return False
    return len(end) == CRC_BYTES + table and (crc_before(end, CRC_BYTES), crc_before(end, len(end))) == (
        record.chunks[-1],
        record.index_crc32c,
    )
