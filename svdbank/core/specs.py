"""Frozen descriptions passed between the layers, and their strict JSON form.

Every file of a bank that is JSON decodes into one of these types: an unknown or missing field, or a value of another type, is an
error before anything is used.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable
from math import prod
from typing import Any, Literal, TypeVar

import msgspec

from svdbank.core.errors import SvdbankError

Side = Literal["both", "left"]
StoredDtype = Literal["float32", "float16", "bfloat16"]

#: What a matrix is in its model. A ``router`` of a mixture of experts is a bare parameter, a ``grouped`` one the weight of a linear module
#: that does something else with it (a block for each group of inputs): PEFT adapts both through ``target_parameters``.
WeightKind = Literal["linear", "embedding", "head", "router", "grouped"]


class Struct(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of every description: immutable, comparable, strict when decoded."""


class Quantisation(Struct, frozen=True, omit_defaults=True):
    """How the stored codes of a tensor become its values: each is multiplied by the scale of its block.

    Attributes
    ----------
    scheme
        ``fp8``, ``compressed-tensors`` or ``mxfp4``, the ``quant_method`` of the model's configuration.
    codes
        safetensors' dtype name of what is stored; ``F4`` for two e2m1 codes in each stored byte.
    shape
        (…, rows, columns) of the codes. With ``transposed`` the tensor's shape is (…, columns, rows).
    block
        Rows and columns that share a scale; those at the lower and right edge may be smaller.
    scales
        The tensor of scales, (…, ⌈rows/block⌉, ⌈columns/block⌉) or a single one.
    """

    scheme: Literal["fp8", "compressed-tensors", "mxfp4"]
    codes: str
    shape: tuple[int, ...]
    block: tuple[int, int]
    scales: TensorSource
    transposed: bool = False

    def part(self, index: int) -> Quantisation:
        """What :meth:`TensorSource.part` needs for slice ``index`` of the leading dimension."""
        scales = self.scales.part(index) if len(self.scales.shape) == len(self.shape) else self.scales
        return msgspec.structs.replace(self, shape=self.shape[1:], scales=scales)


