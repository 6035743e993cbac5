"""A PEFT adapter folder, written and read without PEFT: ``adapter_config.json``, ``adapter_model.safetensors`` and our record.

``svdbank.json`` beside them is a cache: PEFT's ``save_pretrained`` drops it, and nothing in the folder depends on it.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from svdbank.adapter.card import card
from svdbank.adapter.documents import Documents, read_documents
from svdbank.adapter.experts import parameters_of
from svdbank.adapter.settings import CACHE, CONFIG, OURS, SLIM, WEIGHTS, AdapterCache, LoraSettings
from svdbank.core import disk
from svdbank.core.errors import CheckpointError, OptionError
from svdbank.core.folders import appearing
from svdbank.core.places import OnDisk, locate
from svdbank.core.specs import to_json

#: What PEFT puts before a module path in the keys of a saved adapter.
_ROOT = "base_model.model."
_KEY = re.compile(r"^base_model\.model\.(?P<module>.+)\.(?P<factor>lora_[AB])\.weight$")
_EMBEDDING_KEY = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_embedding_(?P<factor>[AB])$")


@dataclass(frozen=True)
class Factors:
    """``ΔW = scale · B A`` of one module: ``A`` (r, in), ``B`` (out, r). ``embedding`` tells how PEFT names and applies them."""

    A: Tensor
    B: Tensor
    embedding: bool = False


@dataclass(frozen=True)
class AdapterFolder(Documents):
    """A folder read and checked: its documents, and by module path of the model the factors.

    ``others`` are the keys of what lies beside the factors: whole modules, copies of embeddings, what other kinds of training left.
    """

    factors: dict[str, Factors] = field(default_factory=dict)
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class SavedModules:
    """``tensors``: whole tensors that replace the model's, by their name in the loaded model."""

    tensors: dict[str, Tensor] = field(default_factory=dict)


def write_folder(
    output: Path,
    settings: LoraSettings,
    factors: Mapping[str, Factors],
    cache: AdapterCache,
    *,
    readme: str | None = None,
    extra: Mapping[str, bytes] = MappingProxyType({}),
    force: bool = False,
) -> None:
    """Write an adapter folder so that it appears whole or not at all.

    ``readme`` is the model card, by default that of a fresh MiCA adapter; ``extra`` holds further files by name, for svdbank alone.
    Raises :class:`OptionError` where ``output`` exists and is not an empty folder, unless ``force``, which replaces an adapter folder
    (and nothing else).
    """
    with new_folder(output, force=force) as folder:
        tensors = {}
        for module, pair in factors.items():
            tensors[key_of(module, "A", embedding=pair.embedding)] = pair.A.contiguous()
            tensors[key_of(module, "B", embedding=pair.embedding)] = pair.B.contiguous()
        disk.write_new(folder / WEIGHTS, safetensors.torch.save(tensors, metadata={"format": "pt"}))
        disk.write_new(folder / CONFIG, to_json(settings, indent=2))
        disk.write_new(folder / CACHE, to_json(cache, indent=2))
        disk.write_new(folder / "README.md", (card(settings, cache) if readme is None else readme).encode())
        for name, data in extra.items():
            disk.write_new(folder / name, data)
        disk.fsync_dir(folder)


def new_folder(output: Path, *, force: bool) -> AbstractContextManager[Path]:
    """A folder to fill that becomes ``output`` at the end (:func:`svdbank.core.folders.appearing`), where that is not in use."""
    check_output(output, force=force)
    return appearing(output, replacing=force, check=lambda: check_output(output, force=force))


def check_output(output: Path, *, force: bool) -> None:
    """Refuse an output that is in use, before any work: a file, or a folder with something in it."""
    if not output.exists() and not output.is_symlink():
        return
    if not output.is_dir():
        raise OptionError(f"{output} exists and is not a folder", hint="name another output")
    if not any(output.iterdir()):
        return
    if not force:
        raise OptionError(f"{output} is not empty", hint="name another output, or replace the adapter there with --force")
    if not ((output / CONFIG).is_file() or (output / SLIM).is_file()):
        raise OptionError(f"{output} is not empty and holds no adapter, so it is not replaced", hint="name another output")
    strangers = sorted(path.name for path in output.iterdir() if path.name not in OURS)
    if strangers:
        raise OptionError(
            f"{output} holds more than an adapter ({', '.join(strangers[:3])}), so it is not replaced",
            hint="name another output, or move those away",
        )


def check_apart(output: Path, inputs: Iterable[str | os.PathLike[str]]) -> None:
    """Refuse an output inside a folder that is read: that would no longer be an adapter, or a model, and nothing else."""
    for place in inputs:
        found = locate(place)
        folder = found.path.resolve() if isinstance(found, OnDisk) else None
        if folder is not None and folder.is_dir() and folder in output.parents:
            raise OptionError(f"{output} lies inside {place}, which is read", hint="name an output beside it")


