"""Which Zarr metadata a bank may contain.

Zarr metadata comes from strangers and selects code to run (codecs, filters). It is decoded into these strict types before zarr sees
it: version 3 only, no consolidated metadata (zarr would believe it over the children), and only the codecs and types a bank uses.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from svdbank.core.errors import DamageError
from svdbank.core.specs import Struct, from_json


class _BytesOptions(Struct, frozen=True):
    endian: Literal["little"]


class _BytesCodec(Struct, frozen=True, tag_field="name", tag="bytes"):
    configuration: _BytesOptions | None = None


class _Crc32cCodec(Struct, frozen=True, tag_field="name", tag="crc32c"):
    configuration: None = None


class _ShardingOptions(Struct, frozen=True):
    chunk_shape: tuple[int, ...]
    codecs: tuple[_BytesCodec | _Crc32cCodec, ...]
    index_codecs: tuple[_BytesCodec | _Crc32cCodec, ...]
    index_location: Literal["end"]


class _ShardingCodec(Struct, frozen=True, tag_field="name", tag="sharding_indexed"):
    configuration: _ShardingOptions


class _GridOptions(Struct, frozen=True):
    chunk_shape: tuple[int, ...]


class _Grid(Struct, frozen=True):
    name: Literal["regular"]
    configuration: _GridOptions


class _KeyOptions(Struct, frozen=True):
    separator: Literal["/"]


class _Keys(Struct, frozen=True):
    name: Literal["default"]
    configuration: _KeyOptions


class ArrayMetadata(Struct, frozen=True, tag_field="node_type", tag="array"):
    """``zarr.json`` of an array."""

    zarr_format: Literal[3]
    shape: tuple[int, ...]
    data_type: Literal["float64", "float32", "float16", "uint16", "uint8", "int32"]
    chunk_grid: _Grid
    chunk_key_encoding: _Keys
    fill_value: float | int | str
    codecs: tuple[_BytesCodec | _Crc32cCodec | _ShardingCodec, ...]
    dimension_names: tuple[str, ...]
    attributes: dict[str, Any] = msgspec.field(default_factory=dict)
    storage_transformers: tuple[()] = ()

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
    return from_json(data, ArrayMetadata | GroupMetadata, where=where, error=DamageError)  # type: ignore[arg-type]
