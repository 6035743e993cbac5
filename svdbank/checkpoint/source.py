"""An opened source of weights: configuration, tensor headers, and reads at byte offsets. Never a loaded model."""

from __future__ import annotations

import contextlib
import hashlib
import math
import mmap
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from svdbank.checkpoint.assembly import assemble
from svdbank.checkpoint.configuration import digest, quantisation_of
from svdbank.checkpoint.documents import parse_object
from svdbank.checkpoint.dtypes import FLOATING, torch_dtype
from svdbank.checkpoint.files import State, WeightBytes, WeightFile, blob_id, member, open_regular, read_card, read_document
from svdbank.checkpoint.header import MAX_HEADER, PREFIX, header_length, parse_header
from svdbank.checkpoint.layout import MAX_CONFIG, MAX_INDEX, NO_WEIGHTS, Layout, choose, gguf, parse_index
from svdbank.checkpoint.naming.wrappers import refuse_wrapped
from svdbank.checkpoint.quantised.dequantisation import dequantise
from svdbank.checkpoint.quantised.quantisation import full_precision, refuse_unreadable, with_values
from svdbank.core.errors import CheckpointError
from svdbank.core.places import Nowhere, OnDisk, OnHub, locate, refusal, refuse_empty
from svdbank.core.specs import SourceFile, TensorSource, WeightSpec, rows_in_order

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from svdbank.checkpoint.remote.access import Remote
    from svdbank.checkpoint.remote.files import RemoteFile
    from svdbank.checkpoint.remote.hub import HubFile, Snapshot


#: Bytes fetched of a remote file at first, and for each of its tensors beside the name: most headers fit.
_HEADER_GUESS, _ENTRY_GUESS = 64 << 10, 100

#: Bytes from which a tensor is read into huge pages, of 2 MiB as a rule.
_LARGE = 8 << 20

#: What to do about a name that leads nowhere.
_NAMES = "name a model folder, a .safetensors file or org/name on the Hub"

#: What to do about an index and headers that disagree.
_MIXED = "index and weight files are of different versions of the model: download all of them again, from one revision"


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
        Every tensor of every weight file, by name; codes and scales of quantised weights as the one tensor of values they stand for.
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
    _open: dict[str, WeightBytes] = field(repr=False)
    #: How files that are on the Hub and not on this disk are had; None where all are here.
    remote: Remote | None = field(default=None, repr=False)
    #: Opened by a frozen plan's :class:`~svdbank.core.specs.Sources`: no header was read, ``config`` and ``tensors`` are empty.
    planned: bool = False
    #: What was worked out of all this, by those who did, so that it is done once.
    kept: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

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
        if self.remote is not None:
            self.remote.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def read_tensor(self, source: TensorSource, digest: Any | None = None, *, out: Tensor | None = None) -> Tensor:
        """The values of ``source`` in its shape; ``digest`` (a hashlib object) is fed the stored bytes, codes before scales.

        They are read straight into ``out`` where it is given: contiguous, of the same shape and dtype, on the CPU. What is
        quantised is dequantised panel by panel. Raises CheckpointError if this checkpoint does not hold ``source``, or its bytes
        cannot be had.
        """
        import torch

        stored = self.tensors.get(source.name)
        if not self.planned and (stored is None or not source.is_of(stored)):
            raise CheckpointError(
                f"{self.name}: the tensor {source.name!r} is not here as it was planned",
                hint="this weight was planned from another checkpoint: plan again",
            )
        if source.dtype not in FLOATING:
            raise CheckpointError(f"{self.name}: {source.name!r} is stored as {source.dtype}; its values need dequantising")
        if source.order is not None:
            return self._reordered(source, digest, out)
        if source.quantisation is not None:
            return self._dequantised(source, digest, out)
        if out is None:
            out = _room(source.shape, torch_dtype(source.dtype))
        self._open[source.file].read_into(out.reshape(-1).view(torch.uint8).numpy().data, source.begin, digest)
        return out

    def _reordered(self, source: TensorSource, digest: Any | None, out: Tensor | None) -> Tensor:
        import torch

        assert source.order is not None
        values = self.read_tensor(source.in_order(None), digest)
        rows = torch.tensor(rows_in_order(source.order))
        return torch.index_select(values, 0, rows, out=out) if out is not None else values[rows]

    def _dequantised(self, source: TensorSource, digest: Any | None, out: Tensor | None) -> Tensor:
        import torch

        assert source.quantisation is not None
        scales = source.quantisation.scales
        factors = torch.empty(scales.nbytes, dtype=torch.uint8)
        self._open[scales.file].read_into(factors.numpy().data, scales.begin)

        def fill(codes: memoryview, begin: int) -> None:
            self._open[source.file].read_into(codes, source.begin + begin, digest)

        values = dequantise(source, fill, factors, out)
        if digest is not None:
            digest.update(factors.numpy().data)
        return values


