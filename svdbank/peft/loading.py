"""What stands around PEFT's own loading: every tensor and every setting of a folder arrives, or is named."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import safetensors
import safetensors.torch
from torch import nn

from svdbank.adapter.experts import bare, parameters_of
from svdbank.adapter.folder import ROOT, AdapterFolder, moved_key, read_folder, write_folder
from svdbank.adapter.model import Adapter
from svdbank.adapter.naming import Move, move_of
from svdbank.adapter.reading import adapter_of
from svdbank.adapter.renaming import in_model
from svdbank.adapter.settings import CACHE, CONFIG, WEIGHTS
from svdbank.adapter.writing import cache_of, write_adapter
from svdbank.core.errors import CheckpointError, SvdbankError
from svdbank.peft.layers import unwrapped

#: How ``init_lora_weights`` begins where the base was changed by data, by a quantiser or by a random draw that loading does not repeat.
_LOST_BASE = ("corda", "loftq", "lora_ga", "pissa_niter")

_BASE = "load the base model of the adapter, in the class that was trained"


def check_loaded(folder: str, missing: Sequence[str], unexpected: Sequence[str]) -> None:
    """Raise :class:`CheckpointError` where PEFT found no place for a tensor of a folder, or no tensor for a factor of the model."""
    if unexpected:
        raise CheckpointError(
            f"{folder}: {len(unexpected)} of its tensors belong to no module of this model, first {unexpected[0]}", hint=_BASE
        )
    if missing:
        raise CheckpointError(
            f"{folder}: holds no factors for {len(missing)} places that its config targets in this model, first {missing[0]}",
            hint=_BASE,
        )


def check_known(peft: Any, saved: AdapterFolder) -> None:
    """Raise :class:`CheckpointError` for a setting that this PEFT does not know and would leave out, and for an initialisation that changed
    the base so that loading does not get the same base again."""
    said = saved.settings.init_lora_weights
    if isinstance(said, str) and said.lower().startswith(_LOST_BASE):
        raise CheckpointError(
            f"{saved.path}: init_lora_weights is {said!r}, which changed the base that it was trained on, and loading does not get that "
            "base again",
            hint=f"where the model is that changed base, say so: init_lora_weights true in {CONFIG}",
        )
    config = msgspec.json.decode((saved.path / CONFIG).read_bytes())
    known = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    for name, value in config.items():
        if name not in known and value not in (None, False, "", [], {}):
            raise CheckpointError(
                f"{saved.path}: {CONFIG} sets {name!r}, which PEFT {peft.__version__} does not know and would leave out",
                hint=f"it was written by PEFT {config['peft_version']}: install that" if config.get("peft_version") else None,
            )


def check_rows(model: Any, saved: AdapterFolder) -> None:
    """Raise :class:`CheckpointError` for an adapter that was trained on more or fewer tokens than the model has rows for."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    paths = {id(module): unwrapped(path) for path, module in base.named_modules()}
    for asked in ("get_input_embeddings", "get_output_embeddings"):
        layer = getattr(base, asked, lambda: None)()
        path, rows = paths.get(id(layer), ""), getattr(getattr(layer, "weight", None), "shape", (0,))[0]
        held = saved.whole.replacing.get(f"{path}.weight", saved.whole.beneath.get(path))
        if held is not None and len(held) != rows:
            raise CheckpointError(
                f"{saved.path}: trained on {len(held)} tokens, {path} has {rows} rows",
                hint=f"model.resize_token_embeddings({len(held)}) first; where a model is named by its folder, save_pretrained after it",
            )


def move_into(root: nn.Module, saved: AdapterFolder) -> Move:
    """From the paths of the class that was trained to those of the model at hand: a bare one and one with a head, a language model alone
    and inside a multimodal one. OptionError where two places would do."""
    modules = {unwrapped(name): module for name, module in root.named_modules()}
    shapes = {bare(unwrapped(module)): sorted((pair.B.shape[0], pair.A.shape[1])) for module, pair in saved.factors.items()}

    def fits(key: str, path: str) -> bool:
        weight = getattr(modules[path], "weight", None)
        return weight is None or weight.dim() != 2 or not weight.is_floating_point() or sorted(weight.shape) == shapes[key]

    return move_of(list(shapes), {path: path for path in modules}, fits) if shapes else Move("", "")


def moved_fields(saved: AdapterFolder, move: Move) -> dict[str, Any]:
    """What a config has to say so that the adapter is put where ``move`` says, and nowhere else."""
    settings = saved.settings
    parameters = parameters_of(settings, saved.factors)
    return {
        "target_modules": sorted(move(module) for module in saved.factors if module not in parameters),
        "target_parameters": sorted(move(parameter) for parameter in set(parameters.values())) or None,
        "rank_pattern": {move(name): rank for name, rank in settings.rank_pattern.items()},
        "alpha_pattern": {move(name): alpha for name, alpha in settings.alpha_pattern.items()},
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }


@contextlib.contextmanager
def as_peft_loads(saved: AdapterFolder, model: Any) -> Iterator[AdapterFolder]:
    """The folder, or one for the time being that PEFT loads onto this model as it is meant.

    Wrappers leave their names in keys, or in the paths of the model, and paths may move (:func:`move_into`): PEFT finds no such key.
    Names of older Transformers it translates in part, and not the patterns of the config; of experts that were modules it makes another
    scale with rsLoRA, and nothing where some are not adapted. Those are written anew with the model's own names.
    """
    root: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model
    older = _named_as_in(saved, root)
    move = Move("", "") if older is not None else move_into(root, saved)
    wrapped = {own: path for path, _ in root.named_modules() if (own := unwrapped(path)) != path and "base_layer" not in path}
    if older is None and not saved.names and move == Move("", "") and not wrapped:
        yield saved
        return
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "adapter"
        if older is not None:
            _write_moved(saved, *older, place)
        else:
            _write_with(saved, move, place)
        if wrapped:
            tensors = safetensors.torch.load_file(place / WEIGHTS)
            safetensors.torch.save_file({_wrapped(key, wrapped): value for key, value in tensors.items()}, place / WEIGHTS)
        yield read_folder(place, any_kind=True)


def _wrapped(key: str, paths: Mapping[str, str]) -> str:
    """The key of a tensor whose module has the names of wrappers in its path, as in a model that torch.compile wrapped: PEFT wants them."""
    path = key.removeprefix(ROOT)
    ends = [i for i, letter in enumerate(path) if letter == "."]
    return next((f"{ROOT}{paths[path[:i]]}{path[i:]}" for i in reversed(ends) if path[:i] in paths), key)


def _write_with(saved: AdapterFolder, move: Move, place: Path) -> None:
    """The same tensors with the keys that PEFT looks for, and a config that leads there."""
    place.mkdir()
    plain = {stored: key for key, stored in saved.names.items()}
    tensors = safetensors.torch.load_file(saved.path / WEIGHTS)
    renamed = {moved_key(plain.get(key, key), move): value for key, value in tensors.items()}
    safetensors.torch.save_file(renamed, place / WEIGHTS)
    config = (saved.path / CONFIG).read_bytes()
    if move != Move("", ""):
        config = msgspec.json.encode(msgspec.json.decode(config) | moved_fields(saved, move))
    (place / CONFIG).write_bytes(config)
    if (saved.path / CACHE).is_file():
        (place / CACHE).write_bytes((saved.path / CACHE).read_bytes())


def _named_as_in(saved: AdapterFolder, root: Any) -> tuple[Adapter, Adapter] | None:
    """The adapter, and with the names of modules of ``root``, where it has others; None where PEFT is to load the folder as it is."""
    paths = {unwrapped(path) for path, _ in root.named_modules()}
    strange = [module for module in saved.factors if bare(module) not in paths]
    if not strange or saved.beyond is not None or saved.others or not hasattr(root, "config"):
        return None
    try:
        if saved.made_as() != "lora":
            return None
    except CheckpointError:  # of a changed base, which PEFT may know how to load
        return None
    adapter = adapter_of(saved)
    found = in_model(adapter, root.config.to_dict() | {"architectures": [type(root).__name__]}, type(root).__name__)
    parameters = {unwrapped(name).removesuffix(".weight") for name, _ in root.named_parameters()}
    there = all(
        (key.rpartition(".")[0] if weight.kind == "expert" else key) in parameters for key, weight in found.weights.items()
    )
    return (adapter, found) if there and found.weights.keys() != adapter.weights.keys() else None


def _write_moved(saved: AdapterFolder, adapter: Adapter, found: Adapter, place: Path) -> None:
    """Factors and scales as they are where only names changed; of stacked experts, the scales in A."""
    kinds = {weight.kind for weight in found.weights.values()}
    if len(found.weights) < len(adapter.weights) or not kinds <= {"linear", "embedding"}:
        write_adapter(found, place)
        return
    new = dict(zip(adapter.weights, found.weights, strict=True))
    settings = msgspec.structs.replace(
        saved.settings,
        target_modules=list(new.values()),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        modules_to_save=sorted({name.rpartition(".")[0] for name in found.whole.replacing}) or None,
        rank_pattern={new[key]: rank for key in new if (rank := saved.rank(key)) != saved.settings.r},
        alpha_pattern={new[key]: alpha for key in new if (alpha := saved.alpha(key)) != saved.settings.lora_alpha},
    )
    factors = {new[key]: pair for key, pair in saved.factors.items()}
    write_folder(place, settings, factors, cache_of(found), whole=found.whole, readme="")


@contextlib.contextmanager
def explained(saved: AdapterFolder) -> Iterator[None]:
    """What PEFT raises about an adapter that it cannot load as an error that names the folder."""
    try:
        yield
    except SvdbankError:
        raise
    except (AttributeError, ImportError, KeyError, RuntimeError, TypeError, ValueError) as cause:
        import torch

        if isinstance(cause, torch.OutOfMemoryError):
            raise
        what = saved.beyond or f"an adapter with init_lora_weights {saved.settings.init_lora_weights!r}"
        hint = None if "multiple adapters" in str(cause) else _BASE
        raise CheckpointError(f"{saved.path}: PEFT does not load {what} onto this model: {cause}", hint=hint) from cause
