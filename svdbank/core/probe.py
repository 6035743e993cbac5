"""Which entries of a weight are sampled to recognise it again, and whether a loaded weight is the one that a bank was built from.

A bank stores these values for each weight; attaching it to a loaded model compares them, so that a whole model costs milliseconds. They
are entries of the (out, in) matrix, so sharding and file layout do not matter. A model is often loaded in another dtype than its
checkpoint, so values are compared after the cast that the model went through.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import gcd
from typing import Protocol

import torch
from torch import Tensor

#: Entries sampled from each weight.
PROBE_SIZE = 256

_GOLDEN = 0.6180339887498949


class Sampled(Protocol):
    """A weight that may be read: ``weight`` is (out, in), or (in, out) where ``transposed``; the two features are the logical shape."""

    @property
    def weight(self) -> Tensor: ...
    @property
    def transposed(self) -> bool: ...
    @property
    def out_features(self) -> int: ...
    @property
    def in_features(self) -> int: ...


def probe_indices(out_features: int, in_features: int) -> list[int]:
    """Flat row-major indices into an (out, in) matrix, ``min(256, out·in)`` of them, distinct and spread evenly.

    A golden-ratio step coprime to the size walks over rows and columns alike, so no layer shape makes all samples share a column.
    """
    size = out_features * in_features
    if size <= PROBE_SIZE:
        return list(range(size))
    step = max(1, int(size * _GOLDEN))
    while gcd(step, size) != 1:
        step += 1
    return [(i * step) % size for i in range(PROBE_SIZE)]


def taken(matrix: Tensor) -> tuple[float, ...]:
    """The probe of a matrix (out, in): its entries at :func:`probe_indices`, exact in float64."""
    out_features, in_features = matrix.shape
    rows, columns = _positions(out_features, in_features, str(matrix.device))
    values: list[float] = matrix[rows, columns].to(torch.float64).tolist()
    return tuple(values)


def is_readable(target: Sampled) -> bool:
    """Whether the weight holds its values here and now: not on meta, not quantised, not a shard of a larger tensor."""
    weight = target.weight.data
    shape = (target.out_features, target.in_features)
    return (
        type(weight) in (torch.Tensor, torch.nn.Parameter)
        and weight.device.type != "meta"
        and weight.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
        and tuple(weight.shape) == (shape[::-1] if target.transposed else shape)
    )


def sample(targets: Sequence[Sampled]) -> list[Tensor]:
    """Values of each weight at :func:`probe_indices`, in its own dtype, on the CPU; one transfer a device and dtype."""
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    picked = []
    for i, target in enumerate(targets):
        weight = target.weight.detach()
        rows, columns = _positions(target.out_features, target.in_features, str(weight.device))
        picked.append(weight[columns, rows] if target.transposed else weight[rows, columns])
        groups.setdefault((weight.device, weight.dtype), []).append(i)
    values: list[Tensor] = list(picked)
    for group in groups.values():
        moved = torch.split(torch.cat([picked[i] for i in group]).cpu(), [len(picked[i]) for i in group])
        for i, part in zip(group, moved, strict=True):
            values[i] = part
    return values


@lru_cache(maxsize=256)
def _positions(out_features: int, in_features: int, device: str) -> tuple[Tensor, Tensor]:
    flat = torch.tensor(probe_indices(out_features, in_features), device=device)
    return flat // in_features, flat % in_features


def differing(loaded: Sequence[Tensor], stored: Sequence[Tensor]) -> list[int]:
    """Indices where the loaded values are not the stored ones (float64, as in the checkpoint) under any cast a loader makes.

    A loader goes from the checkpoint's dtype to the model's, perhaps by way of bfloat16 or float16. Rounding to nearest is
    deterministic, so after the same casts the values are equal to the bit; no tolerance is needed.
    """
    return [i for i, (ours, theirs) in enumerate(zip(loaded, stored, strict=True)) if not _same(ours, theirs)]


def _same(loaded: Tensor, stored: Tensor) -> bool:
    if loaded.shape != stored.shape:
        return False
    if torch.equal(stored.to(loaded.dtype), loaded):
        return True
    return any(torch.equal(stored.to(between).to(loaded.dtype), loaded) for between in (torch.bfloat16, torch.float16))


#: Share of B's energy that may lie outside the bank's directions: the square of bfloat16's unit roundoff, to which PEFT rounds factors.
#: A sibling's minor subspace (an instruct model's) misses by 1e-2 and more, another machine's bank of the same base by 1e-12.
OUTSIDE = 2.0**-18


def lies_in(B: Tensor, left: Tensor) -> bool:
    """Whether B (out, r) holds orthonormal directions of a band of r columns of ``left`` (out, R ≥ r), the same ones or a rotation.

    Columns that are ``left``'s last r under some cast are recognised without arithmetic.
    """
    rank = B.shape[1]
    if B.shape[0] != left.shape[0] or rank > left.shape[1]:
        return False
    if rank == left.shape[1] and _same(B, left.double()):
        return True
    wide, frame = B.double(), left.double()
    coordinates = frame.mT @ wide  # (R, r)
    energy = coordinates.square().sum(dim=1)
    total = wide.square().sum()
    # The band of r neighbouring directions that holds most; an adapter of a later domain lies in one that does not begin at 0.
    inside = energy.unfold(0, rank, 1).sum(dim=1).max()
    return bool(inside >= (1 - OUTSIDE) * total) and bool(total > 0)