class TensorSource(Struct, frozen=True, omit_defaults=True):
    """One tensor of a checkpoint file, or one piece of it: where its bytes lie and how to read them.

    ``begin`` and ``end`` are absolute byte offsets in ``file``; ``dtype`` is safetensors' name (``BF16``, ``F32``, …). A piece is slice
    ``index`` of the leading dimension, or a run of entries in row-major order that begins at entry ``start``; ``shape`` is then that of
    the piece. ``order`` gives the order in which its rows are read: (size, stride) of nested counters, the slowest first. With
    ``quantisation`` the bytes are codes; ``dtype`` and ``shape`` are those of the values that reading gives.
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    index: int | None = None
    start: int | None = None
    order: tuple[tuple[int, int], ...] | None = None
    quantisation: Quantisation | None = None

    @property
    def pieces(self) -> tuple[tuple[str, int, int], ...]:
        """(file, begin, end) of every byte range that reading needs, in the order in which they are hashed: codes, then scales."""
        own = (self.file, self.begin, self.end)
        return (own,) if self.quantisation is None else (own, *self.quantisation.scales.pieces)

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return sum(end - begin for _, begin, end in self.pieces)

    @property
    def loaded_nbytes(self) -> int:
        """Bytes of the values in memory."""
        if self.quantisation is None:
            return self.end - self.begin
        return prod(self.shape) * {"F32": 4, "F16": 2, "BF16": 2}[self.dtype]

    @property
    def stored_as(self) -> str:
        """``dtype``; for quantised values how they are made, e.g. ``BF16 = F8_E4M3 * F32[128x128]``."""
        if self.quantisation is None:
            return self.dtype
        rows, columns = self.quantisation.block
        return f"{self.dtype} = {self.quantisation.codes} * {self.quantisation.scales.dtype}[{rows}x{columns}]"

    def part(self, index: int) -> TensorSource:
        """Slice ``index`` of the leading dimension, e.g. one expert of a stacked (experts, out, in) tensor.

        Raises IndexError outside the dimension, ValueError for a slice of a slice or a dtype whose elements share bytes.
        """
        if self.index is not None or len(self.shape) < 2:
            raise ValueError(f"{self.name!r} of shape {self.shape} has no leading dimension to take a slice of")
        if not 0 <= index < self.shape[0]:
            raise IndexError(f"{self.name!r} has {self.shape[0]} slices, not {index + 1}")
        step, rest = divmod(self.end - self.begin, self.shape[0])
        if rest:
            raise ValueError(f"{self.name!r}: slices of {self.dtype} do not begin at whole bytes")
        begin = self.begin + index * step
        return msgspec.structs.replace(
            self,
            shape=self.shape[1:],
            begin=begin,
            end=begin + step,
            index=index,
            quantisation=None if self.quantisation is None else self.quantisation.part(index),
        )

    def run(self, start: int, shape: tuple[int, ...]) -> TensorSource:
        """The entries from ``start`` on, in row-major order, as a tensor of ``shape``: e.g. the queries of a fused matrix.

        Raises ValueError where the tensor ends before, for a piece of a piece, a dtype whose elements share bytes, and for quantised
        values, whose scales need not divide.
        """
        total, count = prod(self.shape), prod(shape)
        step, rest = divmod(self.end - self.begin, max(total, 1))
        if self.index is not None or self.start is not None or rest or start < 0 or start + count > total:
            raise ValueError(f"{self.name!r} of shape {self.shape} has no {shape} at entry {start}")
        if self.quantisation is not None:
            raise ValueError(f"{self.name!r} is quantised: its scales are not taken apart")
        begin = self.begin + start * step
        return msgspec.structs.replace(self, shape=shape, begin=begin, end=begin + count * step, start=start)

    def block(self, index: int, blocks: int) -> TensorSource:
        """Block ``index`` of ``blocks`` equal blocks of rows. Raises ValueError where rows do not divide, and as :meth:`run`."""
        if self.shape[0] % blocks or not 0 <= index < blocks:
            raise ValueError(f"{self.name!r} of shape {self.shape} has no block {index} of {blocks}")
        shape = (self.shape[0] // blocks, *self.shape[1:])
        return self.run(index * prod(shape), shape)

    def in_order(self, order: tuple[tuple[int, int], ...] | None) -> TensorSource:
        """The same with its rows in another order, see :func:`rows_in_order`; None: as they are stored."""
        return msgspec.structs.replace(self, order=order)

    def is_of(self, whole: TensorSource) -> bool:
        """True when this is ``whole``, or one of its pieces, its rows in whichever order."""
        own = msgspec.structs.replace(self, order=None)
        try:
            if self.index is not None:
                return own == whole.part(self.index)
            return own == (whole if self.start is None else whole.run(self.start, self.shape))
        except (ValueError, IndexError):
            return False


def rows_in_order(order: tuple[tuple[int, int], ...]) -> list[int]:
    """The stored rows in the order in which nested counters of (size, stride), the slowest first, count through them."""
    rows = [0]
    for size, stride in order:
        rows = [row + i * stride for row in rows for i in range(size)]
    return rows


class WeightSpec(Struct, frozen=True, omit_defaults=True):
    """One matrix to decompose, as a module of the loaded model sees it.

    Attributes
    ----------
    name
        Key in the bank: ``model.layers.0.self_attn.q_proj.weight``, or ``model.layers.0.mlp.experts.gate_up_proj.7`` for an expert of
        a stacked parameter.
    module
        Dotted path of the module that owns it; for an expert of a stacked parameter, of that parameter.
    kind
        ``linear``, ``embedding``, ``head``, ``router`` or ``grouped``.
    family
        Slug shared by the weights of the same role and shape; ``[a-z0-9._-]+``.
    out_features, in_features
        Shape of the matrix decomposed, after ``operation``.
    dtype
        safetensors' dtype name of the stored bytes; for quantised weights :attr:`TensorSource.stored_as`.
    operation
        How the matrix comes from its sources: ``as_is``, ``transpose``, or ``concat`` for the rows of several under each other. Each
        source is a tensor, or a slice or block of one.
    layer, expert
        Index in the model where the name has one.
    """

    name: str
    module: str
    kind: WeightKind
    family: str
    out_features: int
    in_features: int
    dtype: str
    sources: tuple[TensorSource, ...]
    operation: Literal["as_is", "transpose", "concat"] = "as_is"
    layer: int | None = None
    expert: int | None = None

    @property
    def stacked(self) -> bool:
        """True for a slice of a stacked parameter, which is no module's weight. A module of its own may be an ``expert`` too."""
        return self.name != f"{self.module}.weight"

    @property
    def rank_full(self) -> int:
        """``min(out, in)``."""
        return min(self.out_features, self.in_features)

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return sum(source.nbytes for source in self.sources)

    @property
    def loaded_nbytes(self) -> int:
        """Bytes of the matrix in memory."""
        return sum(source.loaded_nbytes for source in self.sources)


def quantised_formats(dtypes: Iterable[str]) -> dict[str, int]:
    """How many weights are made of codes and scales, by :attr:`TensorSource.stored_as`; ``dtypes`` are those of specs or records."""
    return dict(sorted(Counter(dtype for dtype in dtypes if " = " in dtype).items()))


class Skip(Struct, frozen=True):
    """A tensor left out, and why."""

    name: str
    shape: tuple[int, ...]
    reason: str


class SourceFile(Struct, frozen=True):
    """One weight file of a checkpoint. ``identity`` is the Hub's file id, or size and time of a local file."""

    name: str
    size: int
    identity: str


class BaseSpec(Struct, frozen=True):
    """Which model a bank describes: ``name`` and ``revision`` are for people, the digests decide."""

    name: str
    revision: str | None
    config_digest: str


