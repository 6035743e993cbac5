"""Frozen descriptions passed between the layers, and their strict JSON form.

Every file of a bank that is JSON decodes into one of these types: an unknown or missing field, or a value of another type, is an
error before anything is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeVar

import msgspec

from svdbank.errors import SvdbankError

Side = Literal["both", "left"]
StoredDtype = Literal["float32", "float16", "bfloat16"]


class Struct(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of every description: immutable, comparable, strict when decoded."""


class TensorSource(Struct, frozen=True):
    """One tensor of a checkpoint file, or one slice of its leading dimension: where its bytes lie and how to read them.

    ``begin`` and ``end`` are absolute byte offsets in ``file``; ``dtype`` is safetensors' name (``BF16``, ``F32``, …). ``index`` is
    the slice's, None for the whole tensor; ``shape`` is then that of the slice.
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    index: int | None = None

    @property
    def nbytes(self) -> int:
        return self.end - self.begin

    def part(self, index: int) -> TensorSource:
        """Slice ``index`` of the leading dimension, e.g. one expert of a stacked (experts, out, in) tensor.

        Raises IndexError outside the dimension, ValueError for a slice of a slice or a dtype whose elements share bytes.
        """
        if self.index is not None or len(self.shape) < 2:
            raise ValueError(f"{self.name!r} of shape {self.shape} has no leading dimension to take a slice of")
        if not 0 <= index < self.shape[0]:
            raise IndexError(f"{self.name!r} has {self.shape[0]} slices, not {index + 1}")
        step, rest = divmod(self.nbytes, self.shape[0])
        if rest:
            raise ValueError(f"{self.name!r}: slices of {self.dtype} do not begin at whole bytes")
        begin = self.begin + index * step
        return msgspec.structs.replace(self, shape=self.shape[1:], begin=begin, end=begin + step, index=index)


class WeightSpec(Struct, frozen=True):
    """One matrix to decompose, as a module of the loaded model sees it.

    Attributes
    ----------
    name
        Key in the bank, e.g. ``model.layers.0.self_attn.q_proj.weight``.
    module
        Dotted path of the module that owns it.
    kind
        ``linear``, ``embedding`` or ``head``.
    family
        Slug shared by the weights of the same role and shape; ``[a-z0-9._-]+``.
    out_features, in_features
        Shape of the matrix decomposed, after ``operation``.
    dtype
        safetensors' dtype name of the stored bytes.
    operation
        How the matrix comes from its sources: ``as_is`` or ``transpose``.
    layer, expert
        Index in the model where the name has one.
    """

    name: str
    module: str
    kind: Literal["linear", "embedding", "head"]
    family: str
    out_features: int
    in_features: int
    dtype: str
    sources: tuple[TensorSource, ...]
    operation: Literal["as_is", "transpose"] = "as_is"
    layer: int | None = None
    expert: int | None = None

    @property
    def rank_full(self) -> int:
        """``min(out, in)``."""
        return min(self.out_features, self.in_features)

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return sum(source.nbytes for source in self.sources)


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
    kind: Literal["linear", "embedding", "head"]
    out_features: int
    in_features: int
    rank: int
    principal: int
    weights_per_shard: int
    weights: tuple[str, ...]


class ShardSpec(Struct, frozen=True):
    """The unit of work, record, resume and repair: ``weights[start:stop]`` of a family, solved on ``path`` with ``threads``."""

    family: str
    index: int
    start: int
    stop: int
    path: str
    threads: int


class Plan(Struct, frozen=True):
    """What a build will do, from headers alone. Fixes every byte of the bank; frozen into it."""

    format: Literal[1]
    base: BaseSpec
    options: BuildOptions
    families: tuple[FamilySpec, ...]
    shards: tuple[ShardSpec, ...]
    skips: tuple[Skip, ...]


class Progress(Struct, frozen=True):
    """One step of a long call, for whoever shows it: ``done`` of ``total`` ``unit`` of ``stage``, now at ``item``."""

    stage: str
    done: float
    total: float
    unit: str
    item: str = ""


#: What a long call reports to.
ProgressCallback = Callable[[Progress], None]


T = TypeVar("T")


def to_json(value: object, *, indent: int = 0) -> bytes:
    """Deterministic JSON: keys in declaration order, floats in shortest exact form, one trailing newline."""
    data = msgspec.json.encode(value)
    return (msgspec.json.format(data, indent=indent) if indent else data) + b"\n"


def from_json(data: bytes, kind: type[T], *, where: str, error: type[SvdbankError]) -> T:
    """Decode strictly into ``kind``; ``error`` names the place and the field that does not fit."""
    try:
        return msgspec.json.decode(data, type=kind, strict=True)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as cause:
        raise error(f"{where}: not a valid {getattr(kind, '__name__', 'document')}: {cause}") from cause
