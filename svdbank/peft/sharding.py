"""Attaching to a model that FSDP2 has already sharded: each rank keeps its own slice of A and B, and nothing is gathered.

``fully_shard`` manages the parameters that exist when it is called. Layers that PEFT adds later would be plain tensors, whole on every
rank, with gradients that nobody reduces. So they are sharded as FSDP2's deferred initialisation does it: on the meta device, over the
base weight's mesh, one group for all adapter layers of a block; then each rank writes its slice of the values.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from svdbank.core.errors import OptionError
from svdbank.peft.layers import Slot


@dataclass(frozen=True)
class Group:
    """Adapter modules that are gathered together: those below one FSDP2 module. ``layers`` are indices of the adapter's layers."""

    owner: Any
    mesh: Any
    layers: tuple[int, ...]


def is_sharded(weight: Tensor) -> bool:
    """Whether a weight is a DTensor with values. Asking costs no import where torch.distributed is not in use."""
    if "torch.distributed.tensor" not in sys.modules:
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(weight, DTensor) and weight.device.type != "meta"


def plan(root: nn.Module, layers: Sequence[Slot]) -> list[Group]:
    """Groups for the layers whose base weight is sharded, none for a model that is not.

    Raises :class:`OptionError` for a model that has run already, for layers whose adapters are used without their own forward
    (embeddings, fused experts), since FSDP2 has no place to gather those, and for tensor parallelism.
    """
    _refuse_tensor_parallel(layers)
    sharded = [i for i, layer in enumerate(layers) if _is_distributed(layer)]
    if not sharded:
        return []
    from torch.distributed.fsdp import FSDPModule

    owners = _owners(root)
    members: dict[int, list[int]] = {}
    by_id: dict[int, Any] = {}
    for i in sharded:
        owner = owners[id(layers[i].layer)]
        if not isinstance(owner, FSDPModule) or layers[i].kind != "linear":
            raise OptionError(
                f"{layers[i].targets[0].label} is sharded already, and its adapter cannot be sharded after it",
                hint="attach before the model is sharded",
            )
        if owner._get_fsdp_state()._is_root is not None:
            raise OptionError(
                "this sharded model has run already, so it takes no new parameters", hint="attach before the first step"
            )
        members.setdefault(id(owner), []).append(i)
        by_id[id(owner)] = owner
    return [Group(by_id[key], _mesh(layers[indices[0]]), tuple(indices)) for key, indices in members.items()]


def _refuse_tensor_parallel(layers: Sequence[Slot]) -> None:
    for layer in layers:
        split = getattr(layer.layer.get_base_layer(), "_hf_tp_plan", None)
        if not split and _is_distributed(layer):
            weight: Any = layer.targets[0].weight
            split = sum(placement.is_shard() for placement in weight.placements) > 1
        if split:
            raise OptionError(
                f"{layer.targets[0].label} is split by tensor parallelism, and a bank's factors are not",
                hint="shard the model with FSDP2 or ZeRO-3",
            )


def apply(groups: Sequence[Group], layers: Sequence[Slot], values: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Shard the groups' adapter modules and write this rank's slices of ``values`` (A and B of every layer, whole)."""
    if not groups:
        return
    from torch.distributed.fsdp import fully_shard

    for group in groups:
        modules = []
        for i in group.layers:
            layer, adapter = layers[i].layer, layers[i].adapter
            for module in (layer.lora_A[adapter], layer.lora_B[adapter]):
                factor = module.weight
                module.weight = nn.Parameter(torch.empty_like(factor, device="meta"), requires_grad=factor.requires_grad)
                modules.append(module)
        policy = group.owner._get_fsdp_state()._mp_policy
        fully_shard(modules, mesh=group.mesh, mp_policy=policy)
        for module in modules:
            module.to_empty(device=group.mesh.device_type)
        for i in group.layers:
            for factor, value in zip(layers[i].factors, values[i], strict=True):
                _write(factor, value)


def _write(factor: Any, value: Tensor) -> None:
    local, rows, columns = local_part(factor.detach(), transposed=False)
    local.copy_(value[rows, columns])


def local_part(stored: Any, *, transposed: bool) -> tuple[Tensor, slice, slice]:
    """This rank's part of a matrix as it lies in memory, and which rows and columns of the logical (out, in) matrix that is."""
    whole = slice(None)
    if not is_sharded(stored):
        return stored, whole, whole
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(stored.shape, stored.device_mesh, stored.placements)
    first, second = (slice(begin, begin + size) for begin, size in zip(offset, shape, strict=True))
    return stored.to_local(), *((second, first) if transposed else (first, second))


def _is_distributed(layer: Slot) -> bool:
    if "torch.distributed.tensor" not in sys.modules:
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(
        getattr(layer.layer.get_base_layer(), "weight", None) if layer.kind != "experts" else layer.layer.get_param(), DTensor
    )


def _mesh(slot: Slot) -> Any:
    weight: Any = slot.targets[0].weight
    return weight.device_mesh


def _owners(root: nn.Module) -> dict[int, Any]:
    """The innermost FSDP2 module around every module, by id."""
    from torch.distributed.fsdp import FSDPModule

    found: dict[int, Any] = {}
    ahead: list[tuple[nn.Module, Any]] = [(root, None)]
    while ahead:
        module, above = ahead.pop()
        owner = module if isinstance(module, FSDPModule) else above
        found[id(module)] = owner
        ahead += [(child, owner) for child in module.children()]
    return found
