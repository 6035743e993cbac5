"""A PEFT adapter folder, written and read without PEFT: ``adapter_config.json``, ``adapter_model.safetensors`` and our record.

``svdbank.json`` beside them is a cache: PEFT's ``save_pretrained`` drops it, and nothing in the folder depends on it.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import safetensors
import torch
from torch import Tensor

from svdbank.adapter.card import card
from svdbank.adapter.checksums import check_folder, sealed, tensor_file
from svdbank.adapter.documents import MERGED_BY_PEFT, Documents, read_documents
from svdbank.adapter.experts import parameters_of
from svdbank.adapter.settings import CACHE, CONFIG, OURS, SLIM, WEIGHTS, AdapterCache, LoraSettings
from svdbank.adapter.targeting import untargeted
from svdbank.adapter.whole import WholeTensors
from svdbank.checkpoint.header import PREFIX, header_length, parse_header
from svdbank.checkpoint.naming.wrappers import unwrapped
from svdbank.core import disk
from svdbank.core.errors import CheckpointError, OptionError
from svdbank.core.folders import appearing
from svdbank.core.places import OnDisk, locate
from svdbank.core.specs import to_json

#: What PEFT puts before a module path in the keys of a saved adapter.
ROOT = "base_model.model."
#: No matrix of a model has more rows or columns.
_LARGEST = 1 << 26
_KEY = re.compile(r"^base_model\.model\.(?P<module>.+)\.(?P<factor>lora_[AB])\.weight$")
_EMBEDDING_KEY = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_embedding_(?P<factor>[AB])$")
_BENEATH_KEY = re.compile(r"^base_model\.model\.(?P<module>.+)\.base_layer\.weight$")


@dataclass(frozen=True)
class Factors:
    """``ΔW = scale · B A`` of one module: ``A`` (r, in), ``B`` (out, r). ``embedding`` tells how PEFT names and applies them."""

    A: Tensor
    B: Tensor
    embedding: bool = False


@dataclass(frozen=True)
class AdapterFolder(Documents):
    """A folder read and checked, every key of it: its documents, by module path of the model the factors, and the whole tensors.

    ``others`` are the keys of what is neither, with what each kind of it is, where the folder was read with ``any_kind``.
    ``names`` are the keys in the file that wrappers (torch.compile, FSDP, DDP) changed, by the key that PEFT would write.
    ``unchecked`` says why nothing is known of the bytes, None where they are those that svdbank recorded.
    """

    factors: dict[str, Factors] = field(default_factory=dict)
    whole: WholeTensors = field(default_factory=WholeTensors)
    others: tuple[str, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)
    unchecked: str | None = None


def write_folder(
    output: Path,
    settings: LoraSettings,
    factors: Mapping[str, Factors],
    cache: AdapterCache,
    *,
    whole: WholeTensors | None = None,
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
        if whole is not None:
            tensors |= {f"{ROOT}{name}": tensor.contiguous() for name, tensor in whole.replacing.items()}
            tensors |= {f"{ROOT}{module}.base_layer.weight": tensor.contiguous() for module, tensor in whole.beneath.items()}
        _refuse_overflow(tensors)
        weights = tensor_file(tensors)
        disk.write_new(folder / WEIGHTS, weights)
        disk.write_new(folder / CONFIG, to_json(settings, indent=2))
        disk.write_new(folder / CACHE, to_json(sealed(cache, settings, {WEIGHTS: weights, **extra}), indent=2))
        disk.write_new(folder / "README.md", (card(settings, cache) if readme is None else readme).encode())
        for name, data in extra.items():
            disk.write_new(folder / name, data)
        disk.fsync_dir(folder)


def _refuse_overflow(tensors: Mapping[str, Tensor]) -> None:
    """OptionError for a factor that is no finite number in its dtype: what was read is finite, so a scale or weight made it so."""
    over = [key for key, tensor in tensors.items() if not _finite(tensor)]
    if over:
        raise OptionError(
            f"{len(over)} tensors of the result overflow {str(tensors[over[0]].dtype).removeprefix('torch.')}, first {over[0]}",
            hint="use a smaller scale, weight or alpha",
        )


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


def moved_key(key: str, move: Callable[[str], str]) -> str:
    """A key of a saved adapter with its module path moved."""
    return f"{ROOT}{move(key.removeprefix(ROOT))}"


def key_of(module: str, factor: Literal["A", "B"], *, embedding: bool = False) -> str:
    """The key under which PEFT saves a factor of a module."""
    return f"{ROOT}{module}.lora_embedding_{factor}" if embedding else f"{ROOT}{module}.lora_{factor}.weight"


def read_folder(path: str | Path, *, any_kind: bool = False) -> AdapterFolder:
    """Read a LoRA adapter folder, PEFT's or ours, and check shapes, ranks and values; every key and every setting is accounted for.

    Raises :class:`CheckpointError` for a folder that is no adapter, for pickled weights, for tensors that do not fit together, and for
    a setting or a tensor with which the adapter is no sum ``s·B·A`` and whole tensors. The last is left to PEFT with ``any_kind``.
    :class:`DamageError` where svdbank wrote the folder and its bytes are not as they were.
    """
    said = read_documents(path)
    if said.beyond is not None and not any_kind:
        raise _refused(said.path, said.beyond)
    unchecked = check_folder(said.path, said.settings, said.cache)
    keys, names = _keys_of(said.path / WEIGHTS)
    others = _others(keys, said)
    if others and not any_kind:
        raise _refused_tensor(said.path, keys[others[0]])
    factors, whole = _read(said, keys, set(others))
    if not any_kind:
        _check_held(said, whole)
    return AdapterFolder(said.path, said.settings, said.cache, said.beyond, factors, whole, others, names, unchecked)


def _check_held(said: Documents, whole: WholeTensors) -> None:
    """Raise :class:`CheckpointError` where the config names whole trained modules, and none is there."""
    if said.settings.modules_to_save and not whole.replacing:
        raise CheckpointError(
            f"{said.path}: {CONFIG} names whole trained modules (modules_to_save: {', '.join(said.settings.modules_to_save)}), and "
            f"{WEIGHTS} holds none of them",
            hint="save the adapter again where they are: a sharded model's save_pretrained may leave them out",
        )


def _keys_of(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Each key of a file as PEFT would write it, with the one that is there; and of these those that differ.

    Wrappers leave their names in keys: ``_orig_mod`` (torch.compile), ``module`` (DDP), FSDP's and those of checkpointed activations. A
    state dict saved by hand has the adapter's name in them (``lora_A.default.weight``), lacks ``base_model.model``, or has before it what
    the ``PeftModel`` was an attribute of.
    """
    stored = _declared(path)
    bare = {key: _unwrapped(key) for key in stored}
    rooted = any(key.startswith(ROOT) for key in bare.values())
    keys: dict[str, str] = {}
    for key, own in bare.items():
        plain = own if rooted else ROOT + own
        if plain in keys:
            raise CheckpointError(f"{path}: {keys[plain]!r} and {key!r} are one tensor: this file holds several adapters")
        keys[plain] = key
    return keys, {plain: key for plain, key in keys.items() if plain != key}


