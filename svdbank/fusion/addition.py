"""``W' = W + ΔW``, a panel at a time, with a count of what the rounding of the sum left of ΔW."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from svdbank.adapter.components import squared_norm_of
from svdbank.adapter.model import Adapter
from svdbank.core.errors import NotFiniteError, OptionError
from svdbank.core.specs import WeightSpec

#: Entries summed at a time: what is in between stays in the processor's cache.
_PANEL = 1 << 17


@dataclass(frozen=True)
class Tally:
    """Of some entries of a weight: how many, how many with other bits now, and ``‖(W' − W) − ΔW‖²``."""

    elements: int
    changed: int
    lost: float = 0.0

    @classmethod
    def of(cls, tallies: Sequence[Tally]) -> Tally:
        """The sum, the same in whatever order the parts come."""
        return cls(
            sum(tally.elements for tally in tallies),
            sum(tally.changed for tally in tallies),
            math.fsum(tally.lost for tally in tallies),
        )


class Addition:
    """``W + ΔW`` in any number of threads; the ``edit`` of :func:`svdbank.checkpoint.writing.tensors.write_checkpoint`.

    ``factors`` are A (r, in) and B (out, r) by the weight's name, ``full`` tensors that replace a stored one.
    """

    def __init__(self, factors: Mapping[str, tuple[Tensor, Tensor]], full: Mapping[str, Tensor], dtype: str | None) -> None:
        self._factors = factors
        self._full = full
        self._dtype = None if dtype is None else getattr(torch, dtype)
        self._tallies: dict[str, list[Tally]] = {name: [] for name in (*factors, *full)}
        self._dtypes: dict[str, str] = {}

    def __call__(self, spec: WeightSpec, values: Tensor, rows: slice, columns: slice) -> Tensor:
        """``values``, entries (rows, columns) of the matrix, with those of ΔW added, in the dtype that is to be stored."""
        to = self._dtype or values.dtype
        self._dtypes[spec.name] = str(to).removeprefix("torch.")
        if spec.name in self._full:
            full = self._full[spec.name]
            new = full.reshape(full.shape[0], -1)[rows].to(to).reshape(values.shape)
            self._tallies[spec.name].append(Tally(values.numel(), _changed(values, new)))
            return new
        A, B = self._factors[spec.name]
        # Panels of rows as they lie in memory: a transposed weight is (in, out) there.
        turned = spec.operation == "transpose"
        stored, left, right = (values.mT, A[:, columns].mT, B[rows].mT) if turned else (values, B[rows], A[:, columns])
        out = torch.empty(stored.shape, dtype=to)
        wide = torch.float64 if stored.dtype == torch.float64 else torch.float32
        left, right = left.to(wide).contiguous(), right.to(wide).contiguous()
        step = max(1, _PANEL // max(1, stored.shape[1]))
        add = _rounded if to.itemsize < wide.itemsize else _exact
        for begin in range(0, len(stored), step):
            panel = slice(begin, begin + step)
            lost = add(stored[panel], left[panel], right, out[panel])
            self._tallies[spec.name].append(Tally(out[panel].numel(), _changed(stored[panel], out[panel]), lost))
        return out.mT if turned else out

    def tally(self, name: str) -> Tally:
        """Of one weight, once it is written."""
        return Tally.of(self._tallies[name])

    def intended(self, name: str) -> float:
        """``‖ΔW‖²`` of one weight, from the Gram matrices of its factors in float64."""
        return squared_norm_of(*self._factors[name])

    def dtypes(self, specs: Sequence[WeightSpec]) -> tuple[str, ...]:
        """What those weights are stored in now, each name once."""
        return tuple(dict.fromkeys(self._dtypes[spec.name] for spec in specs if spec.name in self._dtypes))

    def refuse_nothing(self, adapter: Adapter, specs: Sequence[WeightSpec]) -> None:
        """Raise where not one bit of ``specs`` changed, or what changed is no number."""
        tallies = {spec.name: self.tally(spec.name) for spec in specs}
        for name, tally in tallies.items():
            if not math.isfinite(tally.lost):
                raise NotFiniteError(
                    f"{name} with the adapter added holds NaN or infinity",
                    hint="--dtype float32 has the range that float16 lacks",
                )
        if not any(tally.changed for tally in tallies.values()):
            elements = sum(tally.elements for tally in tallies.values())
            raise OptionError(
                f"not one of {elements:,} elements changed: {' and '.join(self.dtypes(specs))} swallows the whole adapter, whose "
                f"norm is {adapter.norm():.3g}",
                hint="--dtype float32 keeps it",
            )


def _rounded(stored: Tensor, left: Tensor, right: Tensor, out: Tensor) -> float:
    """The sum into ``out`` of fewer bits than it is taken in; ``‖W' − (W + ΔW)‖²``, beside which the wide sum's own rounding is nothing."""
    total = stored.to(left.dtype, copy=True).addmm_(left, right)
    out.copy_(total)
    return _squared(total.sub_(out))


def _exact(stored: Tensor, left: Tensor, right: Tensor, out: Tensor) -> float:
    """The sum into ``out`` of the dtype that it is taken in; ``‖(W' − W) − ΔW‖²``."""
    old = stored.to(left.dtype)
    delta = left @ right
    total = torch.add(old, delta)
    out.copy_(total)
    return _squared(total.sub_(old).sub_(delta))


def _squared(values: Tensor) -> float:
    flat = values.reshape(-1)  # what was dequantised may lie in memory turned
    return float(torch.dot(flat, flat))


def _changed(before: Tensor, after: Tensor) -> int:
    """How many entries have other bits; across dtypes, other values."""
    if before.dtype == after.dtype:
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[before.element_size()]
        return int(np.count_nonzero(before.view(bits).numpy() != after.view(bits).numpy()))
    wide = torch.promote_types(before.dtype, after.dtype)
    return int(np.count_nonzero(before.to(wide).numpy() != after.to(wide).numpy()))
