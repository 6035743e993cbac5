"""Writing a bank: arrays, records, publish. Nothing published is ever written again; the manifest comes last.

Order of a shard: data files (each fsynced), their folders, then the record (atomic). Order of a publish: coordinate arrays, index,
manifest. A crash anywhere leaves either the last published bank or a folder without a manifest, and a record only for a shard whose
files are durable.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec

from svdbank.bank.files import read_regular
from svdbank.bank.index import base_digest
from svdbank.bank.layout import (
    FORMAT,
    MANIFEST,
    NO_DIGEST,
    RANK_CHUNK,
    RECORDS,
    STORED,
    FamilyIndex,
    Index,
    Manifest,
    ShardRecord,
    manifest_digest,
    plan_name,
    rank_extent,
    record_file,
    shard_file,
    vector_arrays,
)
from svdbank.bank.store import BankStore, ShardGeometry, file_record
from svdbank.core import disk
from svdbank.core.basis import Basis, Triplets
from svdbank.core.errors import BankError, DamageError
from svdbank.core.specs import FamilySpec, Plan, ShardSpec, from_json, to_json

_CREATED_BY = "svdbank format 1"
#: torch dtype of the stored vectors.
STORED_TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class BankWriter:
    """Writes one generation of a bank: a first build, or an extension of a published bank by new families.

    Holds no lock: the caller does. Shards may be written from several threads and processes, each shard by one.
    """

    def __init__(self, root: Path, plan: Plan, *, generation: int) -> None:
        self.root = root
        self.plan = plan
        self.generation = generation
        self._families = {family.name: family for family in plan.families}
        self._arrays: dict[str, Any] = {}
        self._opening = threading.Lock()
        itemsize = np.dtype(STORED[plan.options.dtype][0]).itemsize
        geometry = {
            f"{family.name}/{array}": ShardGeometry(
                chunk_bytes=RANK_CHUNK * length * itemsize + 4,
                chunks=family.weights_per_shard * rank_extent(rank) // RANK_CHUNK,
            )
            for family in plan.families
            for array, (rank, length) in vector_arrays(family, plan.options.side).items()
        }
        self._store = BankStore(root, geometry=geometry)

    def begin(self) -> None:
        """Freeze the plan and create groups and arrays. Repeats harmlessly when a build is resumed."""
        disk.make_dirs(self.root)
        for folder in (self.root, *(self.root / RECORDS).glob("*")):
            for path in folder.glob(f".*{disk.TEMPORARY}"):
                disk.unlink(path)
        if not (self.root / plan_name(self.generation)).exists():
            disk.write_bytes(self.root / plan_name(self.generation), to_json(self.plan, indent=1))
        if self.generation == 0:
            self._group("", {"svdbank": {"format": FORMAT}})
        for family in self.plan.families:
            self._group(family.name, {"svdbank": {"kind": family.kind}, "weights": list(family.weights)})
            for array, (rank, length) in vector_arrays(family, self.plan.options.side).items():
                self._vectors(family, array, rank, length)

    def record(self, shard: ShardSpec) -> ShardRecord | None:
        """The record of a shard that is whole on disk, or None: not recorded, or its files are not the bytes recorded."""
        path = self.root / record_file(shard.family, shard.index)
        try:
            record = from_json(read_regular(path), ShardRecord, where=str(path), error=DamageError)
        except (FileNotFoundError, DamageError):
            return None
        for array, expected in record.files.items():
            file = self.root / shard_file(shard.family, array, shard.index)
            if not file.is_file() or file.stat().st_size != expected.size or disk.sha256_file(file) != expected.sha256:
                return None
        return record

    def write_shard(self, shard: ShardSpec, bases: Sequence[Basis], record: ShardRecord) -> ShardRecord:
        """Write the vectors of a shard's weights, then its record. ``record`` comes without ``files``; returned with them."""
        family = self._families[shard.family]
        files = {}
        for array in vector_arrays(family, self.plan.options.side):
            self._array(family, array)[shard.start : shard.stop] = self._stored([_vectors_of(b, array) for b in bases])
            key = shard_file(family.name, array, shard.index)
            files[array] = self._store.written.pop(key)
        path = self.root / record_file(shard.family, shard.index)
        disk.make_dirs(path.parent)
        complete = msgspec.structs.replace(record, files=files)
        disk.write_bytes(path, to_json(complete))
        return complete

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
        index_record = file_record(data, None)
        index_file = f"index-{index_record.sha256[:16]}.json"
        disk.write_bytes(self.root / index_file, data)
        named = {index_file: index_record}
        if earlier is not None:
            # As they were published: what has changed since is damage, not news.
            named.update({name: earlier.files[name] for name in ("zarr.json", *earlier.plans)})
        plans = (*(earlier.plans if earlier else ()), plan_name(self.generation))
        for name in ("zarr.json", *plans):
            if name not in named:
                named[name] = file_record((self.root / name).read_bytes(), None)
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
        records = []
        for shard in (s for s in self.plan.shards if s.family == family.name):
            path = self.root / record_file(family.name, shard.index)
            records.append(from_json(path.read_bytes(), ShardRecord, where=str(path), error=DamageError))
        weights = tuple(weight for record in records for weight in record.weights)
        if tuple(weight.name for weight in weights) != family.weights:
            raise BankError(
                f"{self.root}: the records of {family.name} are not those of its plan", hint="delete the bank, build again"
            )
        for name, (values, dims) in _coordinates(records).items():
            self._coordinate(family, name, values, dims)
        arrays = vector_arrays(family, self.plan.options.side)
        begun = (f"{family.name}/zarr.json", *(f"{family.name}/{array}/zarr.json" for array in arrays))
        metadata = {key: file_record(read_regular(self.root / key), None) for key in begun}
        metadata |= {key: file for key, file in self._store.written.items() if key.startswith(f"{family.name}/")}
        files = {array: tuple(record.files[array] for record in records) for array in arrays}
        return FamilyIndex(spec=family, weights=weights, files=files, metadata=metadata)

    def _group(self, path: str, attributes: dict[str, Any]) -> None:
        key = f"{path}/zarr.json" if path else "zarr.json"
        self._written_anew(key)
        zarr.create_group(self._store, path=path, attributes=attributes, zarr_format=3, overwrite=False)

    def _array(self, family: FamilySpec, array: str) -> Any:
        """An array of vectors that :meth:`begin` made, opened once."""
        path = f"{family.name}/{array}"
        with self._opening:
            if path not in self._arrays:
                self._arrays[path] = zarr.open_array(
                    self._store, path=path, mode="r+", zarr_format=3, config={"write_empty_chunks": True}
                )
            return self._arrays[path]

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

    def _coordinate(self, family: FamilySpec, name: str, values: NDArray[Any], dims: tuple[str, ...]) -> None:
        path = f"{family.name}/{name}"
        self._written_anew(f"{path}/zarr.json")
        array = zarr.create_array(
            self._store,
            name=path,
            shape=values.shape,
            dtype=values.dtype,
            chunks=values.shape,
            fill_value=np.nan if values.dtype.kind == "f" else 0,
            filters=None,
            compressors=[Crc32cCodec()],
            dimension_names=dims,
            zarr_format=3,
            config={"write_empty_chunks": True},
        )
        array[...] = values

    def _written_anew(self, key: str) -> None:
        """A metadata file left by a run that was stopped gives way: its content follows from the plan."""
        path = self.root / key
        if path.exists():
            disk.unlink(path)

    def _stored(self, rows: list[torch.Tensor]) -> NDArray[Any]:
        """Stack (R, n) tensors and cast to the stored dtype."""
        stacked = torch.stack([row.to(device="cpu") for row in rows]).to(STORED_TORCH[self.plan.options.dtype])
        if stacked.dtype == torch.bfloat16:
            stacked = stacked.view(torch.uint16)
        return stacked.numpy()