class BuildOptions(Struct, frozen=True):
    """What a build was asked for. ``rank`` is clamped for weights that allow less; ``all`` is every triplet."""

    rank: int | Literal["all"]
    side: Side
    dtype: StoredDtype
    solver: str
    principal: int


class FamilySpec(Struct, frozen=True):
    """Weights of one role and shape, stacked along one axis. ``rank`` is what the bank stores of each, after clamping."""

    name: str
    kind: WeightKind
    out_features: int
    in_features: int
    rank: int
    principal: int
    weights_per_shard: int
    weights: tuple[str, ...]


class Alias(Struct, frozen=True):
    """A weight whose matrix is the transpose of another's, ``of``: a tied output head and its embedding. One SVD, the sides exchanged."""

    name: str
    module: str
    kind: Literal["embedding", "head"]
    of: str


class ShardSpec(Struct, frozen=True):
    """The unit of work, record, resume and repair: ``weights[start:stop]`` of a family, solved on ``path`` with ``threads``."""

    family: str
    index: int
    start: int
    stop: int
    path: str
    threads: int


class DevicePath(Struct, frozen=True):
    """How a kind of GPU solves the weights of a family: on ``path``, ``batch`` of them at once (1: each by itself)."""

    path: str
    batch: int


class Plan(Struct, frozen=True, omit_defaults=True):
    """What a build will do, from headers alone. Fixes every byte of the bank; frozen into it.

    ``shards`` say how a CPU solves; ``devices`` maps each kind of GPU to what it does for each family, so that a bank begun on one machine
    goes on on another. ``decided`` is who knew which matrices a model of these tensors has: ``table`` (this package's own), Transformers'
    version and class, or ``names`` where nobody did, and ``doubt`` then says why. ``sources`` is the file of the :class:`Sources` that
    belong to it, named by content; it goes when the bank is published.
    """

    format: Literal[1]
    base: BaseSpec
    options: BuildOptions
    families: tuple[FamilySpec, ...]
    shards: tuple[ShardSpec, ...]
    skips: tuple[Skip, ...]
    aliases: tuple[Alias, ...] = ()
    devices: dict[str, dict[str, DevicePath]] = {}
    decided: str = "table"
    doubt: str | None = None
    sources: str = ""


class Sources(Struct, frozen=True):
    """Which bytes a plan is of: frozen with it, so that whoever joins the work reads these and no others, and no header again.

    ``targets`` are what was asked for, ``files`` the weight files with their identities (the Hub's ids; size, time and header of local
    ones), ``weights`` those of the plan with their byte ranges.
    """

    format: Literal[1]
    name: str
    revision: str | None
    targets: tuple[str, ...]
    files: tuple[SourceFile, ...]
    weights: tuple[WeightSpec, ...]


class Progress(Struct, frozen=True):
    """One step of a long call, for whoever shows it: ``done`` of ``total`` ``unit`` of ``stage``, now at ``item``."""

    stage: str
    done: float
    total: float
    unit: str
    item: str = ""


class BuildProgress(Progress, frozen=True):
    """Progress of the solves of a build: ``done`` and ``total`` weights, and the same in bytes to read and flops.

    ``seconds_left`` at the rate so far, None before there is one; ``workers`` are at it here, of whom ``waiting`` have nothing to solve
    until bytes have come.
    """

    bytes_done: int = 0
    bytes_total: int = 0
    flops_done: float = 0.0
    flops_total: float = 0.0
    seconds_left: float | None = None
    workers: int = 1
    waiting: tuple[str, ...] = ()


#: What a long call reports to.
ProgressCallback = Callable[[Progress], None]


def ignore_progress(progress: Progress) -> None:
    """The callback of a caller who gave none."""
    del progress


T = TypeVar("T")


def to_json(value: object, *, indent: int = 0) -> bytes:
    """Deterministic JSON: keys in declaration order, floats in shortest exact form, one trailing newline."""
    data = msgspec.json.encode(value)
    return (msgspec.json.format(data, indent=indent) if indent else data) + b"\n"


_decoders: dict[Any, msgspec.json.Decoder[Any]] = {}
_making = threading.Lock()


def _decoder(kind: type[T]) -> msgspec.json.Decoder[T]:
    """The strict decoder of a type, made once: msgspec works a type out at its first use, and two threads that do so at once crash."""
    with _making:
        if kind not in _decoders:
            _decoders[kind] = msgspec.json.Decoder(kind, strict=True)
        return _decoders[kind]


def from_json(data: bytes, kind: type[T], *, where: str, error: type[SvdbankError]) -> T:
    """Decode strictly into ``kind``; ``error`` names the place and the field that does not fit."""
    try:
        return _decoder(kind).decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as cause:
        raise error(f"{where}: not a valid {getattr(kind, '__name__', 'document')}: {cause}") from cause
