"""An opened source of weights: configuration, tensor headers, and reads at byte offsets. Never a loaded model."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from svdbank.checkpoint.assembly import assemble
from svdbank.checkpoint.configuration import digest
from svdbank.checkpoint.documents import parse_object
from svdbank.checkpoint.dtypes import FLOATING, torch_dtype
from svdbank.checkpoint.files import State, WeightFile, member, open_regular, read_document
from svdbank.checkpoint.header import PREFIX, header_length, parse_header
from svdbank.checkpoint.layout import MAX_CONFIG, MAX_INDEX, Layout, choose, parse_index
from svdbank.errors import CheckpointError
from svdbank.specs import SourceFile, TensorSource, WeightSpec

if TYPE_CHECKING:
    from torch import Tensor

#: ``progress(stage, done, total)``: bytes done and bytes known so far of a stage such as ``download``.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Weights that can be read one at a time, from any number of threads at once.

    Attributes
    ----------
    name
        Hub id, or the name of the folder or file.
    revision
        Commit on the Hub; None for local files.
    folder
        Where the files lie.
    config
        ``config.json`` parsed; empty when there is none.
    tensors
        Every tensor of every weight file, by name.
    files
        The weight files, by name.
    cache_key
        sha256 hex over the names and identities of the weight files and nothing else.
    config_digest
        sha256 hex over the configuration without the keys that change when a model is merely saved again.
    """

    name: str
    revision: str | None
    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorSource]
    files: tuple[SourceFile, ...]
    cache_key: str
    config_digest: str
    _open: dict[str, WeightFile] = field(repr=False)

    def read(self, spec: WeightSpec) -> Tensor:
        """The matrix (out, in) of ``spec`` in its stored dtype; for ``transpose`` a view of what is stored.

        Raises CheckpointError if the file changed, ended early or does not hold this tensor.
        """
        return assemble(self.read_tensor, spec)

    def read_hashed(self, spec: WeightSpec) -> tuple[Tensor, str]:
        """As :meth:`read`, with the sha256 hex of the stored bytes of its sources, in their order."""
        digest = hashlib.sha256()
        matrix = assemble(self.read_tensor, spec, digest)
        return matrix, digest.hexdigest()

    def close(self) -> None:
        """Close the files. No read may be under way; later reads raise CheckpointError."""
        for file in self._open.values():
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def read_tensor(self, source: TensorSource, digest: Any | None = None, *, out: Tensor | None = None) -> Tensor:
        """The values of ``source`` in its shape; ``digest`` (a hashlib object) is fed the stored bytes.

        They are read straight into ``out`` where it is given: contiguous, of the same shape and dtype, on the CPU. Raises
        CheckpointError if this checkpoint does not hold ``source``, or its bytes cannot be had.
        """
        import torch

        stored = self.tensors.get(source.name)
        if stored is None or not source.is_of(stored):
            raise CheckpointError(
                f"{self.name}: the tensor {source.name!r} is not here as it was planned",
                hint="this weight was planned from another checkpoint: plan again",
            )
        if source.dtype not in FLOATING:
            raise CheckpointError(f"{self.name}: {source.name!r} is stored as {source.dtype}; its values need dequantising")
        if out is None:
            out = torch.empty(source.shape, dtype=torch_dtype(source.dtype))
        self._open[source.file].read_into(out.reshape(-1).view(torch.uint8).numpy().data, source.begin, digest)
        return out


def open_checkpoint(model: str | os.PathLike[str], *, progress: Progress | None = None) -> Checkpoint:
    """Open a model folder, a single ``.safetensors`` file, or ``org/name[@revision]`` on the Hugging Face Hub.

    A path that exists wins over a Hub id of the same spelling; ``hf://org/name[@revision]`` always means the Hub. A Hub model is
    pinned to the commit its revision resolved to and read from the Hugging Face cache, downloading what is missing;
    ``progress("download", done, total)`` reports the bytes. Only headers are read here. Raises CheckpointError.
    """
    text = os.fspath(model)
    if text.startswith("hf://"):
        return _open_hub(text.removeprefix("hf://"), progress)
    path = Path(text).expanduser()
    try:
        exists = path.exists()
    except OSError as cause:
        raise CheckpointError(
            f"{text[:200]}: cannot be looked at: {cause.strerror}", hint="check the path and its permissions"
        ) from cause
    if exists:
        return open_local(path)
    if isinstance(model, str) and _could_be_hub_id(text):
        return _open_hub(text, progress)
    raise CheckpointError(
        f"{text}: no such file or folder", hint="name a model folder, a .safetensors file or org/name on the Hub"
    )


