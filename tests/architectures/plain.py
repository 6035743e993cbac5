"""What PEFT does with a model on its own: what ``all-linear`` selects, and which matrix each layer of an adapter belongs to."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Targets:
    """What a plain LoRA with ``target_modules="all-linear"`` adapts, asked of PEFT itself.

    ``modules`` and ``parameters`` are paths in the model; ``ranks`` has those that PEFT makes otherwise than asked, by path.
    """

    modules: tuple[str, ...]
    parameters: tuple[str, ...]
    ranks: dict[str, int]
    rank_pattern: dict[str, int]


@dataclass(frozen=True)
class Matrix:
    """One matrix (out, in) that a layer adapts, with its factors: ``ΔW = s · B · A``."""

    path: str
    weight: Tensor
    A: Tensor
    B: Tensor


def attached(model: nn.Module, rank: int = 2, **options: Any) -> Any:
    """A plain LoRA on a copy of the model."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(copy.deepcopy(model), LoraConfig(r=rank, target_modules="all-linear", **options))


def peft_targets(model: nn.Module, rank: int = 2) -> Targets:
    """What PEFT's ``all-linear`` selects on this model: modules, and parameters of experts and routers. Raises what PEFT raises."""
    return targets_of(attached(model, rank), rank)


def targets_of(adapted: Any, rank: int) -> Targets:
    from peft.tuners.lora.layer import ParamWrapper

    modules, parameters, ranks = [], [], {}
    for path, layer in _layers(adapted):
        own = plain_path(path)
        if isinstance(layer, ParamWrapper):
            own = f"{own}.{layer.parameter_name}"
            parameters.append(own)
        else:
            modules.append(own)
        if layer.r["default"] != rank:
            ranks[own] = layer.r["default"]
    return Targets(tuple(modules), tuple(parameters), ranks, dict(adapted.peft_config["default"].rank_pattern))


def matrices(adapted: Any) -> Iterator[Matrix]:
    """Every matrix that the adapter changes, as its layer sees it: experts one by one, Conv1D and transposed experts turned round."""
    from peft.tuners.lora.layer import ParamWrapper
    from transformers.pytorch_utils import Conv1D

    for path, layer in _layers(adapted):
        own, A, B = plain_path(path), layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
        if not isinstance(layer, ParamWrapper):
            base = layer.get_base_layer()
            weight = base.weight.detach()
            yield Matrix(own, weight.T if isinstance(base, Conv1D) else weight, A, B)
            continue
        own, parameter = f"{own}.{layer.parameter_name}", layer.get_param().detach()
        if parameter.ndim == 2:
            yield Matrix(own, parameter, A, B)
            continue
        experts = parameter.shape[0]
        of_A, of_B = A.reshape(experts, -1, A.shape[-1]), B.reshape(B.shape[0], -1, experts)
        for expert in range(experts):
            # (experts, in, out) where PEFT did not exchange the sides
            weight = parameter[expert] if layer._did_swap_in_out_features else parameter[expert].T
            yield Matrix(f"{own}[{expert}]", weight, of_A[expert], of_B[:, :, expert])


def plain_path(path: str) -> str:
    """The path without what PEFT adds to it."""
    return ".".join(part for part in path.removeprefix("base_model.model.").split(".") if part != "base_layer")


def _layers(adapted: Any) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    for path, layer in adapted.named_modules():
        if isinstance(layer, LoraLayer) and "default" in layer.lora_A:
            yield path, layer


def minor_distance(matrix: Matrix) -> tuple[float, float]:
    """How far B is from an orthonormal basis of the minor left singular vectors, and how far that may be.

    Sine of the largest angle between B's span and that of ``U[:, -r:]``, in float64. B is stored in float32, so 1e-5 is many times its
    rounding; the vectors themselves are known to the weight's precision over the gap to the next singular value, float64 here. Where that
    gap is too small to say which vectors are meant, the singular values of ``Bᵀ W`` against the r smallest ones decide, over the largest.
    """
    weight, B = matrix.weight.double(), matrix.B.double()
    left, sigma, _ = torch.linalg.svd(weight, full_matrices=False)
    rank, most = B.shape[1], min(weight.shape)
    unlike = float((B.T @ B - torch.eye(rank, dtype=torch.float64)).abs().max())
    if rank > most:
        return float("inf"), 0.0
    gap = float((sigma[most - rank - 1] - sigma[most - rank]) / sigma[0]) if most > rank else 1.0
    if gap < 1e-7:
        found = torch.linalg.svdvals(B.T @ weight)
        return max(unlike, float((found[:rank] - sigma[most - rank :]).abs().max() / sigma[0])), 1e-5
    minor = left[:, most - rank :]
    return max(unlike, float(torch.linalg.matrix_norm(B - minor @ (minor.T @ B), 2))), 1e-5 + 1e-14 / gap
