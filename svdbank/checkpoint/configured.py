"""A model of which only ``config.json`` is here: its matrices as Transformers' class of it has them, with no values."""

from __future__ import annotations

import hashlib
import os
from math import prod
from typing import Any

from svdbank.checkpoint.configuration import digest, facts, text_part
from svdbank.checkpoint.documents import parse_object
from svdbank.checkpoint.dtypes import BITS
from svdbank.checkpoint.files import read_document
from svdbank.checkpoint.layout import MAX_CONFIG, holds_weights
from svdbank.checkpoint.naming.matrices import by_tree, transformers_version
from svdbank.checkpoint.source import Checkpoint
from svdbank.core import disk
from svdbank.core.errors import CheckpointError
from svdbank.core.specs import TensorSource

CONFIG = "config.json"

_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}


def is_configuration(model: str | os.PathLike[str]) -> bool:
    """True for the path of a ``config.json``, and for a folder that has one and no weights of whatever format."""
    path = disk.expanded(os.fspath(model))
    try:
        if path.name == CONFIG:
            return path.is_file()
        return (path / CONFIG).is_file() and not holds_weights(entry.name for entry in path.iterdir())
    except OSError:
        return False


def open_configuration(model: str | os.PathLike[str]) -> Checkpoint:
    """The checkpoint that such a model's would be if every parameter were stored as the loaded model has it; it has no files to read.

    Raises CheckpointError where the configuration cannot be read, and where Transformers is not here or does not know the model.
    """
    path = disk.expanded(os.fspath(model)).resolve()
    folder = path.parent if path.name == CONFIG else path
    where = str(folder / CONFIG)
    config = parse_object(read_document(folder / CONFIG, MAX_CONFIG), where)
    about = facts(config, where)
    if transformers_version() is None:
        raise CheckpointError(
            f"{where}: what weights a model has is known from it by Transformers alone, which is not installed",
            hint="pip install transformers, or plan from the weights: their headers are enough, on the Hub too",
        )
    from svdbank.checkpoint.naming.tree import ModuleTree, UnknownModelError

    try:
        tree = ModuleTree(config, about)
    except UnknownModelError as cause:
        raise CheckpointError(
            f"{where}: what weights this model has is not known: {cause}",
            hint="plan from the weights: their headers are enough, on the Hub too",
        ) from cause
    tensors = _stored(tree.stored(), _dtype(config))
    key = digest(config)
    return Checkpoint(
        name=folder.name,
        revision=None,
        folder=folder,
        config=config,
        tensors=tensors,
        files=(),
        cache_key=hashlib.sha256(f"{CONFIG}\0{key}".encode()).hexdigest(),
        config_digest=key,
        _open={},
        kept={"matrices": by_tree(tensors, tree, tree.as_loaded(tensors))},
    )


def _stored(shapes: dict[str, tuple[int, ...]], dtype: str) -> dict[str, TensorSource]:
    tensors, begin = {}, 0
    for name, shape in shapes.items():
        end = begin + prod(shape) * BITS[dtype] // 8
        tensors[name] = TensorSource(name=name, file="", dtype=dtype, shape=shape, begin=begin, end=end)
        begin = end
    return tensors


def _dtype(config: dict[str, Any]) -> str:
    """What the weights are said to be stored in; of a quantised model, what they are dequantised to."""
    for part in (config, text_part(config)):
        for key in ("dtype", "torch_dtype"):
            if isinstance(part.get(key), str):
                return _DTYPES.get(part[key].removeprefix("torch."), "F32")
    return "F32"
