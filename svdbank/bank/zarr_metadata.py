"""Which Zarr metadata a bank may contain.

Zarr metadata comes from strangers and selects code to run (codecs, filters). It is decoded into these strict types before zarr sees
it: version 3 only, no consolidated metadata (zarr would believe it over the children), and only the codecs and types a bank uses.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from svdbank.core.errors import DamageError
from svdbank.core.specs import Struct, from_json

#: Lengths along an axis, and how many axes and codecs there may be: what follows from them is bounded before zarr or a reader computes it.
_Length = Annotated[int, msgspec.Meta(ge=1, le=1 << 40)]
_Shape = Annotated[tuple[_Length, ...], msgspec.Meta(min_length=1, max_length=3)]


class _BytesOptions(Struct, frozen=True):
    endian: Literal["little"]


class _BytesCodec(Struct, frozen=True, tag_field="name", tag="bytes"):
    configuration: _BytesOptions | None = None


class _Crc32cCodec(Struct, frozen=True, tag_field="name", tag="crc32c"):
    configuration: None = None


class _ShardingOptions(Struct, frozen=True):
    chunk_shape: _Shape
    codecs: Annotated[tuple[_BytesCodec | _Crc32cCodec, ...], msgspec.Meta(min_length=1, max_length=2)]
    index_codecs: Annotated[tuple[_BytesCodec | _Crc32cCodec, ...], msgspec.Meta(min_length=1, max_length=2)]
    index_location: Literal["end"]


class _ShardingCodec(Struct, frozen=True, tag_field="name", tag="sharding_indexed"):
    configuration: _ShardingOptions


class _GridOptions(Struct, frozen=True):
    chunk_shape: _Shape


class _Grid(Struct, frozen=True):
    name: Literal["regular"]
    configuration: _GridOptions


class _KeyOptions(Struct, frozen=True):
    separator: Literal["/"]


class _Keys(Struct, frozen=True):
    name: Literal["default"]
    configuration: _KeyOptions


_INTEGERS = {"uint8": (0, 255), "uint16": (0, 65535), "int32": (-(1 << 31), (1 << 31) - 1)}


class ArrayMetadata(Struct, frozen=True, tag_field="node_type", tag="array"):
    """``zarr.json`` of an array."""

    zarr_format: Literal[3]
    shape: _Shape
    data_type: Literal["float64", "float32", "float16", "uint16", "uint8", "int32"]
    chunk_grid: _Grid
    chunk_key_encoding: _Keys
    fill_value: float | int | str
    codecs: Annotated[tuple[_BytesCodec | _Crc32cCodec | _ShardingCodec, ...], msgspec.Meta(min_length=1, max_length=2)]
    dimension_names: Annotated[tuple[str, ...], msgspec.Meta(min_length=1, max_length=3)]
    attributes: dict[str, Any] = msgspec.field(default_factory=dict)
    storage_transformers: tuple[()] = ()

    @property
    def is_whole(self) -> bool:
        """True where the fields fit each other: as many axes everywhere, chunks that shards are made of, a fill value of the type."""
        grid = self.chunk_grid.configuration.chunk_shape
        if not len(self.shape) == len(grid) == len(self.dimension_names):
            return False
        for codec in self.codecs:
            if isinstance(codec, _ShardingCodec):
                inner = codec.configuration.chunk_shape
                if len(inner) != len(grid) or any(outer % part for outer, part in zip(grid, inner, strict=True)):
                    return False
        if self.data_type.startswith("float"):
            return self.fill_value in ("NaN", 0, 0.0)
        low, high = _INTEGERS[self.data_type]
        return type(self.fill_value) is int and low <= self.fill_value <= high

    def is_sharded(self, shard: tuple[int, ...], chunk: tuple[int, ...]) -> bool:
        """True for the layout of singular vectors: shards of chunks that are little-endian bytes and their crc32c, the table at the end."""
        plain = (_BytesCodec(_BytesOptions("little")), _Crc32cCodec())
        options = _ShardingOptions(chunk, plain, plain, "end")
        return self.chunk_grid.configuration.chunk_shape == shard and self.codecs == (_ShardingCodec(options),)

    @property
    def is_one_chunk(self) -> bool:
        """True for the layout of coordinate arrays: all in one chunk, little-endian bytes and their crc32c."""
        return self.chunk_grid.configuration.chunk_shape == self.shape and self.codecs == (
            _BytesCodec(_BytesOptions("little")),
            _Crc32cCodec(),
        )


class GroupMetadata(Struct, frozen=True, tag_field="node_type", tag="group"):
    """``zarr.json`` of a group."""

    zarr_format: Literal[3]
    attributes: dict[str, Any] = msgspec.field(default_factory=dict)


def checked_metadata(data: bytes, *, where: str) -> ArrayMetadata | GroupMetadata:
    """Decode a ``zarr.json``; raises :class:`DamageError` for anything a bank of this format would not contain."""
    metadata: ArrayMetadata | GroupMetadata = from_json(data, ArrayMetadata | GroupMetadata, where=where, error=DamageError)  # type: ignore[arg-type]
    if isinstance(metadata, ArrayMetadata) and not metadata.is_whole:
        raise DamageError(f"{where}: its fields do not fit each other")
    return metadata
