"""``W' = W + ΔW``, panel by panel, with a count of what the rounding of the sum left of ΔW."""

from __future__ import annotations

import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from svdbank.adapter.model import Adapter
from svdbank.errors import NotFiniteError, OptionError
from svdbank.specs import WeightSpec

#: Entries summed at a time: what is in between stays in the processor's cache.
_PANEL = 1 << 18


class Addition:
    """``W + ΔW`` panel by panel, with a tally of what rounding did; the ``edit`` of :func:`write_checkpoint`."""

    def __init__(
        self,
        factors: Mapping[str, tuple[Tensor, Tensor]],
        full: Mapping[str, Tensor],
        dtype: str | None,
        pool: ThreadPoolExecutor,
    ) -> None:
        self._factors = factors
        self._full = full
        self._dtype = None if dtype is None else getattr(torch, dtype)
        self._pool = pool
        self.tallies: dict[str, Tally] = {}
        self.dtypes: dict[str, None] = {}

    def __call__(self, spec: WeightSpec, values: Tensor, rows: slice) -> Tensor:
        """The piece (rows, in) of the matrix with ΔW added; it may be ``values`` itself, changed in place."""
        to = self._dtype or values.dtype
        self.dtypes[str(to).removeprefix("torch.")] = None
        tally = self.tallies.setdefault(spec.name, Tally())
        if spec.name in self._full:
            new = self._full[spec.name].to(to).reshape(values.shape)
            tally.take(Tally(values.numel(), _changed(values, new)))
            return new
        A, B = self._factors[spec.name]
        # Panels of rows as they lie in memory: a transposed weight is (in, out) there.
        turned = spec.operation == "transpose"
        stored, left, right = (values.mT, A.mT, B[rows].mT) if turned else (values, B[rows], A)
        out = stored if to == stored.dtype else torch.empty(stored.shape, dtype=to)
        step = max(1, _PANEL // max(1, stored.shape[1]))
        wide = torch.float64 if stored.dtype == torch.float64 else torch.float32
        left, right = left.to(wide).contiguous(), right.to(wide).contiguous()

        def add(begin: int) -> Tally:
            panel = slice(begin, begin + step)
            old = stored[panel].to(wide)
            delta = left[panel] @ right
            new = (old + delta).to(to)
            own = Tally.of(stored[panel], new, old, delta)
            out[panel] = new
            return own

        for own in self._pool.map(add, range(0, len(stored), step)):
            tally.take(own)
        return out.mT if turned else out

    def refuse_nothing(self, adapter: Adapter) -> None:
        """Raise where not one bit changed, or what changed is no number."""
        for name, tally in self.tallies.items():
            if not math.isfinite(tally.lost):
                raise NotFiniteError(
                    f"{name} with the adapter added holds NaN or infinity",
                    hint="--dtype float32 has the range that float16 lacks",
                )
        if not any(tally.changed for tally in self.tallies.values()):
            elements = sum(tally.elements for tally in self.tallies.values())
            raise OptionError(
                f"not one of {elements:,} elements changed: {' and '.join(self.dtypes)} swallows the whole adapter, whose norm is "
                f"{adapter.norm():.3g}",
                hint="--dtype float32 keeps it",
            )


@dataclass
class Tally:
    elements: int = 0
    changed: int = 0
    intended: float = 0.0
    lost: float = 0.0

    def take(self, other: Tally) -> None:
        self.elements += other.elements
        self.changed += other.changed
        self.intended += other.intended
        self.lost += other.lost

    @classmethod
    def of(cls, before: Tensor, after: Tensor, old: Tensor, delta: Tensor) -> Tally:
        """Of one panel. ``old`` is ``before`` in the dtype of the sum."""
        intended = float(torch.linalg.vector_norm(delta)) ** 2
        realised = after.to(old.dtype, copy=True).sub_(old)
        lost = float(torch.linalg.vector_norm(realised.sub_(delta))) ** 2
        return cls(before.numel(), _changed(before, after), intended, lost)


def _changed(before: Tensor, after: Tensor) -> int:
    """How many entries have other bits; across dtypes, other values."""
    if before.dtype == after.dtype:
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[before.element_size()]
        before, after = before.view(bits), after.view(bits)
    return before.numel() - int(torch.count_nonzero(before == after))
