"""A checkpoint written again with some of its weights changed, tensor by tensor, never in memory as a whole.

Where neither the dtype nor the form of the weights changes, the files keep their layout to the byte: header, order, metadata, and every
tensor that is not changed. Otherwise the header is made anew. The folder appears whole or not at all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

from svdbank.checkpoint.dtypes import FLOATING, torch_dtype
from svdbank.checkpoint.files import WeightFile
from svdbank.checkpoint.source import Checkpoint
from svdbank.checkpoint.writing.ahead import Ahead
from svdbank.checkpoint.writing.blocks import FileBlock, Piece
from svdbank.checkpoint.writing.buffers import Buffers
from svdbank.checkpoint.writing.companions import carry, write_index
from svdbank.checkpoint.writing.content import Content, pieces_of
from svdbank.checkpoint.writing.hashes import Hashes
from svdbank.core import disk
from svdbank.core.errors import OptionError, WrongBaseError
from svdbank.core.folders import appearing, output_folder
from svdbank.core.specs import Progress, ProgressCallback, Struct, TensorSource, WeightSpec, ignore_progress, rows_in_order

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

_NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class Edit(Protocol):
    """``edit(spec, values, out, rows, columns)``: that part of the matrix (out, in) of ``spec``, changed, into ``out``.

    ``values`` are what is stored there, in the file's dtype, and must not be changed themselves: their bytes are hashed. ``out`` is of
    the same shape, in the dtype that is written. Called from several threads at a time where ``threads`` allows.
    """

    def __call__(self, spec: WeightSpec, values: Tensor, out: Tensor, rows: slice, columns: slice) -> None: ...


class WrittenCheckpoint(Struct, frozen=True):
    """What was written: the folder, its weight files and their bytes, how many weights were changed, the dtype they are stored in."""

    path: str
    files: tuple[str, ...]
    nbytes: int
    changed: int
    dtype: str | None


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
    target = output_folder(output)
    check_folder(target)
    if dtype is not None and dtype not in _NAMES:
        raise OptionError(f"{dtype!r} is not a dtype to store weights in: {', '.join(_NAMES)}")
    quantised = any(source.quantisation is not None for source in checkpoint.tensors.values())
    stored_as = _NAMES[dtype] if dtype is not None else None
    anew = (
        bool(settings)
        or quantised
        or any(stored_as not in (None, s.dtype) for s in checkpoint.tensors.values() if s.dtype in FLOATING)
    )
    content = Content(checkpoint, pieces_of(specs), stored_as, anew)
    need = content.nbytes
    if need > (free := disk.free_bytes(target)):
        raise OptionError(f"{target}: {need} bytes to write, {free} free", hint="choose another disk")
    plan = {file.name: content.blocks(file.name) for file in checkpoint.files}
    expected = expected or {}
    hashes = Hashes(expected, chain.from_iterable(plan.values()))
    with appearing(target) as folder:

        def carry_over() -> None:
            carry(checkpoint, folder, settings=settings, dtype=dtype, quantised=quantised, anew=anew)

        _Job(content, edit, hashes, progress or ignore_progress).write_files(folder, plan, threads, carry_over)
        found = {spec.name: hashes.final(spec, checkpoint) for spec in specs if spec.name in expected}
        _check_base(checkpoint, found, expected)
        if approve is not None:
            approve()
        write_index(checkpoint, folder, anew=anew)
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


@dataclass(frozen=True)
class _Made:
    """What is written of a block, and what to give back then."""

    data: memoryview
    buffers: tuple[NDArray[np.uint8], ...]


@dataclass
class _Job:
    content: Content
    edit: Edit
    hashes: Hashes
    tell: ProgressCallback
    buffers: Buffers = field(default_factory=Buffers)
    done: int = 0

    @property
    def checkpoint(self) -> Checkpoint:
        return self.content.checkpoint

    def write_files(
        self, folder: Path, plan: Mapping[str, list[FileBlock]], threads: int, meanwhile: Callable[[], None]
    ) -> None:
        """Every weight file, in order: this thread writes and fsyncs, ``threads`` others read, hash and change ahead of it.

        ``meanwhile`` is called when they have begun and nothing is ready yet.
        """
        with (
            ThreadPoolExecutor(threads, "svdbank-write") as pool,
            Ahead(pool, chain.from_iterable(plan.values()), self._make) as made,
        ):
            meanwhile()
            for name, blocks in plan.items():
                with disk.creating(folder / name) as file:
                    if self.content.anew:
                        file.append(self.content.header(name))
                    for block in blocks:
                        self._append(block, made.take(), file)

    def _append(self, block: FileBlock, made: _Made | WeightFile, file: disk.NewFile) -> None:
        if isinstance(made, WeightFile):
            made.copy_into(file, block.begin, block.end)
        else:
            file.append(made.data)
            for buffer in made.buffers:
                self.buffers.give_back(buffer)
        self.done += block.end - block.begin
        total = sum(file.size for file in self.checkpoint.files)
        item = block.file if block.piece is None else block.piece.spec.name
        self.tell(Progress("write", min(self.done, total), total, "bytes", item))

    def _make(self, block: FileBlock) -> _Made | WeightFile:
        """A block read, hashed and changed; of one that is kept and lies here, the file to copy it from. In any thread."""
        opened = self.checkpoint._open[block.file]
        if block.source is None:
            if isinstance(opened, WeightFile):
                return opened
            size = block.end - block.begin
            buffer = self.buffers.lend(size)
            data = buffer.data[:size]
            opened.read_into(data, block.begin)
            return _Made(data, (buffer,))
        values, buffers = self._read(block, block.source)
        dtype = torch_dtype(self.content.dtype(block.source))
        if block.piece is None and dtype == values.dtype:
            return _Made(_bytes_of(values), buffers)
        buffer = self.buffers.lend(values.numel() * dtype.itemsize)
        out = _as_tensor(buffer, block.shape, dtype)
        if block.piece is None:
            out.copy_(values)
        else:
            self._change(block, block.piece, values, out)
        return _Made(buffer.data[: values.numel() * dtype.itemsize], (*buffers, buffer))

    def _change(self, block: FileBlock, piece: Piece, values: Tensor, out: Tensor) -> None:
        order = None if piece.source.order is None else rows_in_order(piece.source.order)
        new = out
        if order is not None:
            values, new = values[order], out.new_empty(out.shape)
        if block.turned:
            self.edit(piece.spec, values.mT, new.mT, *block.place)
        else:
            self.edit(piece.spec, values, new, *block.place)
        if order is not None:
            out[order] = new

    def _read(self, block: FileBlock, source: TensorSource) -> tuple[Tensor, tuple[NDArray[np.uint8], ...]]:
        """The values of a block, and the buffers that they lie in."""
        hashed = self.hashes.wants(block)
        if source.quantisation is not None:
            digest = hashlib.sha256() if hashed else None
            values = self.checkpoint.read_tensor(source.in_order(None), digest)
            if hashed:
                self.hashes.whole(block, digest)
            return values, ()
        buffer = self.buffers.lend(block.end - block.begin)
        data = buffer.data[: block.end - block.begin]
        self.checkpoint._open[block.file].read_into(data, block.begin)
        if hashed:
            self.hashes.feed(block, data)
        return _as_tensor(buffer, block.shape, torch_dtype(source.dtype)), (buffer,)


def _as_tensor(buffer: NDArray[np.uint8], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    import torch

    count = prod(shape)
    return torch.frombuffer(buffer, dtype=dtype, count=count).view(shape) if count else torch.empty(shape, dtype=dtype)


def _bytes_of(values: Tensor) -> memoryview:
    import torch

    return values.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _check_base(checkpoint: Checkpoint, hashes: Mapping[str, str], expected: Mapping[str, str]) -> None:
    wrong = [name for name, digest in hashes.items() if name in expected and expected[name] != digest]
    if wrong:
        raise WrongBaseError(
            f"{checkpoint.name}: {len(wrong)} of {len(hashes)} weights are not those that are meant to be changed, first {wrong[0]}",
            hint="name the base that the adapter or bank was made from",
        )
