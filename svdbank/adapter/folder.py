"""A PEFT adapter folder, written and read without PEFT: ``adapter_config.json``, ``adapter_model.safetensors`` and our cache.

``svdbank.json`` beside them is a cache: PEFT's ``save_pretrained`` drops it, and nothing in the folder depends on it.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from svdbank.adapter.card import card
from svdbank.adapter.settings import (
    CACHE,
    CONFIG,
    OURS,
    SLIM,
    WEIGHTS,
    AdapterCache,
    LoraSettings,
)
from svdbank.core import disk
from svdbank.core.errors import CheckpointError, OptionError
from svdbank.core.folders import appearing
from svdbank.core.specs import from_json, to_json

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
class AdapterFolder:
    """A folder read and checked. ``factors`` maps module paths of the model to their factors."""

    path: Path
    settings: LoraSettings
    factors: dict[str, Factors]
    cache: AdapterCache | None

    def rank(self, module: str) -> int:
        """The rank that the config gives a module, with PEFT's patterns applied."""
        return int(_by_pattern(self.settings.rank_pattern, module, self.settings.r))

    def alpha(self, module: str) -> float:
        """The α that the config gives a module, with PEFT's patterns applied."""
        return _by_pattern(self.settings.alpha_pattern, module, self.settings.lora_alpha)

    def scale(self, module: str) -> float:
        """α/r, or α/√r with rsLoRA, with PEFT's per-module patterns applied."""
        rank, alpha = self.rank(module), self.alpha(module)
        return alpha / math.sqrt(rank) if self.settings.use_rslora else alpha / rank


def _by_pattern(patterns: Mapping[str, Any], module: str, default: float) -> float:
    """PEFT's rule (``get_pattern_key``): the first pattern that matches the end of the path, at a dot."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return float(value)
    return default


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
    """Write an adapter folder so that it appears whole or not at all (:func:`svdbank.core.folders.appearing`).

    ``readme`` is the model card, by default that of a fresh MiCA adapter; ``extra`` holds further files by name, for svdbank alone.
    Raises :class:`OptionError` where ``output`` exists and is not an empty folder, unless ``force``, which replaces an adapter folder
    (and nothing else).
    """
    check_output(output, force=force)
    with appearing(output, replacing=force, check=lambda: check_output(output, force=force)) as folder:
        tensors = {key: value for module, pair in factors.items() for key, value in _tensors(module, pair)}
        disk.write_new(folder / WEIGHTS, safetensors.torch.save(tensors, metadata={"format": "pt"}))
        disk.write_new(folder / CONFIG, to_json(settings, indent=2))
        disk.write_new(folder / CACHE, to_json(cache, indent=2))
        disk.write_new(folder / "README.md", (card(settings, cache) if readme is None else readme).encode())
        for name, data in extra.items():
            disk.write_new(folder / name, data)
        disk.fsync_dir(folder)


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
        folder = Path(place).expanduser().resolve()
        if folder.is_dir() and folder in output.parents:
            raise OptionError(f"{output} lies inside {place}, which is read", hint="name an output beside it")


def _tensors(module: str, factors: Factors) -> list[tuple[str, Tensor]]:
    if factors.embedding:
        names = (f"{_ROOT}{module}.lora_embedding_A", f"{_ROOT}{module}.lora_embedding_B")
    else:
        names = (f"{_ROOT}{module}.lora_A.weight", f"{_ROOT}{module}.lora_B.weight")
    return [(names[0], factors.A.contiguous()), (names[1], factors.B.contiguous())]


def read_folder(path: str | Path) -> AdapterFolder:
    """Read a LoRA adapter folder, PEFT's or ours, and check shapes, ranks and values.

    Raises :class:`CheckpointError` for a folder that is no adapter, for pickled weights, and for tensors that do not fit together.
    """
    folder = Path(path)
    settings = read_settings(folder)
    cache = None
    if (folder / CACHE).is_file():
        cache = from_json((folder / CACHE).read_bytes(), AdapterCache, where=str(folder / CACHE), error=CheckpointError)
    return AdapterFolder(folder, settings, _read_factors(folder, settings), cache)


def _is_stacked(module: str, settings: LoraSettings) -> bool:
    """Whether a module of a folder stands for parameters (experts) that PEFT's ``target_parameters`` names."""
    owner = bare(module)
    owners = [parameter.rpartition(".")[0] for parameter in settings.target_parameters or ()]
    return any(owner == own or owner.endswith(f".{own}") for own in owners if own)


