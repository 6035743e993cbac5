"""The header of a safetensors file, checked in full before anything is allocated from what it says.

Layout (https://github.com/huggingface/safetensors#format): eight bytes of little-endian length N, N bytes of JSON, then the data
that the offsets in the JSON must tile exactly.
"""

from __future__ import annotations

from math import prod
from typing import Any

from svdbank.checkpoint.documents import check_name, parse_object
from svdbank.checkpoint.dtypes import BITS
from svdbank.core.errors import CheckpointError
from svdbank.core.specs import TensorSource

#: The limit of the reference implementation.
MAX_HEADER = 100_000_000

#: torch itself stops at 64 dimensions.
MAX_DIMENSIONS = 64

#: Bytes that hold the header's length.
PREFIX = 8


def header_length(prefix: bytes, *, size: int, where: str) -> int:
    """Length of the JSON header, from the first eight bytes of a file of ``size`` bytes."""
    if len(prefix) < PREFIX:
        raise CheckpointError(f"{where}: {size} bytes are too few for a safetensors file")
    if prefix[:PREFIX] == b"version ":
        raise CheckpointError(
            f"{where}: a pointer of Git LFS, of {size} bytes, in place of the file itself",
            hint="git lfs pull in that folder, or hf download the repository",
        )
    length = int.from_bytes(prefix[:PREFIX], "little")
    if length > MAX_HEADER:
        raise CheckpointError(f"{where}: the header claims {length} bytes; the format allows {MAX_HEADER}")
    if length < 2 or PREFIX + length > size:
        raise CheckpointError(
            f"{where}: the header claims {length} bytes, the file holds {max(0, size - PREFIX)} after its length"
        )
    return length


def parse_header(header: bytes, *, file: str, size: int, where: str) -> dict[str, TensorSource]:
    """The tensors of one file, in the order of their bytes.

    ``header`` is the JSON, ``size`` that of the whole file. Offsets in the result are absolute. Raises CheckpointError, naming
    ``where`` and the tensor, when a dtype is unknown, dtype × shape is not the number of bytes, or the byte ranges overlap, leave
    holes or end elsewhere than the file.
    """
    if header[:1] != b"{":
        raise CheckpointError(f"{where}: the header does not begin with '{{': not a safetensors file")
    entries = parse_object(header, f"{where}: header")
    metadata = entries.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{where}: header: __metadata__ must map strings to strings")
    base = PREFIX + len(header)
    sources = [_source(name, entry, file=file, base=base, where=where) for name, entry in entries.items()]
    sources.sort(key=lambda source: (source.begin, source.end, source.name))
    position = base
    for source in sources:
        if source.begin != position:
            what = "overlaps the tensor before it" if source.begin < position else "leaves a hole before it"
            raise CheckpointError(
                f"{where}: tensor {source.name!r} begins at {source.begin - base}, not {position - base}: it {what}"
            )
        position = source.end
    if position != size:
        what = "beyond the end of" if position > size else "short of the end of"
        raise CheckpointError(
            f"{where}: the tensors end at byte {position}, {what} the file ({size} bytes)",
            hint="the file was cut off or is not what its header says: download it again",
        )
    return {source.name: source for source in sources}


def _source(name: str, entry: Any, *, file: str, base: int, where: str) -> TensorSource:
    check_name(name, f"{where}: header")
    what = f"{where}: tensor {name!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{what}: needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise CheckpointError(f"{what}: unknown dtype {str(dtype)[:40]!r}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(_is_size(n) for n in shape):
        raise CheckpointError(f"{what}: the shape is not a list of at most {MAX_DIMENSIONS} non-negative integers below 2**63")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(n) for n in offsets) or offsets[0] > offsets[1]:
        raise CheckpointError(f"{what}: data_offsets are not two ascending non-negative integers")
    begin, end = offsets
    bits = prod(shape) * BITS[dtype]
    if bits != 8 * (end - begin):
        raise CheckpointError(f"{what}: {dtype} of shape {shape} takes {bits / 8:.15g} bytes, data_offsets span {end - begin}")
    return TensorSource(name=name, file=file, dtype=dtype, shape=tuple(shape), begin=base + begin, end=base + end)


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63
