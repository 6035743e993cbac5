"""A published bank, opened for lookups."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from math import ceil
from pathlib import Path
from shlex import quote
from typing import Any

import msgspec
import numpy as np
import torch
import zarr
from numpy.typing import NDArray
from torch import Tensor

from svdbank.bank.chunks import read_regular, read_vectors
from svdbank.bank.layout import (
    CRC_BYTES,
    MANIFEST,
    RANK_CHUNK,
    STORED,
    FamilyIndex,
    FileRecord,
    Index,
    Manifest,
    WeightRecord,
    manifest_digest,
    shard_file,
    vector_arrays,
)
from svdbank.bank.store import BankStore
from svdbank.core.basis import Certificate
from svdbank.core.errors import BankError, BankNotFoundError, DamageError, OptionError
from svdbank.core.probe import PROBE_SIZE
from svdbank.core.specs import Alias, FamilySpec, from_json


@dataclass(frozen=True)
class StoredBasis:
    """Minor triplets of one weight in a bank. Holding it reads nothing; each method reads what it returns.

    Same methods and column order as :class:`svdbank.core.basis.Basis`. ``exchanged``: what the bank stores is the transpose, so that this
    weight's left vectors are the stored right ones; ``family`` has this weight's shape nevertheless.
    """

    bank: Bank
    family: FamilySpec
    record: WeightRecord
    row: int
    exchanged: bool = False

    @property
    def name(self) -> str:
        """Key in the bank, e.g. ``model.layers.0.self_attn.q_proj.weight``."""
        return self.record.name

    @property
    def module(self) -> str:
        """Dotted path of the module that owns the weight; of a slice of a stacked parameter, the parameter's."""
        return self.record.module

    @property
    def stacked(self) -> bool:
        """True for a slice of a stacked parameter: one expert, reached through the parameter and not through a module."""
        return self.record.name != f"{self.record.module}.weight"

    @property
    def kind(self) -> str:
        """``linear``, ``embedding`` or ``head``."""
        return self.family.kind

    @property
    def dtype(self) -> str:
        """safetensors' dtype name of the base's stored bytes; of quantised weights how values come of codes and scales."""
        return self.record.dtype

    @property
    def source_sha256(self) -> str:
        """sha256 of the base's stored bytes of this weight."""
        return self.record.source_sha256

    @property
    def certificate(self) -> Certificate:
        """The numbers that prove this basis."""
        return self.record.certificate

    @property
    def out_features(self) -> int:
        return self.family.out_features

    @property
    def in_features(self) -> int:
        return self.family.in_features

    @property
    def rank(self) -> int:
        """Largest rank that can be read."""
        return self.family.rank

    def left(self, rank: int) -> Tensor:
        """``U[:, -rank:]``, (out, rank), in PEFT's column order: the last column is the most minor direction."""
        return self.bank.left([self.name], rank)[self.name]

    def right(self, rank: int) -> Tensor:
        """``V[:, -rank:]``, (in, rank), in the order of :meth:`left`."""
        return self.bank.right([self.name], rank)[self.name]

    def sigma(self, rank: int) -> Tensor:
        """The ``rank`` smallest singular values, (rank,) float64, in the order of :meth:`left` (descending)."""
        return self.bank.sigma([self.name], rank)[self.name]

    def probe(self) -> Tensor:
        """Values sampled from the weight, float64, at :func:`svdbank.core.probe.probe_indices`; see :meth:`Bank.probes`."""
        return self.bank.probes([self.name])[self.name]


