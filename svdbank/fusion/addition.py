"""``W' = W + ΔW``, a panel at a time, with a count of what the rounding of the sum left of ΔW."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from svdbank.adapter.components import squared_norm_of
from svdbank.adapter.model import Adapter
from svdbank.core.errors import NotFiniteError, OptionError
from svdbank.core.specs import WeightSpec

#: Entries summed at a time: little enough that what is in between stays in the processor's cache, enough that threads seldom wait for
#: the interpreter's lock, which each step of the sum takes once. (Half as many are faster in one thread, and slower in two.)
_PANEL = 1 << 19


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

    ``factors`` are A (r, in) and B (out, r) by the weight's name, ``full`` tensors that replace a stored one; ``beneath`` are weights
    (out, in) that stand in place of the stored W.
    """

    def __init__(
        self,
        factors: Mapping[str, tuple[Tensor, Tensor]],
        full: Mapping[str, Tensor],
        beneath: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        self._factors = factors
        self._beneath = beneath
        self._full = full
        self._tallies: dict[str, list[Tally]] = {name: [] for name in (*factors, *full)}
        self._dtypes: dict[str, str] = {}
        self._scratch = _Scratch()

    def __call__(self, spec: WeightSpec, values: Tensor, out: Tensor, rows: slice, columns: slice) -> None:
        """``values``, entries (rows, columns) of the matrix, with those of ΔW added, into ``out``."""
        self._dtypes[spec.name] = str(out.dtype).removeprefix("torch.")
        tallies = self._tallies[spec.name]
        if spec.name in self._full:
            full = self._full[spec.name]
            out.copy_(full.reshape(full.shape[0], -1)[rows].reshape(values.shape))
            tallies.append(Tally(values.numel(), _changed(values, out, self._scratch)))
            return
        if spec.name in self._beneath:
            values = self._beneath[spec.name][rows, columns].to(values.dtype)
        A, B = self._factors[spec.name]
        A, B = (A if A.shape[1] == values.shape[1] else A[:, columns]), (B if len(B) == len(values) else B[rows])
        # Panels of rows as they lie in memory: a transposed weight is (in, out) there.
        stored, left, right = values, B, A
        if spec.operation == "transpose":
            stored, out, left, right = values.mT, out.mT, A.mT, B.mT
        wide = torch.float64 if stored.dtype == torch.float64 else torch.float32
        left, right = (
            each if each.dtype == wide and each.is_contiguous() else each.to(wide).contiguous() for each in (left, right)
        )
        add = _rounded if out.dtype.itemsize < wide.itemsize else _exact
        step = max(1, _PANEL // max(1, stored.shape[1]))
        panels = (
            [(stored, left, out)]
            if len(stored) <= step
            else zip(*(torch.split(t, step) for t in (stored, left, out)), strict=True)
        )
        for old, factor, new in panels:
            lost = add(old, factor, right, new, self._scratch)
            tallies.append(Tally(old.numel(), _changed(old, new, self._scratch), lost))

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


class _Scratch(threading.local):
    """Memory for what is in between, for each thread its own: of the same panel sizes over and over."""

    def __init__(self) -> None:
        self._memory: dict[tuple[torch.dtype, int], Tensor] = {}
        self._floats: dict[tuple[torch.Size, torch.dtype, int], Tensor] = {}
        self._flags = np.empty(0, bool)

    def like(self, shape: torch.Size, dtype: torch.dtype, which: int) -> Tensor:
        """An uninitialised tensor, of those of the same shape and dtype the one numbered ``which``."""
        if (shape, dtype, which) not in self._floats:
            whole = self._memory.get((dtype, which))
            if whole is None or len(whole) < shape.numel():
                whole = self._memory[dtype, which] = torch.empty(shape.numel(), dtype=dtype)
                self._floats = {key: each for key, each in self._floats.items() if key[1:] != (dtype, which)}
            self._floats[shape, dtype, which] = whole[: shape.numel()].view(shape)
        return self._floats[shape, dtype, which]

    def flags(self, shape: torch.Size) -> np.ndarray[Any, np.dtype[np.bool_]]:
        if self._flags.size < shape.numel():
            self._flags = np.empty(shape.numel(), bool)
        return self._flags[: shape.numel()].reshape(shape)


def _rounded(stored: Tensor, left: Tensor, right: Tensor, out: Tensor, scratch: _Scratch) -> float:
    """The sum into ``out`` of fewer bits than it is taken in; ``‖W' − (W + ΔW)‖²``, beside which the wide sum's own rounding is nothing."""
    total, rounded = (scratch.like(stored.shape, left.dtype, which) for which in range(2))
    total.copy_(stored).addmm_(left, right)
    rounded.copy_(out.copy_(total))
    return _squared(rounded.sub_(total))


def _exact(stored: Tensor, left: Tensor, right: Tensor, out: Tensor, scratch: _Scratch) -> float:
    """The sum into ``out`` of the dtype that it is taken in; ``‖(W' − W) − ΔW‖²``."""
    delta, total = (scratch.like(stored.shape, left.dtype, which) for which in range(2))
    old = stored.to(left.dtype)
    torch.mm(left, right, out=delta)
    torch.add(old, delta, out=total)
    out.copy_(total)
    return _squared(total.sub_(old).sub_(delta))


def _squared(values: Tensor) -> float:
    flat = values.view(-1)
    return float(torch.dot(flat, flat))


def _changed(before: Tensor, after: Tensor, scratch: _Scratch) -> int:
    """How many entries have other bits; across dtypes, other values."""
    if before.dtype == after.dtype:
        as_bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[before.element_size()]
        before, after = before.view(as_bits), after.view(as_bits)
    else:
        wide = torch.promote_types(before.dtype, after.dtype)
        before, after = before.to(wide), after.to(wide)
    return int(np.count_nonzero(np.not_equal(before.numpy(), after.numpy(), out=scratch.flags(before.shape))))
