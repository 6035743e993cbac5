"""Experts in an adapter folder: PEFT keeps the factors of all experts of a parameter in one pair of matrices.

``A`` is (E·r, in), expert-major; ``B`` is (out, r·E), expert-minor. Each parameter of a module that ``target_parameters`` names has a
wrapper; several wrap each other in the order in which the module registers its parameters, and the keys of a folder show that as
``.base_layer``: the last parameter has none, the first one most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from svdbank.adapter.folder import AdapterFolder, bare
from svdbank.core.errors import CheckpointError

#: What transformers' expert modules register last: their output projection.
_LAST = ("down_proj", "w2", "output_linear", "wo", "fc2")

_NESTED = ".base_layer"


def in_registration_order(parameters: Sequence[str]) -> list[str]:
    """Parameter names of one module in the order in which transformers registers them: the projection down comes last."""
    return sorted(parameters, key=lambda name: (name in _LAST, name))


def parameter_of(module: str, modules: Sequence[str], target_parameters: Sequence[str]) -> str | None:
    """Path of the parameter that a module path in a folder stands for; None for an ordinary module.

    ``modules`` are all module paths of the folder: they tell how deep the wrappers of a module go. Raises :class:`CheckpointError` where
    the folder has another number of wrappers than the config has parameters.
    """
    owner = bare(module)
    named = [p.rpartition(".") for p in target_parameters]
    own = in_registration_order(
        sorted({leaf for path, _, leaf in named if path and (owner == path or owner.endswith(f".{path}"))})
    )
    if not own:
        return None
    wrappers = sorted((other for other in modules if bare(other) == owner), key=len, reverse=True)
    if len(wrappers) != len(own):
        raise CheckpointError(
            f"{owner}: the config targets {', '.join(own)}, the folder holds factors for {len(wrappers)} of them"
        )
    return f"{owner}.{own[wrappers.index(module)]}"


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


def parameters_of(folder: AdapterFolder) -> Mapping[str, str]:
    """Module path in the folder → parameter path, for the modules that stand for parameters."""
    targets = folder.settings.target_parameters or ()
    modules = tuple(folder.factors)
    found = {module: parameter_of(module, modules, targets) for module in modules} if targets else {}
    return {module: parameter for module, parameter in found.items() if parameter is not None}
