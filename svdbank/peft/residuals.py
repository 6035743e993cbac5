"""What MiLoRA and PiSSA leave of the base: ``W' = W − s B₀ A₀``, in place, rounded once to the base's dtype."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from svdbank.adapter.methods import InitialisationMethod, residual
from svdbank.core.errors import OptionError
from svdbank.core.probe import is_readable
from svdbank.peft import sharding
from svdbank.peft.layers import Slot
from svdbank.peft.targets import Target

#: Rows of a weight that its rounding is measured on.
_ROWS = 64


def check(root: nn.Module, layers: Sequence[Slot], method: InitialisationMethod) -> None:
    """Refuse (:class:`OptionError`) weights whose values are not here to be changed, and those that another module uses too."""
    targets = [target for layer in layers for target in layer.targets]
    absent = [target.label for target in targets if not (is_readable(target) or sharding.is_sharded(target.weight))]
    if absent:
        raise OptionError(
            f"{method} takes the adapter's part out of the base's weights, and those of {len(absent)} modules are quantised, offloaded "
            f"or not loaded, first {absent[0]}",
            hint="load the base whole and unquantised, or use mica, which leaves the base alone",
        )
    owners = Counter(id(parameter) for _, parameter in root.named_parameters(remove_duplicate=False))
    tied = [target.label for target in targets if owners[id(target.weight)] > 1]
    if tied:
        raise OptionError(
            f"{method} changes the weight of {tied[0]}, which another module shares (tied embedding and head)",
            hint="leave it out with target_modules or exclude_modules",
        )


def subtract(targets: Sequence[Target], factors: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Take ``s B A`` out of every weight; returns ``‖fl(W') − W'‖ / ‖W‖``, what storing it in the base's dtype lost, at its largest.

    The figure of a weight is that of up to 64 evenly spaced rows, in float64. Of a sharded weight each rank takes its part out of its
    own slice.
    """
    lost: dict[torch.device, list[Tensor]] = defaultdict(list)
    for target, (A, B) in zip(targets, factors, strict=True):
        figure = _subtract(target, A, B)
        lost[figure.device].append(figure)
    # One number a device comes back, at the end: one a weight would have the host wait for the device each time.
    return max((torch.stack(figures).max().item() for figures in lost.values()), default=0.0)


def _subtract(target: Target, A: Tensor, B: Tensor) -> Tensor:
    stored = target.weight.detach()
    local, rows, columns = sharding.local_part(stored, transposed=target.transposed)
    weight = local.mT if target.transposed else local  # (out, in)
    A, B = A[:, columns].to(weight.device), B[rows].to(weight.device)
    sampled = slice(None, None, max(1, weight.shape[0] // _ROWS))
    before = weight[sampled].double()
    weight.copy_(residual(weight, A, B, target.scale))
    exact = torch.addmm(before, B[sampled].double(), A.double(), alpha=-target.scale)
    size, error = torch.linalg.vector_norm(before), torch.linalg.vector_norm(weight[sampled].double() - exact)
    return torch.where(size > 0, error / size, 0.0)