_NAMED = re.compile(r"\.(?P<factor>lora_[AB])\.(?P<name>[^.]+)\.weight$|\.(?P<embedding>lora_embedding_[AB])\.(?P<own>[^.]+)$")


def _declared(path: Path) -> list[str]:
    """The keys of a file by its header, read before anything maps what it claims: a file with holes may claim what no memory holds."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(PREFIX)
            header = file.read(header_length(prefix, size=size, where=str(path)))
    except OSError as cause:
        raise CheckpointError(f"{path}: cannot be read: {cause.strerror}") from cause
    entries = parse_header(header, file=path.name, size=size, where=str(path))
    for key, entry in entries.items():
        if any(length > _LARGEST for length in entry.shape):
            raise CheckpointError(f"{path}: {key} claims to be {entry.shape}, which no model has")
    return list(entries)


def _unwrapped(key: str) -> str:
    key = unwrapped(key)
    key = key[key.rfind(f".{ROOT}") + 1 :]
    found = _NAMED.search(key)
    if found is None:
        return key
    return key[: found.start()] + (f".{found['factor']}.weight" if found["factor"] else f".{found['embedding']}")


def _values(tensor: Tensor, folder: Path, key: str) -> Tensor:
    """A factor; of eight bits, in float32, which holds its values. :class:`CheckpointError` for whole numbers: codes, not values."""
    if not tensor.is_floating_point():
        raise CheckpointError(
            f"{folder / WEIGHTS}: {key} is stored as {str(tensor.dtype).removeprefix('torch.')}: codes of a quantiser, or a file of "
            "another program, not a factor",
        )
    return tensor.float() if tensor.dtype.itemsize == 1 else tensor


def _finite(tensor: Tensor) -> bool:
    """No NaN and no infinity: their sum would be one. Only where a sum of large values overflows is every entry looked at."""
    return math.isfinite(float(tensor.sum())) or bool(torch.isfinite(tensor).all())


def _others(keys: Mapping[str, str], said: Documents) -> tuple[str, ...]:
    """The keys of what is neither a factor nor a whole tensor."""
    adapted = {found["module"] for key in keys if (found := _KEY.match(key) or _EMBEDDING_KEY.match(key))}
    others = []
    for key in keys:
        if _KEY.match(key) or _EMBEDDING_KEY.match(key):
            continue
        beneath = _BENEATH_KEY.match(key)
        strange = "base_layer" in key if beneath is None else beneath["module"] not in adapted
        if strange or "lora_" in key or any(re.search(pattern, key) for pattern in _OTHER):
            others.append(key)
    return tuple(others)


def _read(said: Documents, keys: Mapping[str, str], others: AbstractSet[str]) -> tuple[dict[str, Factors], WholeTensors]:
    folder, settings = said.path, said.settings
    halves: dict[str, dict[str, Tensor]] = {}
    embeddings: set[str] = set()
    replacing: dict[str, Tensor] = {}
    beneath: dict[str, Tensor] = {}
    with safetensors.safe_open(str(folder / WEIGHTS), framework="pt") as file:
        for key, stored in keys.items():
            if key in others:
                continue
            linear, embedding, under = _KEY.match(key), _EMBEDDING_KEY.match(key), _BENEATH_KEY.match(key)
            if found := linear or embedding:
                halves.setdefault(found["module"], {})[found["factor"][-1]] = _values(file.get_tensor(stored), folder, stored)
                if embedding:
                    embeddings.add(found["module"])
            elif under:
                beneath[under["module"]] = file.get_tensor(stored)
            else:
                replacing[key.removeprefix(ROOT).replace(".modules_to_save.", ".")] = file.get_tensor(stored)
    for name, tensor in (*replacing.items(), *beneath.items()):
        if not tensor.is_floating_point() or not _finite(tensor):
            raise CheckpointError(f"{folder / WEIGHTS}: {name} is no tensor of finite numbers")
    if not halves:
        first = f": the first of its {len(keys)} keys is {next(iter(keys.values()))!r}" if keys else ": it is empty"
        raise CheckpointError(
            f"{folder / WEIGHTS}: holds no LoRA factors, {ROOT}MODULE.lora_A.weight and .lora_B.weight{first}"
        )
    factors = {}
    parameters = parameters_of(settings, halves)
    ordinary = [module for module in halves if module not in parameters] if said.beyond is None else []
    for module, setting in untargeted(settings, ordinary):
        raise CheckpointError(
            f"{folder}: holds factors of {module}, which {setting} of its {CONFIG} leaves out: PEFT would load the adapter without them"
        )
    for module, pair in halves.items():
        if set(pair) != {"A", "B"}:
            raise CheckpointError(f"{folder / WEIGHTS}: {module} has only its {', '.join(pair)} factor")
        A, B = pair["A"], pair["B"]
        if said.beyond is not None:
            factors[module] = Factors(A, B, embedding=module in embeddings)  # PEFT's, of whatever shape
            continue
        if A.ndim > 2 or B.ndim > 2:
            raise CheckpointError(
                f"{folder / WEIGHTS}: {module} is a convolution, with A {tuple(A.shape)} and B {tuple(B.shape)}: only adapters of "
                "matrices are read"
            )
        rank = said.rank(parameters.get(module, module))
        if module in parameters and A.ndim == 2 and A.shape[0] % rank == 0:
            rank = A.shape[0]  # that of all experts together
        if A.ndim != 2 or B.ndim != 2 or A.shape[0] != rank or B.shape[1] != rank or not (A.numel() and B.numel()):
            raise CheckpointError(
                f"{folder / WEIGHTS}: {module} has A {tuple(A.shape)} and B {tuple(B.shape)}, not rank {rank} as {CONFIG} says"
            )
        if not (_finite(A) and _finite(B)):
            raise CheckpointError(f"{folder / WEIGHTS}: {module} holds NaN or infinity")
        factors[module] = Factors(A, B, embedding=module in embeddings)
    return factors, WholeTensors(replacing, beneath)


#: Parts of keys → what was trained; none of it is a sum s·B·A or a whole tensor.
_OTHER = {
    r"lora_magnitude_vector(\.weight)?$": "DoRA magnitudes (use_dora)",
    r"lora_B\.bias$": "biases of LoRA's own (lora_bias)",
    r"(token_adapter\.|trainable_tokens_).*": "trained tokens (trainable_token_indices)",
    r"base_layer\.bias$": "biases (bias)",
}


def _refused_tensor(folder: Path, key: str) -> CheckpointError:
    for pattern, what in _OTHER.items():
        if re.search(pattern, key):
            return _refused(folder, f"{what}, {key},")
    return CheckpointError(
        f"{folder / WEIGHTS}: {key!r} is neither a LoRA factor ({ROOT}MODULE.lora_A.weight, .lora_B.weight) nor a module's tensor"
    )


def _refused(folder: Path, what: str) -> CheckpointError:
    merges = any(f"({field})" in what for field in MERGED_BY_PEFT)
    return CheckpointError(
        f"{folder}: {what} is not a sum ΔW = s·B·A of low rank",
        hint="merge it into its base with PEFT's merge_and_unload()" if merges else None,
    )
