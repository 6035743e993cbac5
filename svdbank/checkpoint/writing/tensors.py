"""A checkpoint written again with some of its weights changed, tensor by tensor, never in memory as a whole.

Where neither the dtype nor the form of the weights changes, the files keep their layout to the byte: header, order, metadata, and every
tensor that is not changed. Otherwise the header is made anew. The folder appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, pairwise
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

from svdbank.checkpoint.dtypes import FLOATING, torch_dtype
from svdbank.checkpoint.header import PREFIX, header_length
from svdbank.checkpoint.source import Checkpoint
from svdbank.checkpoint.writing.blocks import FileBlock, Piece, copied, cut, in_order
from svdbank.checkpoint.writing.companions import carry
from svdbank.core import disk
from svdbank.core.errors import OptionError, WrongBaseError
from svdbank.core.folders import appearing
from svdbank.core.specs import Progress, ProgressCallback, Struct, TensorSource, WeightSpec, ignore_progress, rows_in_order

if TYPE_CHECKING:
    from torch import Tensor

_NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class Edit(Protocol):
    """``edit(spec, values, rows, columns)``: that part of the matrix (out, in) of ``spec``, changed.

    ``values`` are what is stored there, in the file's dtype, and must not be changed themselves: their bytes are hashed. What comes
    back may have any dtype; it is rounded to the one that is written. Called from several threads at a time where ``threads`` allows.
    """

    def __call__(self, spec: WeightSpec, values: Tensor, rows: slice, columns: slice) -> Tensor: ...


class WrittenCheckpoint(Struct, frozen=True):
    """What was written: the folder, its weight files and their bytes, how many weights were changed, the dtype they are stored in."""

    path: str
    files: tuple[str, ...]
    nbytes: int
    changed: int
    dtype: str | None


@dataclass
class _Hashes:
    """sha256 over the stored bytes of weights, as long as these come in the order of their sources."""

    wanted: frozenset[str]
    digests: dict[str, Any] = field(default_factory=dict)
    #: By weight: the source and the byte of it that comes next.
    next: dict[str, tuple[int, int]] = field(default_factory=dict)

    def feed(self, block: FileBlock, stored: memoryview) -> None:
        assert block.piece is not None
        piece = block.piece
        name, begin = piece.spec.name, block.begin - piece.source.begin
        if self.next.get(name, (0, 0)) == (piece.number, begin):
            self.digests.setdefault(name, hashlib.sha256()).update(stored)
            more = block.end < piece.source.end
            self.next[name] = (piece.number, begin + len(stored)) if more else (piece.number + 1, 0)

    def whole(self, block: FileBlock, digest: Any) -> None:
        """Of a source that is read as one block."""
        assert block.piece is not None
        if len(block.piece.spec.sources) == 1:
            self.digests[block.piece.spec.name] = digest
            self.next[block.piece.spec.name] = (1, 0)

    def final(self, spec: WeightSpec, checkpoint: Checkpoint) -> str:
        """Where the sources lay in another order in the files, the weight is read again."""
        if self.next.get(spec.name) == (len(spec.sources), 0):
            return str(self.digests[spec.name].hexdigest())
        return checkpoint.read_hashed(spec)[1]


def write_checkpoint(
    checkpoint: Checkpoint,
    output: str | Path,
    specs: Sequence[WeightSpec],
    edit: Edit,
    *,
    dtype: str | None = None,
    settings: Mapping[str, object] = MappingProxyType({}),
    expected: Mapping[str, str] | None = None,
    approve: Callable[[], None] | None = None,
    threads: int = 1,
    progress: ProgressCallback | None = None,
) -> WrittenCheckpoint:
    """Write ``checkpoint`` to the folder ``output`` with the weights of ``specs`` changed by ``edit``.

    Parameters
    ----------
    specs, edit
        What is changed, and how. Each weight is handed over in blocks of rows as they are stored, or columns where that is transposed.
    dtype
        ``float32``, ``bfloat16``, …: store every floating tensor so. By default as it is; quantised weights then come out in the dtype
        of their values, and the configuration loses its quantisation.
    settings
        Keys of ``config.json`` to set. A tensor of ``checkpoint`` that is not in its files by that name, but a second name for what is,
        is then written too.
    expected
        sha256 of the stored bytes by name: a weight with others raises :class:`WrongBaseError`, and nothing appears.
    approve
        Called when all is written and nothing has appeared yet; what it raises keeps it so.
    threads
        That read and change blocks, while this one writes what is ready.

    Configuration, tokenizer and other files that are not weights are carried over. Raises :class:`OptionError` for an output that is in
    use, weights that share a tensor, a dtype that cannot be written, or a disk with too little space.
    """
    target = Path(output).expanduser().resolve()
    check_folder(target)
    if dtype is not None and dtype not in _NAMES:
        raise OptionError(f"{dtype!r} is not a dtype to store weights in: {', '.join(_NAMES)}")
    pieces = _pieces(specs)
    quantised = any(source.quantisation is not None for source in checkpoint.tensors.values())
    stored_as = _NAMES[dtype] if dtype is not None else None
    anew = (
        bool(settings)
        or quantised
        or any(stored_as not in (None, s.dtype) for s in checkpoint.tensors.values() if s.dtype in FLOATING)
    )
    need = sum(_stored_bytes(source, stored_as) for source in checkpoint.tensors.values())
    if need > (free := disk.free_bytes(target)):
        raise OptionError(f"{target}: {need} bytes to write, {free} free", hint="choose another disk")
    hashes = _Hashes(frozenset(expected or ()))
    job = _Job(checkpoint, pieces, edit, stored_as, anew, hashes, progress or ignore_progress)
    with appearing(target) as folder:
        job.write_files(folder, threads)
        found = {spec.name: hashes.final(spec, checkpoint) for spec in specs if spec.name in hashes.wanted}
        _check_base(checkpoint, found, expected or {})
        if approve is not None:
            approve()
        carry(checkpoint, folder, settings=settings, dtype=dtype, quantised=quantised, anew=anew)
        disk.fsync_dir(folder)
    return WrittenCheckpoint(
        path=str(target),
        files=tuple(file.name for file in checkpoint.files),
        nbytes=need,
        changed=len(specs),
        dtype=dtype,
    )


def check_folder(target: Path) -> None:
    """Refuse an output that is in use, before any work."""
    if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
        raise OptionError(f"{target} exists and is not an empty folder", hint="name another output, or move it away")


def _pieces(specs: Sequence[WeightSpec]) -> dict[str, list[Piece]]:
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


@dataclass(frozen=True)
class _Made:
    """What becomes of a block. ``stored`` or ``digest`` are there where the block's bytes are to be hashed."""

    data: memoryview
    stored: memoryview | None = None
    digest: Any | None = None


