"""What stands beside the weights of a checkpoint, carried over to one that is written: configuration, index, tokenizer, templates."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from svdbank.checkpoint.files import member
from svdbank.checkpoint.source import Checkpoint
from svdbank.core import disk

#: Endings of files that hold weights in one format or another: what is written stands in for them.
_WEIGHTS = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".npz")

#: Largest file taken along from a folder inside the model's: chat templates and the like, not another format of the weights.
_NESTED_BYTES = 10 << 20


#: Says that a folder holds an adapter, whose weights do not come along: beside a model's, it is what Transformers would look for.
_ADAPTER = frozenset({"adapter_config.json"})


def carry(
    checkpoint: Checkpoint, folder: Path, *, settings: Mapping[str, object], dtype: str | None, quantised: bool, anew: bool
) -> None:
    """Write what stands beside weights and index: as it is, except what would be wrong now in ``config.json``."""
    for name, path in companions(checkpoint):
        data = path.read_bytes()
        if name == "config.json" and anew:
            data = _config(data, settings, dtype, quantised)
        disk.make_dirs((folder / name).parent)
        disk.write_new(folder / name, data)
    for nested in folder.iterdir():
        if nested.is_dir():
            disk.fsync_dir(nested)


def write_index(checkpoint: Checkpoint, folder: Path, *, anew: bool) -> None:
    """The index of a checkpoint in several files, which are written: as it is, or what holds for files made ``anew``.

    Transformers loads no index without ``metadata``: it is given some.
    """
    for path in sorted(checkpoint.folder.glob("*.safetensors.index.json")) if len(checkpoint.files) > 1 else ():
        data = member(checkpoint.folder, path.name).read_bytes()
        described = isinstance(json.loads(data).get("metadata"), dict)
        disk.write_new(folder / path.name, data if described and not anew else _index(data, folder, checkpoint))


def companions(checkpoint: Checkpoint) -> Iterator[tuple[str, Path]]:
    """(name, path) of the files beside the weights: configuration, tokenizer, templates, licence; nothing that is weights."""
    if checkpoint.revision is not None:
        _fetch_companions(checkpoint)
    if not (checkpoint.folder / "config.json").exists():
        return
    for path in sorted(checkpoint.folder.iterdir()):
        if path.name.startswith(".") or path.name in _ADAPTER:
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


def _config(data: bytes, settings: Mapping[str, object], dtype: str | None, quantised: bool) -> bytes:
    config = json.loads(data) | settings
    for key in ("dtype", "torch_dtype"):
        if key in config and dtype is not None:
            config[key] = dtype
    if quantised:
        config.pop("quantization_config", None)
    return json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n"


def _index(data: bytes, folder: Path, checkpoint: Checkpoint) -> bytes:
    index = json.loads(data)
    index["weight_map"] = {name: source.file for name, source in sorted(checkpoint.tensors.items())}
    total = sum((folder / file.name).stat().st_size for file in checkpoint.files)
    index["metadata"] = (index.get("metadata") or {}) | {"total_size": total}
    return json.dumps(index, indent=2, ensure_ascii=False).encode() + b"\n"
