"""A published bank, opened for lookups."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Literal

import msgspec

from svdbank.bank.chunks import ShardRead, read_chunks
from svdbank.bank.files import Files, Folder
from svdbank.bank.index import base_digest, check_vectors, read_coordinates, read_index, read_manifest
from svdbank.bank.layout import ITEMSIZE, RANK_CHUNK, STORED, Index, Manifest, WeightRecord, shard_file, vector_arrays
from svdbank.bank.spectrum import Spectrum, weight_spectrum
from svdbank.core.errors import BankError, DamageError, OptionError
from svdbank.core.specs import Alias, FamilySpec, WeightKind

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from svdbank.core.basis import Certificate

#: Arrays whose rows along the rank axis can be read, and those beside the vectors.
StoredArray = Literal["left", "right", "sigma", "principal_left", "principal_right", "principal_sigma"]
Coordinate = Literal["sigma", "principal_sigma", "probe"]


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
    def kind(self) -> WeightKind:
        """``linear``, ``embedding``, ``head``, ``router`` or ``grouped``."""
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

    def __init__(self, files: Files, manifest: Manifest, index: Index) -> None:
        self.files = files
        self.manifest = manifest
        self.index = index
        self._entries = {
            record.name: StoredBasis(self, family.spec, record, row)
            for family in index.families
            for row, record in enumerate(family.weights)
        }
        self._entries.update({alias.name: _exchanged(alias, self._entries[alias.of]) for alias in index.aliases})
        self._families = {family.spec.name: family for family in index.families}
        self._metadata_seen: set[tuple[str, str]] = set()
        self._coordinates: dict[tuple[str, str], memoryview[float]] = {}

    @property
    def place(self) -> str:
        """The bank's folder or address, for people: what :func:`svdbank.open` takes."""
        return self.files.place

    @property
    def path(self) -> Path:
        """The folder of a bank on this disk; BankError for one that is read from afar."""
        if not isinstance(self.files, Folder):
            raise BankError(
                f"{self.place} is read from afar, and this needs a folder", hint=f"svdbank pull {quote(self.place)}"
            )
        return self.files.root

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
        return f"Bank({self.place!r}: {len(self)} weights of {self.manifest.base.name}, rank {self.rank}, {self.side}, {self.dtype})"

    def __getitem__(self, name: str) -> StoredBasis:
        try:
            return self._entries[name]
        except KeyError:
            close = difflib.get_close_matches(name, self._entries, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"svdbank.open({self.place!r}).names lists what there is"
            raise BankError(f"{self.place} has no weight {name!r}", hint=hint) from None

    def left(self, names: Iterable[str], rank: int) -> dict[str, Tensor]:
        """``U[:, -rank:]`` of each weight, (out, rank), in PEFT's column order. Raises OptionError for a rank not stored."""
        return {name: rows.flip(0).mT for name, rows in self.rows("left", names, rank).items()}

    def right(self, names: Iterable[str], rank: int) -> dict[str, Tensor]:
        """``V[:, -rank:]`` of each weight, (in, rank), in the order of :meth:`left`."""
        return {name: rows.flip(0).mT for name, rows in self.rows("right", names, rank).items()}

    def sigma(self, names: Iterable[str], rank: int) -> dict[str, Tensor]:
        """The ``rank`` smallest singular values of each weight, (rank,) float64, descending as the columns of :meth:`left`."""
        return {name: rows.flip(0) for name, rows in self.rows("sigma", names, rank).items()}

    def principal_left(self, names: Iterable[str], rank: int) -> dict[str, Tensor]:
        """``U[:, :rank]`` of each weight, (out, rank), largest singular value first; for banks built with ``principal``."""
        return {name: rows.mT for name, rows in self.rows("principal_left", names, rank).items()}

    def principal_right(self, names: Iterable[str], rank: int) -> dict[str, Tensor]:
        """``V[:, :rank]`` of each weight, (in, rank), in the order of :meth:`principal_left`."""
        return {name: rows.mT for name, rows in self.rows("principal_right", names, rank).items()}

    def principal_sigma(self, names: Iterable[str], rank: int) -> dict[str, Tensor]:
        """The ``rank`` largest singular values of each weight, (rank,) float64, descending."""
        return self.rows("principal_sigma", names, rank)

    def rows(self, array: StoredArray, names: Iterable[str], rank: int | None = None) -> dict[str, Tensor]:
        """The first ``rank`` rows, by default all, of each weight as they are stored: the outermost triplet first, every rank a prefix.

        Vectors are (rank, out) or (rank, in) in the bank's dtype, σ are (rank,) float64; of the minor end the smallest σ is row 0.
        OptionError for a rank, or a side, that is not stored.
        """
        if array.endswith("right") and self.side != "both":
            raise OptionError(f"{self.place} holds left vectors only", hint="build one with --side both")
        wanted = [self[name] for name in names]
        for basis in wanted:
            self._check_rank(basis, rank, principal=array.startswith("principal"))
        try:
            if array in ("sigma", "principal_sigma"):
                return self._coordinate_rows(array, wanted, rank)
            return self._vectors(array, wanted, rank)
        except DamageError as damage:
            raise self._with_hint(damage) from damage

    def probes(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Values sampled from each weight, float64, at :func:`svdbank.core.probe.probe_indices`.

        Of an exchanged weight they are taken from the transpose, at the indices of the transpose's shape.
        """
        try:
            return self._coordinate_rows("probe", [self[name] for name in names], None)
        except DamageError as damage:
            raise self._with_hint(damage) from damage

    def coordinate(self, family: str, array: Coordinate) -> memoryview[float]:
        """One of a family's float64 arrays, (weights, columns), in stored order; read once. Loads no torch, but for the probe."""
        return self.coordinates([family], array)[family]

    def coordinates(self, families: Iterable[str], array: Coordinate) -> dict[str, memoryview[float]]:
        """:meth:`coordinate` of several families, in one round of reading."""
        families = list(families)
        missing = [name for name in families if (name, array) not in self._coordinates]
        if missing:
            wanted = [(self._families[name], self._columns(self._families[name].spec, array)) for name in missing]
            found = read_coordinates(self.files, array, wanted)
            self._coordinates.update({(name, array): values for name, values in zip(missing, found, strict=True)})
        return {name: self._coordinates[name, array] for name in families}

    @staticmethod
    def _columns(spec: FamilySpec, array: Coordinate) -> int:
        if array == "probe":
            from svdbank.core.probe import PROBE_SIZE

            return min(PROBE_SIZE, spec.out_features * spec.in_features)
        return spec.rank if array == "sigma" else spec.principal

    def spectrum(self) -> Spectrum:
        """The ends of every weight's spectrum, its condition, gap, resolved rank and certificate: a row for each, in the bank's order.

        Reads σ, no vectors. DamageError where they are not as published.
        """
        try:
            sigma = {name: self.coordinate(name, "sigma").tolist() for name in self._families}
        except DamageError as damage:
            raise self._with_hint(damage) from damage
        rows = []
        for basis in self._entries.values():
            stored = basis.family.name
            rows.append(weight_spectrum(basis.record, basis.family, stored, sigma[stored][basis.row]))  # type: ignore[arg-type]
        return Spectrum(rows)

    def base_digest(self, names: Iterable[str] | None = None) -> str:
        """sha256 over names and source hashes of the given weights, by default all: identifies the base, whatever else it holds."""
        return base_digest({name: self[name].source_sha256 for name in (self if names is None else names)})

    def _check_rank(self, basis: StoredBasis, rank: int | None, *, principal: bool) -> None:
        spec = basis.family
        stored, limit = spec.principal if principal else spec.rank, min(spec.out_features, spec.in_features)
        rank = stored if rank is None else rank
        if not 1 <= rank <= stored:
            wanted = f"build a bank with --{'principal' if principal else 'rank'} {rank}"
            hint = f"its weight allows no more than {limit}" if rank > limit else wanted
            kind = "principal rank" if principal else "rank"
            raise OptionError(
                f"{self.place}: {kind} {rank} of {basis.name} is outside 1..{stored}, the ranks stored", hint=hint
            )

    def _with_hint(self, damage: DamageError) -> DamageError:
        return DamageError(str(damage), hint=f"svdbank verify --data {quote(self.place)}")

    def _coordinate_rows(self, array: Coordinate, wanted: list[StoredBasis], rank: int | None) -> dict[str, Tensor]:
        """The first ``rank`` columns, by default all, of one of the float64 arrays: (columns,) of each weight, its own copy."""
        import numpy as np
        import torch

        found = self.coordinates({b.family.name for b in wanted}, array)
        families = {family: np.asarray(values) for family, values in found.items()}
        return {b.name: torch.from_numpy(families[b.family.name][b.row, :rank].copy()) for b in wanted}

    def shard_reads(self, array: Literal["left", "right"], rank: int) -> list[ShardRead]:
        """Of all that is stored, what holds the first ``rank`` rows of an array, or all where a weight has fewer."""
        return [
            read
            for family, entry in self._families.items()
            for read in self._shard_reads(family, array, list(range(len(entry.weights))), min(rank, entry.spec.rank))
        ]

    def _vectors(self, array: str, wanted: list[StoredBasis], rank: int | None) -> dict[str, Tensor]:
        """Rows of one array of vectors, of whichever families: two rounds of reading for all of them."""
        rows: dict[tuple[str, str], set[int]] = {}
        for basis in wanted:
            rows.setdefault((basis.family.name, _stored_array(basis, array)), set()).add(basis.row)
        if unseen := rows.keys() - self._metadata_seen:
            check_vectors(self.files, [(self._families[family], of) for family, of in sorted(unseen)], self.manifest.options)
            self._metadata_seen |= unseen
        reads = {key: self._shard_reads(*key, sorted(members), rank) for key, members in rows.items()}
        chunks = read_chunks(self.files, [read for shards in reads.values() for read in shards])
        found = {
            key: [vectors for read in shards for vectors in _tensors(next(chunks), len(read.rows), read.rank, self.dtype)]
            for key, shards in reads.items()
        }
        places = {(*key, row): found[key][i] for key, members in rows.items() for i, row in enumerate(sorted(members))}
        return {basis.name: places[basis.family.name, _stored_array(basis, array), basis.row] for basis in wanted}

    def _shard_reads(self, family: str, array: str, rows: list[int], rank: int | None) -> list[ShardRead]:
        """What to read for some rows, ascending, of a family's array of vectors."""
        entry = self._families[family]
        stored, _ = vector_arrays(entry.spec, self.side)[array]
        each = entry.spec.weights_per_shard
        return [
            ShardRead(
                shard_file(family, array, shard),
                entry.files[array][shard],
                tuple(row % each for row in members),
                stored if rank is None else rank,
                weights_per_shard=each,
                stored_rank=stored,
            )
            for shard, members in groupby(rows, key=lambda row: row // each)
        ]


def _tensors(chunks: list[NDArray[np.uint8]], rows: int, rank: int, dtype: str) -> Iterator[Tensor]:
    """The first ``rank`` vectors of each row of a shard, (rank, length) in the bank's dtype."""
    import numpy as np
    import torch

    values = np.empty((len(chunks), chunks[0].size), np.uint8)
    for value, chunk in zip(values, chunks, strict=True):
        value[:] = chunk
    for vectors in values.view(STORED[dtype][0]).reshape(rows, -1, chunks[0].size // ITEMSIZE[dtype] // RANK_CHUNK):
        tensor = torch.from_numpy(vectors[:rank])
        yield tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor


def _stored_array(basis: StoredBasis, array: str) -> str:
    return _OTHER_SIDE[array] if basis.exchanged else array


#: What an exchanged weight's vectors are called where they are stored.
_OTHER_SIDE = {"left": "right", "right": "left", "principal_left": "principal_right", "principal_right": "principal_left"}


def _exchanged(alias: Alias, of: StoredBasis) -> StoredBasis:
    family = msgspec.structs.replace(
        of.family, kind=alias.kind, out_features=of.family.in_features, in_features=of.family.out_features
    )
    record = msgspec.structs.replace(of.record, name=alias.name, module=alias.module)
    return replace(of, family=family, record=record, exchanged=True)


def open_bank(path: str | Path, *, may_be_empty: bool = False) -> Bank:
    """Open a published bank folder.

    Raises BankNotFoundError where there is none (or one whose build has not finished), DamageError when its manifest or index are
    not the bytes that were published, or of no weight unless it ``may_be_empty``, BankError for a format this version does not know.
    """
    files = Folder(Path(path))
    manifest = read_manifest(files)
    return Bank(files, manifest, read_index(files, manifest, may_be_empty=may_be_empty))
