"""Parameters in an adapter folder: fused experts and routers, to which PEFT attaches by a parameter's name and not a module's.

PEFT keeps the factors of all experts of a parameter in one pair of matrices: ``A`` is (E·r, in), expert-major; ``B`` is (out, r·E),
expert-minor. Each parameter of a module that ``target_parameters`` names has a wrapper; several wrap each other in the order in which
the module registers its parameters, and the keys of a folder show that as ``.base_layer``: the last parameter has none, the first one
most. Ranks and alphas follow patterns of the parameter's name.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from svdbank.adapter.components import Kind
from svdbank.adapter.settings import LoraSettings
from svdbank.adapter.targeting import untargeted
from svdbank.core.errors import CheckpointError, OptionError
from svdbank.core.expressions import Expression
from svdbank.core.specs import WeightKind

#: What transformers' expert modules register last: their output projection.
_LAST = ("down_proj", "w2", "output_linear", "wo", "fc2")

_NESTED = ".base_layer"

#: Ends of module paths that PEFT takes for the experts and routers of older Transformers, where the model's are fused: it turns any
#: target of these names into parameters of experts, also a shared expert's or a dense layer's. Named as parameters they stay themselves.
TAKEN = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})


def kind_in_peft(module: str, kind: WeightKind, *, stacked: bool, fused: bool) -> Kind:
    """How PEFT adapts a weight of a base. ``fused``: the model has fused experts, so that :data:`TAKEN` names are to be avoided."""
    if stacked:
        return "expert"
    if kind == "embedding":
        return "embedding"
    return "parameter" if kind in ("router", "grouped") or (fused and module.rpartition(".")[2] in TAKEN) else "linear"


def target_fields(kinds: Mapping[str, Kind]) -> dict[str, Any]:
    """``target_modules`` and ``target_parameters`` of a config, from the kind of each weight by its key."""
    parameters = {key.rpartition(".")[0] for key, kind in kinds.items() if kind == "expert"}
    parameters |= {f"{key}.weight" for key, kind in kinds.items() if kind == "parameter"}
    modules = [key for key, kind in kinds.items() if kind not in ("expert", "parameter")]
    return {"target_modules": modules, "target_parameters": sorted(parameters) or None}


def targets_of(settings: LoraSettings, kinds: Mapping[str, Kind]) -> dict[str, Any]:
    """Fields of a config that select exactly these weights: as ``settings`` has them where those are ends of names, else by path.

    Ends of names hold in the model of every version of Transformers; of whole paths of an older one PEFT finds some and not others.
    """
    plain = isinstance(settings.target_modules, list) and not settings.target_parameters
    if plain and set(kinds.values()) <= {"linear", "embedding"} and not any(True for _ in untargeted(settings, kinds)):
        return {}
    return {**target_fields(kinds), "exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}


def pattern_name(key: str, kind: Kind) -> str:
    """What PEFT's rank and alpha patterns are matched with: the module of a weight, or its parameter."""
    return key.rpartition(".")[0] if kind == "expert" else f"{key}.weight" if kind == "parameter" else key


def bare(module: str) -> str:
    """A module path without the ``base_layer`` by which PEFT nests wrappers of several parameters of one module."""
    return ".".join(part for part in module.split(".") if part != "base_layer")


def in_registration_order(parameters: Iterable[str]) -> list[str]:
    """Parameter names of one module in the order in which transformers registers them: the projection down comes last."""
    return sorted(parameters, key=lambda name: (name in _LAST, name))


def parameters_of(settings: LoraSettings, modules: Iterable[str]) -> dict[str, str]:
    """Of the module paths in a folder those that stand for parameters, with the parameter's path.

    ``modules`` are all of the folder: they tell how deep the wrappers of a module go. Raises :class:`CheckpointError` where the folder
    has another number of wrappers than the config has parameters.
    """
    if not settings.target_parameters:
        return {}
    wrappers: defaultdict[str, list[str]] = defaultdict(list)
    for module in modules:
        wrappers[bare(module)].append(module)
    found: dict[str, str] = {}
    for owner, own in wrappers.items():
        names = _adapted(owner, len(own), settings)
        found.update(
            (module, f"{owner}.{name}") for module, name in zip(sorted(own, key=len, reverse=True), names, strict=bool(names))
        )
    return found


def _adapted(owner: str, count: int, settings: LoraSettings) -> list[str]:
    """The ``count`` parameters of a module that PEFT wraps, the innermost first; none of an ordinary target module."""
    by_path, by_name = set(), set()
    for target in settings.target_parameters or ():
        path, _, name = target.rpartition(".")
        if not path:
            by_name.add(name)
        elif owner == path or owner.endswith(f".{path}"):
            by_path.add(name)
    if not by_path and (not by_name or _is_target(owner, settings.target_modules)):
        return []
    # A name alone is any module's parameter of that name, if it has one: the number of wrappers tells.
    for names in (by_path, by_name, by_path | by_name):
        if len(names) == count:
            return in_registration_order(names)
    said = ", ".join(in_registration_order(by_path or by_name))
    raise CheckpointError(f"{owner}: the config targets {said}, the folder holds factors for {count} of them")


def _is_target(module: str, targets: list[str] | str | None) -> bool:
    """PEFT's rule for ``target_modules``."""
    if isinstance(targets, str):
        try:
            return _expression(targets).fullmatch(module)
        except OptionError as cause:
            raise CheckpointError(f"target_modules: {cause}") from cause
    return any(module == target or module.endswith(f".{target}") for target in targets or ())


@lru_cache(maxsize=16)
def _expression(targets: str) -> Expression:
    return Expression(targets)


def split(A: Tensor, B: Tensor, rank: int, where: str) -> list[tuple[Tensor, Tensor]]:
    """``A`` (r, in) and ``B`` (out, r) of each expert. Raises :class:`CheckpointError` where the rank does not divide the rows."""
    experts, rest = divmod(A.shape[0], rank)
    if rest or B.shape[1] != A.shape[0]:
        raise CheckpointError(
            f"{where}: A {tuple(A.shape)} and B {tuple(B.shape)} hold no whole number of experts of rank {rank}"
        )
    by_expert = B.reshape(B.shape[0], rank, experts)
    return [(A[e * rank : (e + 1) * rank], by_expert[:, :, e]) for e in range(experts)]


def join(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """``A`` (E·r, in) and ``B`` (out, r·E) from those of each expert, padded with zeros to the largest rank among them."""
    rank = max(A.shape[0] for A, _ in pairs)
    padded_A = [torch.nn.functional.pad(A, (0, 0, 0, rank - A.shape[0])) for A, _ in pairs]
    padded_B = [torch.nn.functional.pad(B, (0, rank - B.shape[1])) for _, B in pairs]
    return torch.cat(padded_A), torch.stack(padded_B, dim=-1).flatten(1)


def wrapper_paths(parameters: Sequence[str]) -> dict[str, str]:
    """Parameter path → the module path under which PEFT saves its factors, for all parameters of an adapter."""
    by_owner: dict[str, list[str]] = {}
    for parameter in parameters:
        owner, _, leaf = parameter.rpartition(".")
        by_owner.setdefault(owner, []).append(leaf)
    paths = {}
    for owner, leaves in by_owner.items():
        ordered = in_registration_order(leaves)
        for depth, leaf in enumerate(reversed(ordered)):
            paths[f"{owner}.{leaf}"] = owner + _NESTED * depth
    return paths