def clean(root: Path, manifest: Manifest) -> None:
    """Remove what a published bank no longer needs: records, and indexes that the manifest does not name."""
    if (root / RECORDS).is_dir():
        disk.remove_tree(root / RECORDS)
    for path in root.glob("index-*.json"):
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


def _coordinates(records: list[ShardRecord]) -> dict[str, tuple[NDArray[Any], tuple[str, ...]]]:
    """Arrays along the weight axis: what they hold and their dimensions. None is stored as NaN, or −1 in integers."""
    weights = [weight for record in records for weight in record.weights]
    certificates = [weight.certificate for weight in weights]
    arrays: dict[str, tuple[NDArray[Any], tuple[str, ...]]] = {
        "sigma": (np.array([row for record in records for row in record.sigma], dtype=np.float64), ("weight", "rank")),
        "probe": (np.array([row for record in records for row in record.probe], dtype=np.float64), ("weight", "sample")),
        "source_sha256": (
            np.array([list(bytes.fromhex(weight.source_sha256)) for weight in weights], dtype=np.uint8),
            ("weight", "byte"),
        ),
        "layer": (np.array([-1 if w.layer is None else w.layer for w in weights], dtype=np.int32), ("weight",)),
        "expert": (np.array([-1 if w.expert is None else w.expert for w in weights], dtype=np.int32), ("weight",)),
    }
    if records[0].principal_sigma:
        rows = [row for record in records for row in record.principal_sigma]
        arrays["principal_sigma"] = (np.array(rows, dtype=np.float64), ("weight", "principal_rank"))
    for column in ("sigma_max", "sigma_min", "sigma_next", "orthogonality", "residual", "angle_bound"):
        values = [getattr(certificate, column) for certificate in certificates]
        arrays[column] = (np.array([np.nan if v is None else v for v in values], dtype=np.float64), ("weight",))
    return arrays
