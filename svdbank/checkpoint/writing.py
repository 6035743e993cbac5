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
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from svdbank import fsio
from svdbank.checkpoint.dtypes import FLOATING, torch_dtype
from svdbank.checkpoint.files import member
from svdbank.checkpoint.header import PREFIX, header_length
from svdbank.checkpoint.source import Checkpoint
from svdbank.errors import OptionError, WrongBaseError
from svdbank.specs import Progress, ProgressCallback, Struct, TensorSource, WeightSpec

if TYPE_CHECKING:
    from torch import Tensor

#: Bytes copied at a time.
_PIECE = 8 << 20

_NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}

#: Endings of files that hold weights in one format or another: what is written stands in for them.
_WEIGHTS = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".npz")

#: Largest file taken along from a folder inside the model's: chat templates and the like, not another format of the weights.
_NESTED_BYTES = 10 << 20


class Edit(Protocol):
    """``edit(spec, values, rows)``: rows ``rows`` of the matrix (out, in) of ``spec``, changed. Any dtype; it is stored in the file's."""

    def __call__(self, spec: WeightSpec, values: Tensor, rows: slice) -> Tensor: ...


class WrittenCheckpoint(Struct, frozen=True):
    """What was written: the folder, its weight files and their bytes, how many weights were changed, the dtype they are stored in."""

    path: str
    files: tuple[str, ...]
    nbytes: int
    changed: int
    dtype: str | None


@dataclass(frozen=True)
class _Piece:
    """Part of a tensor that is part of a changed weight: bytes [begin, end) of the file are rows ``rows`` of its matrix."""

    spec: WeightSpec
    number: int
    source: TensorSource
    rows: slice


@dataclass
class _Hashes:
    """sha256 over the sources of each weight in their order, whatever order they are met in."""

    checkpoint: Checkpoint
    wanted: frozenset[str]
    digests: dict[str, Any] = field(default_factory=dict)
    seen: dict[str, int] = field(default_factory=dict)

    def of(self, piece: _Piece) -> Any | None:
        """The digest to feed this piece's bytes to; None where it comes out of turn, and the weight is read again at the end."""
        name = piece.spec.name
        if name not in self.wanted:
            return None
        if self.seen.setdefault(name, 0) != piece.number:
            self.seen[name] = -1
            return None
        self.seen[name] += 1
        return self.digests.setdefault(name, hashlib.sha256())

    def final(self, spec: WeightSpec) -> str:
        if self.seen.get(spec.name) == len(spec.sources):
            return str(self.digests[spec.name].hexdigest())
        return self.checkpoint.read_hashed(spec)[1]


def write_checkpoint(
    checkpoint: Checkpoint,
    output: str | Path,
    specs: Sequence[WeightSpec],
    edit: Edit,
    *,
    dtype: str | None = None,
    expected: Mapping[str, str] | None = None,
    approve: Callable[[], None] | None = None,
    progress: ProgressCallback | None = None,
) -> WrittenCheckpoint:
    """Write ``checkpoint`` to the folder ``output`` with the weights of ``specs`` changed by ``edit``.

    Parameters
    ----------
    specs, edit
        What is changed, and how. Each weight is handed over in the pieces in which it is stored, one at a time.
    dtype
        ``float32``, ``bfloat16``, …: store every floating tensor so. By default as it is; quantised weights then come out in the dtype
        of their values, and the configuration loses its quantisation.
    expected
        sha256 of the stored bytes by name: a weight with others raises :class:`WrongBaseError`, and nothing appears.
    approve
        Called when all is written and nothing has appeared yet; what it raises keeps it so.

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
    anew = quantised or any(stored_as not in (None, s.dtype) for s in checkpoint.tensors.values() if s.dtype in FLOATING)
    hashes = _Hashes(checkpoint, frozenset(expected or ()))
    job = _Job(checkpoint, pieces, edit, stored_as, hashes, progress or _ignore)
    need = sum(_stored_bytes(source, stored_as) for source in checkpoint.tensors.values())
    if need > (free := fsio.free_bytes(target)):
        raise OptionError(f"{target}: {need} bytes to write, {free} free", hint="choose another disk")
    with _unfinished(target) as folder:
        write = job.file_anew if anew else job.file_as_it_is
        for file in checkpoint.files:
            write(file.name, folder / file.name)
        found = {spec.name: hashes.final(spec) for spec in specs if spec.name in hashes.wanted}
        _check_base(checkpoint, found, expected or {})
        if approve is not None:
            approve()
        _carry(checkpoint, folder, dtype=dtype, quantised=quantised, anew=anew)
        fsio.fsync_dir(folder)
        fsio.replace(folder, target)
    return WrittenCheckpoint(
        path=str(target),
        files=tuple(file.name for file in checkpoint.files),
        nbytes=need,
        changed=len(specs),
        dtype=dtype,
    )


@contextlib.contextmanager
def _unfinished(target: Path) -> Iterator[Path]:
    """An empty folder beside ``target`` to write into, under the writer's lock; what a killed run left there goes first."""
    work = target.with_name(f".{target.name}{fsio.TEMPORARY}")
    try:
        with fsio.locked(work):
            folder = work / "checkpoint"
            if folder.exists():
                fsio.remove_tree(folder)
            fsio.make_dirs(folder)
            try:
                yield folder
            finally:
                if folder.exists():
                    fsio.remove_tree(folder)
    finally:
        fsio.remove_empty(work)