def open_local(
    path: Path, *, name: str | None = None, revision: str | None = None, identities: dict[str, str] | None = None
) -> Checkpoint:
    """Open what lies on disk. ``identities`` gives the Hub's ids of the weight files where they are known."""
    where = name or str(path)
    if path.is_dir():
        folder = path.resolve()
        try:
            present = [entry.name for entry in folder.iterdir()]
        except OSError as cause:
            raise CheckpointError(f"{folder}: cannot be listed: {cause.strerror}", hint="check its permissions") from cause
        layout = choose(present, where)
    else:
        # The user named this file: if it is a link, that is their wish, except that its header is read from where it leads.
        folder, layout = path.parent.resolve(), Layout(single=path.name)
        if not path.name.endswith(".safetensors"):
            raise CheckpointError(f"{path}: not a .safetensors file", hint="name a model folder or a .safetensors file")
    config = _read_config(folder)
    weight_map = None
    if layout.index is not None:
        index = member(folder, layout.index)
        weight_map = parse_index(read_document(index, MAX_INDEX), f"{where}: {layout.index}")
        names = sorted(set(weight_map.values()))
    else:
        assert layout.single is not None
        names = [layout.single]
    tensors: dict[str, TensorSource] = {}
    opened: dict[str, WeightFile] = {}
    files = []
    for file_name in names:
        located = path.resolve() if not path.is_dir() else member(folder, file_name)
        found, state, header_hash = _read_header(located, file_name)
        if weight_map is not None:
            _agree(found, weight_map, file_name, where)
        tensors.update(found)
        opened[file_name] = WeightFile(file_name, located, state)
        identity = (identities or {}).get(file_name) or _blob_id(located) or f"{state.size}-{state.mtime_ns}-{header_hash}"
        files.append(SourceFile(name=file_name, size=state.size, identity=identity))
    if weight_map is not None and len(tensors) != len(weight_map):
        missing = next(tensor for tensor in weight_map if tensor not in tensors)
        raise CheckpointError(f"{where}: the index names {missing!r} in {weight_map[missing]}, whose header does not have it")
    return Checkpoint(
        name=name or (path if path.name not in ("", "..") else path.resolve()).name,
        revision=revision,
        folder=folder,
        config=config,
        tensors=tensors,
        files=tuple(files),
        cache_key=_cache_key(files),
        config_digest=digest(config),
        _open=opened,
    )


def _read_header(path: Path, file: str) -> tuple[dict[str, TensorSource], State, str]:
    fd = open_regular(path)
    with os.fdopen(fd, "rb") as stream:
        state = State.of(fd)
        length = header_length(stream.read(PREFIX), size=state.size, where=str(path))
        header = stream.read(length)
    if len(header) != length:
        raise CheckpointError(f"{path}: ends inside its header", hint="download it again")
    tensors = parse_header(header, file=file, size=state.size, where=str(path))
    return tensors, state, hashlib.sha256(header).hexdigest()


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").exists() and not (folder / "config.json").is_symlink():
        return {}
    path = member(folder, "config.json")
    return parse_object(read_document(path, MAX_CONFIG), str(folder / "config.json"))


def _agree(found: dict[str, TensorSource], weight_map: dict[str, str], file: str, where: str) -> None:
    for tensor in found:
        said = weight_map.get(tensor)
        if said != file:
            place = f"in {said}" if said else "nowhere"
            raise CheckpointError(f"{where}: {file} holds the tensor {tensor!r}, which the index says lies {place}")


def _blob_id(path: Path) -> str | None:
    """The Hub's id of a file that lies in ``blobs/`` of the Hugging Face cache: the name it has there."""
    return path.name if path.parent.name == "blobs" and "--" in path.parent.parent.name else None


def _cache_key(files: list[SourceFile]) -> str:
    lines = "".join(f"{file.name}\0{file.identity}\n" for file in sorted(files, key=lambda file: file.name))
    return hashlib.sha256(lines.encode()).hexdigest()


def _could_be_hub_id(text: str) -> bool:
    return (
        not text.startswith(("/", "./", "../", "~"))
        and not text.endswith(".safetensors")
        and text.split("@")[0].count("/") == 1
    )


def _open_hub(text: str, progress: Progress | None) -> Checkpoint:
    from svdbank.checkpoint.hub import fetch, parse_id

    repository, revision = parse_id(text)
    snapshot = fetch(repository, revision, progress)
    return open_local(snapshot.folder, name=repository, revision=snapshot.commit, identities=snapshot.identities)
