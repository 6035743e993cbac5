"""An adapter of older Transformers as one of the model that is loaded now: other names, and experts that are rows of one parameter."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import msgspec
import torch

from svdbank.adapter.components import Component, Free
from svdbank.adapter.experts import TAKEN
from svdbank.adapter.model import Adapter
from svdbank.adapter.weights import AdaptedWeight
from svdbank.checkpoint.configuration import text_part
from svdbank.checkpoint.naming.locations import Location, locations
from svdbank.core.errors import OptionError

#: What stands in the path of an expert that is a module by itself.
_ONE_BY_ONE = re.compile(r"\.experts\.\d+\.")

#: Keys of ``config.json`` that say how many experts a parameter stacks.
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


def one_by_one(keys: Iterable[str]) -> str | None:
    """The first of the keys that is an expert which is a module by itself; None where there is none."""
    return next((key for key in keys if _ONE_BY_ONE.search(key)), None)


def in_model(adapter: Adapter, config: Mapping[str, Any], where: str) -> Adapter:
    """The adapter with its modules called as in the model that Transformers loads of ``config`` today.

    Each key by itself goes through the renames of the model's type, and factors of experts that were modules become factors of their
    rows in the parameter that stacks them. An adapter whose names differ from the model's by the bare model's prefix alone is left:
    it is of another class of the same model. Raises :class:`OptionError` for two weights that become one.
    """
    keys, whole = list(adapter.weights), adapter.whole
    plain = {key: _parameter(key, weight) for key, weight in adapter.weights.items()}
    names = [*plain.values(), *whole.replacing, *(f"{module}.weight" for module in whole.beneath)]
    found, prefix = locations(names, dict(config), where)
    changed = _only_prefix(names, found)
    if changed == "" or (changed == f"{prefix}." and not _parts(config)):
        return adapter
    moved: dict[str, dict[int, tuple[Location, AdaptedWeight]]] = defaultdict(dict)
    for key in keys:
        place, weight = found[plain[key]], adapter.weights[key]
        new = _key(key, weight, place)
        if place.part in moved[new]:
            raise OptionError(f"{where}: two modules of the adapter are {new} in this model, the second is {key}")
        moved[new][place.part] = place, weight
    fused = any(place.expert is not None for parts in moved.values() for place, _ in parts.values())
    weights = {key: _assembled(key, parts, _experts(config), fused=fused) for key, parts in moved.items()}
    replacing = {found[name].name: tensor for name, tensor in whole.replacing.items()}
    beneath = {found[f"{module}.weight"].name.removesuffix(".weight"): tensor for module, tensor in whole.beneath.items()}
    if len(replacing) < len(whole.replacing):
        raise OptionError(f"{where}: two whole tensors of the adapter are one in this model")
    settings = adapter.settings
    if fused:  # PEFT has no dropout on parameters
        settings = msgspec.structs.replace(settings, lora_dropout=0.0)
    return replace(adapter, weights=weights, settings=settings, whole=replace(whole, replacing=replacing, beneath=beneath))


def _parameter(key: str, weight: AdaptedWeight) -> str:
    """The parameter that a weight of an adapter is, or that stacks it."""
    return key.rpartition(".")[0] if weight.kind == "expert" else f"{key}.weight"


def _key(key: str, weight: AdaptedWeight, place: Location) -> str:
    """The adapter's key of a weight at ``place``."""
    if weight.kind == "expert":
        return f"{place.name}.{key.rpartition('.')[2]}"
    return place.name.removesuffix(".weight") if place.expert is None else f"{place.name}.{place.expert}"


def _assembled(key: str, parts: Mapping[int, tuple[Location, AdaptedWeight]], experts: int, *, fused: bool) -> AdaptedWeight:
    """The weight at ``key`` of the blocks of rows that an adapter changes; of a model with ``fused`` experts as PEFT adapts it there."""
    place, first = next(iter(parts.values()))
    if place.expert is None:
        taken = fused and first.kind == "linear" and key.rpartition(".")[2] in TAKEN
        return replace(first, kind="parameter") if taken else first
    count = max(experts, place.expert + 1)
    if place.parts == 1:
        return replace(first, kind="expert", experts=count, source=None)
    rows = {part: weight.out_features for part, (_, weight) in parts.items()}
    out = [rows.get(part, first.out_features) for part in range(place.parts)]
    names = dict.fromkeys(name for _, weight in parts.values() for name in weight.components)
    components: dict[str, Component] = {}
    for name in names:
        own = [
            (part, weight.components[name].factors) for part, (_, weight) in sorted(parts.items()) if name in weight.components
        ]
        A = torch.cat([A for _, (A, _) in own])
        B = A.new_zeros(sum(out), len(A))
        column = 0
        for part, (_, block) in own:
            first_row = sum(out[:part])
            B[first_row : first_row + out[part], column : column + block.shape[1]] = block
            column += block.shape[1]
        components[name] = Free(A, B)
    return AdaptedWeight(sum(out), first.in_features, components, "expert", None, count)


def _parts(config: Mapping[str, Any]) -> bool:
    """Whether a model is made of several, each with a configuration."""
    return any(isinstance(value, dict) and value.get("model_type") for value in config.values())


def _experts(config: Mapping[str, Any]) -> int:
    """How many experts a layer has; 0 where the configuration does not say."""
    said = [part.get(key) for part in (config, text_part(dict(config))) for key in _COUNTS]
    return next((value for value in said if isinstance(value, int) and not isinstance(value, bool)), 0)


def _only_prefix(names: Iterable[str], found: Mapping[str, Location]) -> str | None:
    """The one prefix that all names lost or got, empty where all are as they were; None where anything else changed."""
    changes = set()
    for name in names:
        new = found[name].name
        if found[name].expert is not None or not (new.endswith(name) or name.endswith(new)):
            return None
        changes.add((len(new) > len(name), new.removesuffix(name) if len(new) > len(name) else name.removesuffix(new)))
    return changes.pop()[1] if len(changes) == 1 else None
