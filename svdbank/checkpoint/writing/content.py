"""What the weight files of a written checkpoint consist of: headers, and blocks that are kept or changed."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

from svdbank.checkpoint.dtypes import FLOATING, torch_dtype
from svdbank.checkpoint.header import PREFIX, header_length
from svdbank.checkpoint.source import Checkpoint
from svdbank.checkpoint.writing.blocks import FileBlock, Piece, copied, cut
from svdbank.core.errors import OptionError
from svdbank.core.specs import TensorSource, WeightSpec


@dataclass(frozen=True)
class Content:
    """Files of ``checkpoint`` with ``pieces`` of its tensors changed.

    Attributes
    ----------
    stored_as
        safetensors' name of the dtype that every floating tensor gets; None for its own.
    anew
        False where every file keeps its header, and every byte but those of the pieces.
    """

    checkpoint: Checkpoint
    pieces: Mapping[str, list[Piece]]
    stored_as: str | None
    anew: bool

    def blocks(self, file: str) -> list[FileBlock]:
        """In the order of the file that is written; of one with a header made :attr:`anew`, what follows that."""
        return list(self._values(file) if self.anew else self._bytes(file))

    def header(self, file: str) -> bytes:
        """For a file made anew: same order, same metadata, the dtypes that are written."""
        header: dict[str, Any] = {}
        if (metadata := _metadata(self.checkpoint, file)) is not None:
            header["__metadata__"] = metadata
        offset = 0
        for tensor in self._tensors(file):
            end = offset + self._nbytes(tensor)
            header[tensor.name] = {"dtype": self.dtype(tensor), "shape": list(tensor.shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(PREFIX, "little") + text

    def dtype(self, source: TensorSource) -> str:
        """In which a tensor is written, by safetensors' name."""
        return self.stored_as if self.stored_as is not None and source.dtype in FLOATING else source.dtype

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(self._nbytes(source) for source in self.checkpoint.tensors.values())

    def _nbytes(self, source: TensorSource) -> int:
        if source.dtype not in FLOATING:
            return source.end - source.begin
        return prod(source.shape) * torch_dtype(self.dtype(source)).itemsize

    def _bytes(self, file: str) -> Iterator[FileBlock]:
        """Every byte of a file as it was, except the changed pieces, which are of the same size."""
        position = 0
        for tensor in self._tensors(file):
            for piece in self.pieces.get(tensor.name, ()):
                yield from copied(file, position, piece.source.begin)
                yield from cut(piece.source, piece)
                position = piece.source.end
        yield from copied(file, position, next(each.size for each in self.checkpoint.files if each.name == file))

    def _values(self, file: str) -> Iterator[FileBlock]:
        """The values of every tensor of a file, for another dtype."""
        for tensor in self._tensors(file):
            if tensor.dtype not in FLOATING:
                yield from copied(file, tensor.begin, tensor.end)
                continue
            if tensor.quantisation is not None:
                yield from self._quantised_values(tensor)
                continue
            width = (tensor.end - tensor.begin) // max(1, prod(tensor.shape))
            position = tensor.begin
            for piece in (*self.pieces.get(tensor.name, ()), None):
                until = tensor.end if piece is None else piece.source.begin
                if until > position:
                    between = (position - tensor.begin) // width
                    yield from cut(tensor.run(between, ((until - position) // width,)) if between or piece else tensor)
                if piece is not None:
                    yield from cut(piece.source, piece)
                    position = piece.source.end

    def _quantised_values(self, tensor: TensorSource) -> Iterator[FileBlock]:
        changed = {piece.source.index: piece for piece in self.pieces.get(tensor.name, ())}
        if None in changed or not changed:
            yield from cut(tensor, changed.get(None))
            return
        for index in range(tensor.shape[0]):
            yield from cut(tensor.part(index), changed.get(index))

    def _tensors(self, file: str) -> list[TensorSource]:
        return sorted((s for s in self.checkpoint.tensors.values() if s.file == file), key=lambda s: s.begin)


def pieces_of(specs: Sequence[WeightSpec]) -> dict[str, list[Piece]]:
    """By tensor, in the order of its bytes. Raises where two weights share bytes: a change of one would change the other."""
    found: dict[str, list[Piece]] = defaultdict(list)
    for spec in specs:
        row = 0
        for number, source in enumerate(spec.sources):
            rows = slice(0, spec.out_features) if spec.operation == "transpose" else slice(row, row + source.shape[0])
            row = rows.stop
            found[source.name].append(Piece(spec, number, source, rows))
    for name, pieces in found.items():
        pieces.sort(key=lambda piece: piece.source.begin)
        for one, other in pairwise(pieces):
            if other.source.begin < one.source.end:
                raise OptionError(
                    f"{one.spec.name} and {other.spec.name} share the tensor {name!r}: a change of one would change the other",
                    hint="change only one of a tied embedding and output head",
                )
    return found


def _metadata(checkpoint: Checkpoint, name: str) -> dict[str, str] | None:
    """``__metadata__`` of a file's header."""
    size = next(file.size for file in checkpoint.files if file.name == name)
    prefix = bytearray(PREFIX)
    checkpoint._open[name].read_into(memoryview(prefix), 0)
    header = bytearray(header_length(bytes(prefix), size=size, where=name))
    checkpoint._open[name].read_into(memoryview(header), PREFIX)
    metadata = json.loads(header.decode()).get("__metadata__")
    return dict(metadata) if isinstance(metadata, dict) else None