class Bank:
    """A published bank, read-only. Open one with :func:`svdbank.open` or :func:`open_bank`.

    A mapping from weight names to :class:`StoredBasis`; the bulk reads take many names and cost a few array reads for a whole model.
    Threads may share it.
    """

    def __init__(self, path: Path, manifest: Manifest, index: Index) -> None:
        self.path = path
        self.manifest = manifest
        self.index = index
        self._entries = {
            record.name: StoredBasis(self, family.spec, record, row)
            for family in index.families
            for row, record in enumerate(family.weights)
        }
        self._entries.update({alias.name: _exchanged(alias, self._entries[alias.of]) for alias in index.aliases})
        self._store = BankStore(path, expected=_expected_files(index), read_only=True)
        self._families = {family.spec.name: family for family in index.families}
        self._metadata_seen: set[str] = set()
        self._small: dict[str, NDArray[Any]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """All weight names, family by family."""
        return tuple(self._entries)

    @property
    def rank(self) -> int:
        """Largest rank stored for any weight; small weights are clamped to ``min(out, in)``."""
        return max(family.spec.rank for family in self.index.families)

    @property
    def side(self) -> str:
        """``both``, or ``left`` when right vectors are not stored."""
        return self.manifest.options.side

    @property
    def dtype(self) -> str:
        """Storage dtype of the vectors."""
        return self.manifest.options.dtype

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __repr__(self) -> str:
        return f"Bank({str(self.path)!r}: {len(self)} weights of {self.manifest.base.name}, rank {self.rank}, {self.side}, {self.dtype})"

    def __getitem__(self, name: str) -> StoredBasis:
        try:
            return self._entries[name]
        except KeyError:
            close = difflib.get_close_matches(name, self._entries, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"svdbank.open({str(self.path)!r}).names lists what there is"
            raise BankError(f"{self.path} has no weight {name!r}", hint=hint) from None

    def left(self, names: Iterable[str], rank: int) -> dict[str, Tensor]:
        """``U[:, -rank:]`` of each weight, (out, rank), in PEFT's column order. Raises OptionError for a rank not stored."""
        return {name: rows.flip(0).mT for name, rows in self._vectors("left", names, rank)}

    def right(self, names: Iterable[str], rank: int) -> dict[str, Tensor]:
        """``V[:, -rank:]`` of each weight, (in, rank), in the order of :meth:`left`."""
        if self.side != "both":
            raise OptionError(f"{self.path} holds left vectors only", hint="build one with --side both")
        return {name: rows.flip(0).mT for name, rows in self._vectors("right", names, rank)}

    def sigma(self, names: Iterable[str], rank: int) -> dict[str, Tensor]:
        """The ``rank`` smallest singular values of each weight, (rank,) float64, descending as the columns of :meth:`left`."""
        return {name: rows.flip(0) for name, rows in self._vectors("sigma", names, rank)}

    def principal_left(self, names: Iterable[str], rank: int) -> dict[str, Tensor]:
        """``U[:, :rank]`` of each weight, (out, rank), largest singular value first; for banks built with ``principal``."""
        return {name: rows.mT for name, rows in self._vectors("principal_left", names, rank)}

    def principal_right(self, names: Iterable[str], rank: int) -> dict[str, Tensor]:
        """``V[:, :rank]`` of each weight, (in, rank), in the order of :meth:`principal_left`."""
        if self.side != "both":
            raise OptionError(f"{self.path} holds left vectors only", hint="build one with --side both")
        return {name: rows.mT for name, rows in self._vectors("principal_right", names, rank)}

    def principal_sigma(self, names: Iterable[str], rank: int) -> dict[str, Tensor]:
        """The ``rank`` largest singular values of each weight, (rank,) float64, descending."""
        return dict(self._vectors("principal_sigma", names, rank))

    def probes(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Values sampled from each weight, float64, at :func:`svdbank.core.probe.probe_indices`.

        Of an exchanged weight they are taken from the transpose, at the indices of the transpose's shape.
        """
        return dict(self._read("probe", names, None))

    def base_digest(self, names: Iterable[str] | None = None) -> str:
        """sha256 over names and source hashes of the given weights, by default all: identifies the base, whatever else it holds."""
        return base_digest({name: self[name].source_sha256 for name in (self if names is None else names)})

    def _vectors(self, array: str, names: Iterable[str], rank: int) -> Iterator[tuple[str, Tensor]]:
        names = list(names)
        principal = array.startswith("principal")
        for name in names:
            spec = self[name].family
            stored, limit = spec.principal if principal else spec.rank, min(spec.out_features, spec.in_features)
            if not 1 <= rank <= stored:
                wanted = f"build a bank with --{'principal' if principal else 'rank'} {rank}"
                hint = f"its weight allows no more than {limit}" if rank > limit else wanted
                kind = "principal rank" if principal else "rank"
                raise OptionError(f"{self.path}: {kind} {rank} of {name} is outside 1..{stored}, the ranks stored", hint=hint)
        return self._read(array, names, rank)

    def _read(self, array: str, names: Iterable[str], rank: int | None) -> Iterator[tuple[str, Tensor]]:
        """Rows of one array, family by family, yielded in the order asked for."""
        wanted = [self[name] for name in names]
        found: dict[str, Tensor] = {}
        for family, exchanged in {(basis.family.name, basis.exchanged) for basis in wanted}:
            members = {basis.row: basis.name for basis in wanted if (basis.family.name, basis.exchanged) == (family, exchanged)}
            stored = _OTHER_SIDE.get(array, array) if exchanged else array
            try:
                found.update({members[row]: values for row, values in self._rows(family, stored, sorted(members), rank)})
            except DamageError as damage:
                raise DamageError(str(damage), hint=f"svdbank verify --data {quote(str(self.path))}") from damage
        for basis in wanted:
            yield basis.name, found[basis.name]

    def _rows(self, family: str, array: str, rows: list[int], rank: int | None) -> Iterator[tuple[int, Tensor]]:
        entry = self._families[family]
        vectors = vector_arrays(entry.spec, self.side)
        if array not in vectors or rank is None:
            whole = self._whole(f"{family}/{array}")
            for row in rows:
                yield row, torch.from_numpy(whole[row, :rank])
            return
        if (metadata := f"{family}/{array}/zarr.json") not in self._metadata_seen:
            self._store.read(metadata)
            self._metadata_seen.add(metadata)
        stored_rank, length = vectors[array]
        per_shard = entry.spec.weights_per_shard
        for shard, members in groupby(rows, key=lambda row: row // per_shard):
            inside = [row - shard * per_shard for row in members]
            values = torch.from_numpy(
                read_vectors(
                    self.path / shard_file(family, array, shard),
                    entry.files[array][shard],
                    inside,
                    rank=rank,
                    stored_rank=stored_rank,
                    length=length,
                    weights_per_shard=per_shard,
                    dtype=STORED[self.dtype][0],
                )
            )
            if self.dtype == "bfloat16":
                values = values.view(torch.bfloat16)
            yield from ((shard * per_shard + row, values[position]) for position, row in enumerate(inside))

    def _whole(self, path: str) -> NDArray[Any]:
        """One of a family's small arrays (σ, probes); its metadata must say what the index says before anything is allocated from it."""
        if path not in self._small:
            name, _, kind = path.rpartition("/")
            family = self._families[name].spec
            probe = min(PROBE_SIZE, family.out_features * family.in_features)
            columns = {"sigma": family.rank, "principal_sigma": family.principal}.get(kind, probe)
            try:
                array = zarr.open_array(self._store, path=path, mode="r", zarr_format=3)
                if (array.shape, array.dtype.name) != ((len(family.weights), columns), "float64"):
                    claim = f"claims {array.dtype.name} of {array.shape}, the index says float64 of {(len(family.weights), columns)}"
                    raise DamageError(f"{self.path / path}: {claim}")
                self._small[path] = np.asarray(array[...])
            except (ValueError, KeyError, FileNotFoundError, RuntimeError) as cause:
                # What zarr raises when a checksum or a decoded size does not fit.
                raise DamageError(f"{self.path / path}: {cause}") from cause
        return self._small[path]


#: What an exchanged weight's vectors are called where they are stored.
_OTHER_SIDE = {"left": "right", "right": "left", "principal_left": "principal_right", "principal_right": "principal_left"}


def _exchanged(alias: Alias, of: StoredBasis) -> StoredBasis:
    family = msgspec.structs.replace(
        of.family, kind=alias.kind, out_features=of.family.in_features, in_features=of.family.out_features
    )
    record = msgspec.structs.replace(of.record, name=alias.name, module=alias.module)
    return replace(of, family=family, record=record, exchanged=True)


def base_digest(source_hashes: dict[str, str]) -> str:
    """sha256 over sorted (weight name, sha256 of its stored bytes). Extending a bank leaves the digest of any subset unchanged."""
    digest = hashlib.sha256()
    for name in sorted(source_hashes):
        digest.update(f"{name}\0{source_hashes[name]}\n".encode())
    return digest.hexdigest()


def open_bank(path: str | Path) -> Bank:
    """Open a published bank folder.

    Raises BankNotFoundError where there is none (or one whose build has not finished), DamageError when its manifest or index are
    not the bytes that were published, BankError for a format this version does not know.
    """
    root = Path(path)
    manifest = read_manifest(root)
    index = from_json(
        _recorded_bytes(root, manifest, manifest.index), Index, where=str(root / manifest.index), error=DamageError
    )
    _check_consistent(root, manifest, index)
    return Bank(root, manifest, index)


def read_manifest(root: Path) -> Manifest:
    """The manifest of a published bank; errors as :func:`open_bank`."""
    path = root / MANIFEST
    try:
        data = read_regular(path)
    except FileNotFoundError:
        if (root / "plan.json").is_file():
            raise BankNotFoundError(
                f"{root}: this bank's build has not finished", hint="run the same svdbank build again: it resumes"
            ) from None
        raise BankNotFoundError(
            f"{root}: no bank here", hint="svdbank ls shows the banks there are; svdbank build makes one"
        ) from None
    _check_format(data, path)
    manifest = from_json(data, Manifest, where=str(path), error=DamageError)
    if manifest_digest(data, manifest.digest) != manifest.digest:
        raise DamageError(
            f"{path}: not the manifest that was published", hint=f"svdbank rm {quote(str(root))}, then build it again"
        )
    return manifest


class _Version(msgspec.Struct):
    """The one field that every version of the manifest has; the rest may be anything."""

    format: int


def _check_format(data: bytes, path: Path) -> None:
    """An unknown major version is told apart from damage before the strict decode."""
    version = from_json(data, _Version, where=str(path), error=DamageError).format
    if version != 1:
        raise BankError(f"{path}: format {version}; this svdbank reads format 1", hint="pip install -U svdbank")


def _recorded_bytes(root: Path, manifest: Manifest, name: str) -> bytes:
    record = manifest.files.get(name)
    if record is None or "/" in name or "\\" in name:
        raise DamageError(f"{root / MANIFEST}: {name!r} is not among its files")
    try:
        data = read_regular(root / name)
    except FileNotFoundError:
        raise DamageError(f"{root / name}: missing", hint=f"svdbank verify {quote(str(root))}") from None
    if len(data) != record.size or hashlib.sha256(data).hexdigest() != record.sha256:
        raise DamageError(f"{root / name}: not the bytes that were published", hint=f"svdbank verify {quote(str(root))}")
    return data


def _check_consistent(root: Path, manifest: Manifest, index: Index) -> None:
    """Names must be plain and unique and the counts must fit before any of them is used as a path."""
    seen: set[str] = set()
    for family in index.families:
        spec = family.spec
        plain = spec.name and all(ch.isascii() and ((ch.isalnum() and not ch.isupper()) or ch in "._-") for ch in spec.name)
        if not plain or spec.name.startswith("."):
            raise DamageError(f"{root}: {spec.name!r} is not a family name")
        if tuple(weight.name for weight in family.weights) != spec.weights or not spec.weights:
            raise DamageError(f"{root}: the weights of {spec.name} disagree with its description")
        full = min(spec.out_features, spec.in_features)
        if not (1 <= spec.rank <= full and 0 <= spec.principal <= full and 1 <= spec.weights_per_shard <= len(spec.weights)):
            raise DamageError(f"{root}: {spec.name} claims rank {spec.rank} for {spec.out_features}x{spec.in_features}")
        if seen & set(spec.weights):
            raise DamageError(f"{root}: weights stand in two families")
        # A data file without a record would be read unchecked.
        arrays = {array: len(records) for array, records in family.files.items()}
        if arrays != dict.fromkeys(
            vector_arrays(spec, manifest.options.side), ceil(len(spec.weights) / spec.weights_per_shard)
        ):
            raise DamageError(f"{root}: the index does not record every data file of {spec.name}")
        # Sizes follow from the shapes; an index that claims others would make a lookup allocate or divide by what it says.
        itemsize = np.dtype(STORED[manifest.options.dtype][0]).itemsize
        for array, (_, length) in vector_arrays(spec, manifest.options.side).items():
            chunk_bytes = RANK_CHUNK * length * itemsize + CRC_BYTES
            for record in family.files[array]:
                if record.chunk_bytes != chunk_bytes or not len(record.chunks) * chunk_bytes < record.size:
                    raise DamageError(f"{root}: the index claims chunks of {spec.name}/{array} that its shape does not have")
        seen |= set(spec.weights)
    stored = frozenset(seen)
    for alias in index.aliases:
        if manifest.options.side != "both" or alias.of not in stored or alias.name in seen:
            raise DamageError(f"{root}: {alias.name} cannot be {alias.of} with the sides exchanged")
        seen.add(alias.name)
    if len(seen) != manifest.weights:
        raise DamageError(f"{root}: {len(seen)} weights in the index, {manifest.weights} in the manifest")


def data_files(family: FamilyIndex) -> Iterator[tuple[str, FileRecord]]:
    """Names and records of a family's data files."""
    for array, records in family.files.items():
        for shard, record in enumerate(records):
            yield shard_file(family.spec.name, array, shard), record


def _expected_files(index: Index) -> dict[str, FileRecord]:
    expected: dict[str, FileRecord] = {}
    for family in index.families:
        expected.update(data_files(family))
        expected.update(family.metadata)
    return expected