def bare(module: str) -> str:
    """A module path without the ``base_layer`` by which PEFT nests wrappers of several parameters of one module."""
    return ".".join(part for part in module.split(".") if part != "base_layer")


def check_there(folder: Path, *, slim: bool = False) -> None:
    """Raise :class:`CheckpointError` for a folder that is no PEFT adapter, nor, with ``slim``, a slim one."""
    if (folder / CONFIG).is_file() or (slim and (folder / SLIM).is_file()):
        return
    if (folder / SLIM).is_file():
        raise CheckpointError(
            f"{folder}: a slim adapter, whose B is in its bank",
            hint=f"svdbank export {folder} --to peft --bank BANK -o FOLDER",
        )
    making = "svdbank init MODEL -o FOLDER"
    if folder.exists():
        raise CheckpointError(f"{folder}: no adapter here ({CONFIG} is missing)", hint=making)
    meant = _alike(folder)
    raise CheckpointError(f"{folder}: no such folder", hint=making if meant is None else f"did you mean {meant}?")


def _alike(folder: Path) -> Path | None:
    """The adapter beside a folder that is not there whose name is nearest to its own; None where none is near."""
    try:
        adapters = [path.name for path in folder.parent.iterdir() if (path / CONFIG).is_file() or (path / SLIM).is_file()]
    except OSError:
        return None
    near = difflib.get_close_matches(folder.name, sorted(adapters), n=1)
    return folder.parent / near[0] if near else None


def read_settings(folder: Path) -> LoraSettings:
    """``adapter_config.json`` alone. Raises :class:`CheckpointError`."""
    check_there(folder)
    settings = from_json((folder / CONFIG).read_bytes(), LoraSettings, where=str(folder / CONFIG), error=CheckpointError)
    if not (folder / WEIGHTS).is_file():
        if (folder / "adapter_model.bin").exists():
            raise CheckpointError(
                f"{folder}: adapter_model.bin is a pickle, which can run code, and is not read",
                hint="load it where you trust it and save it again with save_pretrained(…): that writes safetensors",
            )
        raise CheckpointError(f"{folder}: {WEIGHTS} is missing")
    return settings


def _finite(tensor: Tensor) -> bool:
    """No NaN and no infinity: their sum would be one. Only where a sum of large values overflows is every entry looked at."""
    return math.isfinite(float(tensor.sum())) or bool(torch.isfinite(tensor).all())


def _read_factors(folder: Path, settings: LoraSettings) -> dict[str, Factors]:
    halves: dict[str, dict[str, Tensor]] = {}
    embeddings = set()
    try:
        with safetensors.safe_open(str(folder / WEIGHTS), framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a mapping
                linear, embedding = _KEY.match(key), _EMBEDDING_KEY.match(key)
                found = linear or embedding
                if found is None:
                    continue  # base_layer copies of embeddings, modules_to_save: not factors
                halves.setdefault(found["module"], {})[found["factor"][-1]] = file.get_tensor(key)
                if embedding:
                    embeddings.add(found["module"])
    except safetensors.SafetensorError as cause:
        raise CheckpointError(f"{folder / WEIGHTS}: {cause}") from cause
    if not halves:
        raise CheckpointError(f"{folder / WEIGHTS}: holds no LoRA factors")
    factors = {}
    for module, pair in halves.items():
        if set(pair) != {"A", "B"}:
            raise CheckpointError(f"{folder / WEIGHTS}: {module} has only its {', '.join(pair)} factor")
        A, B = pair["A"], pair["B"]
        rank = _by_pattern(settings.rank_pattern, module, settings.r)
        if settings.target_parameters and A.ndim == 2 and _is_stacked(module, settings):
            rank = A.shape[0]  # experts times a rank whose pattern names the parameter: split_experts looks at it
        if A.ndim != 2 or B.ndim != 2 or A.shape[0] != rank or B.shape[1] != rank:
            raise CheckpointError(
                f"{folder / WEIGHTS}: {module} has A {tuple(A.shape)} and B {tuple(B.shape)}, not rank {rank:g} as {CONFIG} says"
            )
        if not (_finite(A) and _finite(B)):
            raise CheckpointError(f"{folder / WEIGHTS}: {module} holds NaN or infinity")
        factors[module] = Factors(A, B, embedding=module in embeddings)
    return factors