@dataclass
class _Job:
    checkpoint: Checkpoint
    pieces: Mapping[str, list[Piece]]
    edit: Edit
    stored_as: str | None
    anew: bool
    hashes: _Hashes
    tell: ProgressCallback
    done: int = 0

    def write_files(self, folder: Path, threads: int) -> None:
        """Every weight file, in order: this thread writes, hashes and fsyncs, ``threads`` others read ahead and change."""
        plan = {file.name: list((self._values if self.anew else self._bytes)(file.name)) for file in self.checkpoint.files}
        with (
            ThreadPoolExecutor(threads, "svdbank-write") as pool,
            contextlib.closing(in_order(pool, chain.from_iterable(plan.values()), self._make)) as made,
        ):
            for name, blocks in plan.items():
                with disk.creating(folder / name) as append:
                    if self.anew:
                        append(self._header(name))
                    for block in blocks:
                        self._append(block, next(made), append)

    def _append(self, block: FileBlock, made: _Made, append: Callable[[bytes | memoryview], None]) -> None:
        if made.stored is not None:
            self.hashes.feed(block, made.stored)
        elif made.digest is not None:
            self.hashes.whole(block, made.digest)
        append(made.data)
        self.done += block.end - block.begin
        total = sum(file.size for file in self.checkpoint.files)
        item = block.file if block.piece is None else block.piece.spec.name
        self.tell(Progress("write", min(self.done, total), total, "bytes", item))

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

    def _header(self, file: str) -> bytes:
        """For :meth:`_values`: same order, same metadata, the dtype that is written."""
        header: dict[str, Any] = {}
        if (metadata := _metadata(self.checkpoint, file)) is not None:
            header["__metadata__"] = metadata
        offset = 0
        for tensor in self._tensors(file):
            end = offset + _stored_bytes(tensor, self.stored_as)
            header[tensor.name] = {"dtype": self._dtype(tensor), "shape": list(tensor.shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(PREFIX, "little") + text

    def _make(self, block: FileBlock) -> _Made:
        """Read a block and change it; in any thread."""
        import torch

        if block.source is None:
            data = torch.empty(block.end - block.begin, dtype=torch.uint8).numpy().data
            self.checkpoint._open[block.file].read_into(data, block.begin)
            return _Made(data)
        hashed = block.piece is not None and block.piece.spec.name in self.hashes.wanted
        digest = None
        if block.source.quantisation is not None:
            digest = hashlib.sha256() if hashed else None
            values = self.checkpoint.read_tensor(block.source, digest)
        else:
            values = torch.empty(block.shape, dtype=torch_dtype(block.source.dtype))
            self.checkpoint._open[block.file].read_into(_view(values), block.begin)
        made = self._changed(block, values).to(torch_dtype(self._dtype(block.source)))
        return _Made(_view(made), _view(values) if hashed and digest is None else None, digest)

    def _changed(self, block: FileBlock, values: Tensor) -> Tensor:
        import torch

        if block.piece is None:
            return values
        rows, columns = block.place
        order = None if block.source is None or block.source.order is None else rows_in_order(block.source.order)
        if order is not None:
            values = values[order]
        edited = self.edit(block.piece.spec, values.mT if block.turned else values, rows, columns)
        edited = edited.mT if block.turned else edited
        if order is not None:
            edited = edited.new_empty(edited.shape).index_copy_(0, torch.tensor(order), edited)
        if edited.shape != values.shape:
            raise ValueError(f"{block.piece.spec.name}: an edit made {tuple(edited.shape)} of {tuple(values.shape)}")
        return edited

    def _dtype(self, source: TensorSource) -> str:
        return self.stored_as if self.stored_as is not None and source.dtype in FLOATING else source.dtype


def _view(values: Tensor) -> memoryview:
    import torch

    return values.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _stored_bytes(source: TensorSource, stored_as: str | None) -> int:
    if source.dtype not in FLOATING:
        return source.end - source.begin
    return prod(source.shape) * torch_dtype(stored_as or source.dtype).itemsize


def _metadata(checkpoint: Checkpoint, name: str) -> dict[str, str] | None:
    """``__metadata__`` of a file's header."""
    size = next(file.size for file in checkpoint.files if file.name == name)
    prefix = bytearray(PREFIX)
    checkpoint._open[name].read_into(memoryview(prefix), 0)
    header = bytearray(header_length(bytes(prefix), size=size, where=name))
    checkpoint._open[name].read_into(memoryview(header), PREFIX)
    metadata = json.loads(header.decode()).get("__metadata__")
    return dict(metadata) if isinstance(metadata, dict) else None


def _check_base(checkpoint: Checkpoint, hashes: Mapping[str, str], expected: Mapping[str, str]) -> None:
    wrong = [name for name, digest in hashes.items() if name in expected and expected[name] != digest]
    if wrong:
        raise WrongBaseError(
            f"{checkpoint.name}: {len(wrong)} of {len(hashes)} weights are not those that are meant to be changed, first {wrong[0]}",
            hint="name the base that the adapter or bank was made from",
        )