def _room(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor; a large one in huge pages where the system has them: in small ones, most of a read is making pages."""
    import torch

    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < _LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype)
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype).reshape(shape)


def open_checkpoint(model: str | os.PathLike[str]) -> Checkpoint:
    """Open a model folder, a single ``.safetensors`` file, or ``org/name[@revision]`` on the Hugging Face Hub.

    Names mean what :func:`svdbank.core.places.locate` says. A Hub model is pinned to the commit its revision resolved to. Only
    configuration, index and headers are read here; weights that the Hugging Face cache lacks are fetched when they are read, range by
    range, or as ``checkpoint.remote`` is told. Raises CheckpointError, and OptionError for what cannot be a name.
    """
    refuse_empty(model, "the model's name", _NAMES)
    place = locate(model)
    if isinstance(place, OnDisk):
        return open_local(place.path)
    if isinstance(place, OnHub):
        return _open_hub(place)
    if isinstance(place, Nowhere) and place.is_path:
        raise CheckpointError(f"{place.text}: no such file or folder", hint=_NAMES)
    raise refusal(place)


def open_cached(model: str, commit: str | None) -> Checkpoint:
    """As :func:`open_checkpoint`, of what is on this machine: of a Hub model ``commit``, or what its ``main`` was when it was last seen.

    Asks no network. CheckpointError where that is not here whole.
    """
    place = locate(model, one_word=True)
    if isinstance(place, OnDisk):
        return open_local(place.path)
    if not isinstance(place, OnHub):
        raise refusal(place)
    from svdbank.checkpoint.remote.hub import cached_snapshot

    snapshot = cached_snapshot(place.repository, commit or place.revision)
    if snapshot is None:
        raise CheckpointError(f"{place}: not in the Hugging Face cache")
    return _open_snapshot(snapshot, place.revision)


def open_local(path: Path) -> Checkpoint:
    """Open what lies on disk."""
    where = str(path)
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
        if path.name.endswith(".gguf"):
            raise gguf(where, path.name)
        if path.name == "config.json":
            raise CheckpointError(f"{path}: a configuration, no weights", hint=NO_WEIGHTS)
        if not path.name.endswith(".safetensors"):
            raise CheckpointError(f"{path}: not a .safetensors file", hint="name a model folder or a .safetensors file")
    weight_map = None
    if layout.index is not None:
        index = member(folder, layout.index)
        weight_map = parse_index(read_document(index, MAX_INDEX), f"{where}: {layout.index}")
        names = sorted(set(weight_map.values()))
        if missing := [name for name in names if not os.path.lexists(folder / name)]:
            raise CheckpointError(
                f"{folder / missing[0]}: there is no such file, and {layout.index} names it ({len(missing)} are missing)",
                hint="every file that the index names is needed: copy or download the missing ones into this folder",
            )
    else:
        assert layout.single is not None
        names = [layout.single]
    located = {file: path.resolve() if not path.is_dir() else member(folder, file) for file in names}
    return _assembled(
        path.name if path.name not in ("", "..") else path.resolve().name,
        where,
        config=read_config(folder),
        card=lambda: read_card(folder),
        weight_map=weight_map,
        parts=(_local_part(located[file], file, blob_id(folder, file)) for file in names),
        folder=folder,
    )


@dataclass(frozen=True)
class _Part:
    """One weight file with what its header says."""

    source: SourceFile
    tensors: dict[str, TensorSource]
    reader: WeightBytes


def _local_part(path: Path, file: str, identity: str | None) -> _Part:
    tensors, state, header_hash = _read_header(path, file)
    source = SourceFile(name=file, size=state.size, identity=identity or f"{state.size}-{state.mtime_ns}-{header_hash}")
    return _Part(source, tensors, WeightFile(file, path, state))


def _assembled(
    name: str,
    where: str,
    *,
    config: dict[str, Any],
    card: Callable[[], str | None],
    weight_map: dict[str, str] | None,
    parts: Iterable[_Part],
    folder: Path,
    revision: str | None = None,
    remote: Remote | None = None,
) -> Checkpoint:
    """A checkpoint of these files, once index and headers are found to agree. What cannot be read is refused before any header.

    ``card`` is called for an error alone: on the Hub the model card is one file more to fetch.
    """
    quantised = quantisation_of(config, f"{where}: config.json")

    def made_from() -> str | None:
        return full_precision(config, card(), name)

    refuse_unreadable(quantised, where, made_from=made_from)
    tensors: dict[str, TensorSource] = {}
    opened: dict[str, WeightBytes] = {}
    files = []
    for part in parts:
        if weight_map is not None:
            _agree(part.tensors, weight_map, part.source.name, where)
        tensors.update(part.tensors)
        opened[part.source.name] = part.reader
        files.append(part.source)
    if weight_map is not None and len(tensors) != len(weight_map):
        missing = next(tensor for tensor in weight_map if tensor not in tensors)
        raise CheckpointError(
            f"{where}: the index names {missing!r} in {weight_map[missing]}, whose header does not have it", hint=_MIXED
        )
    refuse_wrapped(tensors, config, where)
    return Checkpoint(
        name=name,
        revision=revision,
        folder=folder,
        config=config,
        tensors=with_values(tensors, quantised, config, where, made_from=made_from),
        files=tuple(files),
        cache_key=cache_key_of(files),
        config_digest=digest(config),
        _open=opened,
        remote=remote,
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


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a resolved folder; empty where there is none."""
    if not (folder / "config.json").exists() and not (folder / "config.json").is_symlink():
        return {}
    path = member(folder, "config.json")
    return parse_object(read_document(path, MAX_CONFIG), str(folder / "config.json"))


def _agree(found: dict[str, TensorSource], weight_map: dict[str, str], file: str, where: str) -> None:
    for tensor in found:
        said = weight_map.get(tensor)
        if said != file:
            place = f"in {said}" if said else "nowhere"
            raise CheckpointError(
                f"{where}: {file} holds the tensor {tensor!r}, which the index says lies {place}", hint=_MIXED
            )


def cache_key_of(files: Iterable[SourceFile]) -> str:
    """sha256 hex over the names and identities of weight files."""
    lines = "".join(f"{file.name}\0{file.identity}\n" for file in sorted(files, key=lambda file: file.name))
    return hashlib.sha256(lines.encode()).hexdigest()


def _open_hub(place: OnHub) -> Checkpoint:
    from svdbank.checkpoint.remote.hub import look_up

    return _open_snapshot(look_up(place.repository, place.revision), place.revision)


def _open_snapshot(snapshot: Snapshot, revision: str | None) -> Checkpoint:
    from svdbank.checkpoint.remote.access import Remote
    from svdbank.checkpoint.remote.hub import fetch_card

    name = snapshot.repository
    where = f"{name}@{snapshot.commit[:12]}"
    remote = Remote(snapshot, revision) if any(file.path is None for file in snapshot.files) else None
    expected: Counter[str] = Counter()
    for tensor, file_name in (snapshot.weight_map or {}).items():
        expected[file_name] += len(tensor) + _ENTRY_GUESS

    def part(file: HubFile) -> _Part:
        if file.path is not None:
            return _local_part(file.path, file.name, file.identity)
        assert remote is not None
        reader = remote.files[file.name]
        return _Part(reader.source, _fetch_header(reader, where, expected[file.name]), reader)

    def parts(pool: ThreadPoolExecutor) -> Iterator[_Part]:
        yield from pool.map(part, snapshot.files)  # not before the first is asked for

    try:
        # Headers of remote files are some round trips each: several at a time.
        with ThreadPoolExecutor(8, "svdbank-headers") as pool:
            return _assembled(
                name,
                where,
                config=parse_object(snapshot.config, f"{where}: config.json") if snapshot.config is not None else {},
                card=lambda: fetch_card(snapshot),
                weight_map=snapshot.weight_map,
                parts=parts(pool),
                folder=snapshot.folder,
                revision=snapshot.commit,
                remote=remote,
            )
    except BaseException:
        if remote is not None:
            remote.close()
        raise


def _fetch_header(file: RemoteFile, where: str, expected: int) -> dict[str, TensorSource]:
    """The header of a file that is not here: about as many bytes as are expected of it, and what is missing of it then."""
    size = file.source.size
    place = f"{where}: {file.name}"
    start = bytearray(min(size, max(_HEADER_GUESS, min(expected, MAX_HEADER))))
    file.read_into(memoryview(start), 0)
    length = header_length(bytes(start[:PREFIX]), size=size, where=place)
    header = bytearray(length)
    known = len(start) - PREFIX
    header[:known] = start[PREFIX : PREFIX + length]
    if length > known:
        file.read_into(memoryview(header)[known:], PREFIX + known)
    return parse_header(bytes(header), file=file.name, size=size, where=place)