def check_folder(target: Path) -> None:
    """Refuse an output that is in use, before any work."""
    if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
        raise OptionError(f"{target} exists and is not an empty folder", hint="name another output, or move it away")


def _pieces(specs: Sequence[WeightSpec]) -> dict[str, list[_Piece]]:
    """By tensor, in the order of its bytes. Raises where two weights share bytes: a change of one would change the other."""
    found: dict[str, list[_Piece]] = defaultdict(list)
    for spec in specs:
        row = 0
        for number, source in enumerate(spec.sources):
            rows = slice(0, spec.out_features) if spec.operation == "transpose" else slice(row, row + source.shape[0])
            row = rows.stop
            found[source.name].append(_Piece(spec, number, source, rows))
    for name, pieces in found.items():
        pieces.sort(key=lambda piece: piece.source.begin)
        for one, other in pairwise(pieces):
            if other.source.begin < one.source.end:
                raise OptionError(
                    f"{one.spec.name} and {other.spec.name} share the tensor {name!r}: a change of one would change the other",
                    hint="change only one of a tied embedding and output head",
                )
    return found


@dataclass
class _Job:
    checkpoint: Checkpoint
    pieces: Mapping[str, list[_Piece]]
    edit: Edit
    stored_as: str | None
    hashes: _Hashes
    tell: ProgressCallback
    done: int = 0

    def file_as_it_is(self, name: str, path: Path) -> None:
        """Every byte as it was, except the changed pieces, which are of the same size."""
        tensors = sorted((s for s in self.checkpoint.tensors.values() if s.file == name), key=lambda s: s.begin)
        with fsio.creating(path) as append:
            position = 0
            for piece in [piece for tensor in tensors for piece in self.pieces.get(tensor.name, ())]:
                self._copy(name, position, piece.source.begin, append)
                append(_bytes(self._changed(piece)))
                position = piece.source.end
                self._tell(piece.source.end - piece.source.begin, piece.spec.name)
            self._copy(name, position, self._size(name), append)

    def file_anew(self, name: str, path: Path) -> None:
        """The values of every tensor under a new header: same order, same metadata, another dtype."""
        tensors = sorted((s for s in self.checkpoint.tensors.values() if s.file == name), key=lambda s: s.begin)
        header: dict[str, Any] = {}
        if (metadata := _metadata(self.checkpoint, name)) is not None:
            header["__metadata__"] = metadata
        offset = 0
        for tensor in tensors:
            size = _stored_bytes(tensor, self.stored_as)
            header[tensor.name] = {
                "dtype": self._dtype(tensor),
                "shape": list(tensor.shape),
                "data_offsets": [offset, offset + size],
            }
            offset += size
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        with fsio.creating(path) as append:
            append(len(text).to_bytes(PREFIX, "little") + text)
            for tensor in tensors:
                self._append_anew(tensor, append)
                self._tell(_stored_bytes(tensor, self.stored_as), tensor.name)

    def _append_anew(self, tensor: TensorSource, append: Callable[[bytes | memoryview], None]) -> None:
        if tensor.dtype not in FLOATING:
            self._copy(tensor.file, tensor.begin, tensor.end, append)
            return
        wanted = torch_dtype(self._dtype(tensor))
        changed = {piece.source.index: piece for piece in self.pieces.get(tensor.name, ())}
        if None in changed:
            append(_bytes(self._changed(changed[None]).to(wanted)))
        elif not changed:
            append(_bytes(self.checkpoint.read_tensor(tensor).to(wanted)))
        else:
            blocks = next(iter(changed.values())).source.blocks
            for index in range(blocks or tensor.shape[0]):
                if index in changed:
                    values = self._changed(changed[index])
                else:
                    part = tensor.block(index, blocks) if blocks else tensor.part(index)
                    values = self.checkpoint.read_tensor(part)
                append(_bytes(values.to(wanted)))

    def _changed(self, piece: _Piece) -> Tensor:
        """The piece as it will be stored, in its shape; in the dtype of the edit's result where that is stored anew."""
        values = self.checkpoint.read_tensor(piece.source, self.hashes.of(piece))
        turned = piece.spec.operation == "transpose"
        edited = self.edit(piece.spec, values.mT if turned else values, piece.rows)
        edited = edited.mT if turned else edited
        if edited.shape != values.shape:
            raise ValueError(f"{piece.spec.name}: an edit made {tuple(edited.shape)} of {tuple(values.shape)}")
        return edited.to(torch_dtype(self._dtype(piece.source)))

    def _dtype(self, source: TensorSource) -> str:
        return self.stored_as if self.stored_as is not None and source.dtype in FLOATING else source.dtype

    def _copy(self, file: str, begin: int, end: int, append: Callable[[bytes | memoryview], None]) -> None:
        buffer = bytearray(min(_PIECE, max(0, end - begin)))
        while begin < end:
            view = memoryview(buffer)[: end - begin]
            self.checkpoint._open[file].read_into(view, begin)
            append(view)
            begin += len(view)
            self._tell(len(view), file)

    def _size(self, name: str) -> int:
        return next(file.size for file in self.checkpoint.files if file.name == name)

    def _tell(self, amount: int, item: str) -> None:
        self.done += amount
        total = sum(file.size for file in self.checkpoint.files)
        self.tell(Progress("write", min(self.done, total), total, "bytes", item))