def key_of(module: str, factor: Literal["A", "B"], *, embedding: bool = False) -> str:
    """The key under which PEFT saves a factor of a module."""
    return f"{_ROOT}{module}.lora_embedding_{factor}" if embedding else f"{_ROOT}{module}.lora_{factor}.weight"


def read_folder(path: str | Path) -> AdapterFolder:
    """Read a LoRA adapter folder, PEFT's or ours, and check shapes, ranks and values.

    Raises :class:`CheckpointError` for a folder that is no adapter, for pickled weights, and for tensors that do not fit together.
    """
    said = read_documents(path)
    factors, others = _read_factors(said)
    return AdapterFolder(said.path, said.settings, said.cache, said.beyond, factors, others)


def _finite(tensor: Tensor) -> bool:
    """No NaN and no infinity: their sum would be one. Only where a sum of large values overflows is every entry looked at."""
    return math.isfinite(float(tensor.sum())) or bool(torch.isfinite(tensor).all())


def _read_factors(said: Documents) -> tuple[dict[str, Factors], tuple[str, ...]]:
    folder, settings = said.path, said.settings
    halves: dict[str, dict[str, Tensor]] = {}
    embeddings, others = set(), []
    try:
        with safetensors.safe_open(str(folder / WEIGHTS), framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a mapping
                linear, embedding = _KEY.match(key), _EMBEDDING_KEY.match(key)
                found = linear or embedding
                if found is None:
                    others.append(key)  # base_layer copies of embeddings, modules_to_save: not factors
                    continue
                halves.setdefault(found["module"], {})[found["factor"][-1]] = file.get_tensor(key)
                if embedding:
                    embeddings.add(found["module"])
    except safetensors.SafetensorError as cause:
        raise CheckpointError(f"{folder / WEIGHTS}: {cause}") from cause
    if not halves:
        raise CheckpointError(f"{folder / WEIGHTS}: holds no LoRA factors")
    factors = {}
    parameters = parameters_of(settings, halves)
    for module, pair in halves.items():
        if set(pair) != {"A", "B"}:
            raise CheckpointError(f"{folder / WEIGHTS}: {module} has only its {', '.join(pair)} factor")
        A, B = pair["A"], pair["B"]
        rank = said.rank(parameters.get(module, module))
        if module in parameters and A.ndim == 2 and A.shape[0] % rank == 0:
            rank = A.shape[0]  # that of all experts together
        if A.ndim != 2 or B.ndim != 2 or A.shape[0] != rank or B.shape[1] != rank:
            raise CheckpointError(
                f"{folder / WEIGHTS}: {module} has A {tuple(A.shape)} and B {tuple(B.shape)}, not rank {rank} as {CONFIG} says"
            )
        if not (_finite(A) and _finite(B)):
            raise CheckpointError(f"{folder / WEIGHTS}: {module} holds NaN or infinity")
        factors[module] = Factors(A, B, embedding=module in embeddings)
    return factors, tuple(others)


_FACTOR = re.compile(r"\.lora_[AB]\.weight$|\.lora_embedding_[AB]$")

#: Ends of keys → what was trained; none of it is a sum s·B·A.
_OTHER = {
    r"lora_magnitude_vector(\.weight)?$": "DoRA magnitudes",
    r"lora_B\.bias$": "biases of LoRA's own (lora_bias)",
    r"(token_adapter\.|trainable_tokens_).*": "trained tokens (trainable_token_indices)",
}


def saved_modules(folder: AdapterFolder) -> SavedModules:
    """Read the whole modules beside the factors (``modules_to_save``).

    Raises :class:`CheckpointError` for kinds of training that are no LoRA, and for what is neither a factor nor a whole tensor. PEFT
    saves the layer under an adapted embedding too (``base_layer``); that copy of the base is left alone.
    """
    if folder.beyond is not None:
        raise _refused(folder.path, folder.beyond)
    keys: dict[str, str] = {}
    for key in folder.others:
        if _FACTOR.search(key) or key.endswith(".base_layer.weight"):
            continue
        name = key.removeprefix(_ROOT)
        for pattern, what in _OTHER.items():
            if re.search(pattern, name):
                raise _refused(folder.path, what)
        if name == key or "lora_" in name:
            raise CheckpointError(f"{folder.path / WEIGHTS}: {key!r} is neither a LoRA factor nor a module of the model")
        keys[key] = name.replace(".modules_to_save.", ".")
    if not keys:
        return SavedModules()
    with safetensors.safe_open(str(folder.path / WEIGHTS), framework="pt") as file:
        tensors = {name: file.get_tensor(key) for key, name in keys.items()}
    for name, values in tensors.items():
        if not values.is_floating_point() or not bool(torch.isfinite(values).all()):
            raise CheckpointError(f"{folder.path / WEIGHTS}: {name} is no tensor of finite numbers")
    return SavedModules(tensors)


def _refused(folder: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{folder}: {what} is not a sum ΔW = s·B·A of low rank", hint="merge it into its base with PEFT's merge_and_unload()"
    )