def _bytes(values: Tensor) -> memoryview:
    import torch

    return values.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _stored_bytes(source: TensorSource, stored_as: str | None) -> int:
    if source.dtype not in FLOATING:
        return source.end - source.begin
    count = 1
    for extent in source.shape:
        count *= extent
    return count * torch_dtype(stored_as or source.dtype).itemsize


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


def _carry(checkpoint: Checkpoint, folder: Path, *, dtype: str | None, quantised: bool, anew: bool) -> None:
    """Write everything else of the model: as it is, except what would be wrong now in ``config.json`` and the index."""
    for name, path in companions(checkpoint):
        data = path.read_bytes()
        if name == "config.json" and anew:
            data = _config(data, dtype, quantised)
        fsio.make_dirs((folder / name).parent)
        fsio.write_new(folder / name, data)
    for path in sorted(checkpoint.folder.glob("*.safetensors.index.json")) if len(checkpoint.files) > 1 else ():
        data = member(checkpoint.folder, path.name).read_bytes()
        fsio.write_new(folder / path.name, _index(data, folder, checkpoint) if anew else data)
    for nested in folder.iterdir():
        if nested.is_dir():
            fsio.fsync_dir(nested)


def companions(checkpoint: Checkpoint) -> Iterator[tuple[str, Path]]:
    """(name, path) of the files beside the weights: configuration, tokenizer, templates, licence; nothing that is weights."""
    if checkpoint.revision is not None:
        _fetch_companions(checkpoint)
    if not (checkpoint.folder / "config.json").exists():
        return
    for path in sorted(checkpoint.folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir() and not path.is_symlink():
            for inner in sorted(path.iterdir()):
                if inner.is_file() and not _is_weights(inner) and inner.stat().st_size <= _NESTED_BYTES:
                    yield f"{path.name}/{inner.name}", member(checkpoint.folder, f"{path.name}/{inner.name}")
        elif not _is_weights(path):
            yield path.name, member(checkpoint.folder, path.name)


def _is_weights(path: Path) -> bool:
    return path.name.startswith(".") or path.name.endswith(_WEIGHTS)


def _fetch_companions(checkpoint: Checkpoint) -> None:
    """Have the Hub client download what is small and not there yet; offline, what is there has to do."""
    import contextlib

    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    with contextlib.suppress(LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError):
        snapshot_download(
            checkpoint.name,
            revision=checkpoint.revision,
            ignore_patterns=[f"*{ending}" for ending in _WEIGHTS] + ["*/*"],
        )


def _config(data: bytes, dtype: str | None, quantised: bool) -> bytes:
    config = json.loads(data)
    for key in ("dtype", "torch_dtype"):
        if key in config and dtype is not None:
            config[key] = dtype
    if quantised:
        config.pop("quantization_config", None)
    return json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n"


def _index(data: bytes, folder: Path, checkpoint: Checkpoint) -> bytes:
    index = json.loads(data)
    index["weight_map"] = {name: source.file for name, source in sorted(checkpoint.tensors.items())}
    index.setdefault("metadata", {})["total_size"] = sum((folder / file.name).stat().st_size for file in checkpoint.files)
    return json.dumps(index, indent=2, ensure_ascii=False).encode() + b"\n"


def _ignore(_: Progress) -> None:
    pass
