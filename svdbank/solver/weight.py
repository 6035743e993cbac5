"""A weight seen from its short side, and its products in float64 by panels, so that a large one is never widened whole."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from svdbank.core.basis import EPSILON
from svdbank.solver.contract import Block
from svdbank.solver.matrices import lower_tiles, mirror, padded_rows
from svdbank.solver.pieces import exact_gram
from svdbank.solver.sizes import PANEL_ENTRIES, panel_width


@dataclass(frozen=True)
class Precision:
    """Working dtype of the steps that may leave float64; Rayleigh–Ritz and the gates never do.

    ``gram``: products ``M Mᵀ``; ``pieces``: made of exact float32 products instead. ``factor``: the Cholesky factor of shift-invert or the
    inverse of the filter; below float64 what they give is refined with float64 products.
    """

    gram: torch.dtype = torch.float64
    factor: torch.dtype = torch.float64
    pieces: bool = False


#: By kind of device (:func:`svdbank.solver.devices.kind_of`). Data-centre GPUs run float64 at half the float32 rate or better, as CPUs do.
#: Where there is little float64, G and Rayleigh–Ritz, the gates and one product a correction need it; the filters' products do not.
DEFAULT_PRECISION = {
    "cpu": Precision(),
    "cuda": Precision(),
    "cuda-low-float64": Precision(factor=torch.float32, pieces=True),
}


@dataclass(frozen=True)
class Weight:
    """``matrix`` of shape (k, n), k ≤ n, in its stored dtype: the weight, or its transpose as a view where it is tall."""

    matrix: Tensor
    precision: Precision = Precision()
    panel_entries: int = PANEL_ENTRIES

    @property
    def k(self) -> int:
        """Length of the short side."""
        return int(self.matrix.shape[0])

    @property
    def n(self) -> int:
        """Length of the long side."""
        return int(self.matrix.shape[1])

    @property
    def device(self) -> torch.device:
        return self.matrix.device

    def panels(self, dtype: torch.dtype = torch.float64) -> Iterator[tuple[slice, Tensor]]:
        """Yield ``(columns, M[:, columns] widened)`` in order. A panel is valid until the next one is asked for."""
        width = panel_width(self.k, self.n, self.panel_entries)
        if width == self.n and dtype == torch.float64:
            yield slice(0, self.n), self._widened
            return
        # One buffer for all panels: fresh pages cost as much as the conversion.
        buffer = self._buffer(width, dtype)
        for start in range(0, self.n, width):
            columns = slice(start, min(start + width, self.n))
            panel = buffer[:, : columns.stop - start]
            panel.copy_(self.matrix[:, columns])
            yield columns, panel

    @cached_property
    def _widened(self) -> Tensor:
        """M in float64, kept, where it is a single panel: a solve reads it four to seven times."""
        return self._buffer(self.n, torch.float64).copy_(self.matrix)

    def _buffer(self, width: int, dtype: torch.dtype) -> Tensor:
        """(k, width), laid out as the matrix is: turning a tall weight while widening it costs more than its products gain."""
        turned = self.matrix.stride(0) < self.matrix.stride(1)
        return padded_rows(width, self.k, self.device, dtype).mT if turned else padded_rows(self.k, width, self.device, dtype)

    def gram(self) -> Tensor:
        """``M Mᵀ`` (k, k) in float64, symmetric to the last bit: the lower triangle by tiles, then mirrored.

        Of bfloat16 or float32 data it is nearly exact; what it costs is that κ is squared.
        """
        if self.precision.pieces:
            return exact_gram(self.matrix)
        dtype = self.precision.gram
        result = torch.zeros(self.k, self.k, dtype=dtype, device=self.device)
        tiles = lower_tiles(self.k, self.device.type)
        for _, panel in self.panels(dtype):
            for row, column in tiles:
                result[row, column].addmm_(panel[row], panel[column].mT)
        result = result.to(torch.float64)
        mirror(result)
        return result

    def times(self, long: Tensor) -> Tensor:
        """``M Y`` for Y (n, s): (k, s) in float64."""
        result = torch.zeros(self.k, long.shape[1], dtype=torch.float64, device=self.device)
        for columns, panel in self.panels():
            result.addmm_(panel, long[columns])
        return result

    def transposed_times(self, short: Tensor) -> Tensor:
        """``Mᵀ X`` for X (k, s): (n, s) in float64."""
        result = padded_rows(short.shape[1], self.n, self.device)
        for columns, panel in self.panels():
            torch.mm(short.mT, panel, out=result[:, columns])
        return result.mT

    def both_products(self, block: Block) -> tuple[Tensor, Tensor]:
        """``M V`` (k, s) and ``Mᵀ U`` (n, s) of a block of triplets, in one pass over the weight."""
        count = block.sigma.shape[0]
        short = torch.zeros(self.k, count, dtype=torch.float64, device=self.device)
        long = padded_rows(count, self.n, self.device)
        for columns, panel in self.panels():
            short.addmm_(panel, block.long[columns])
            torch.mm(block.short.mT, panel, out=long[:, columns])
        return short, long.mT

    @property
    def rounding(self) -> float:
        """What float64 leaves unknown of the eigenvalues of M Mᵀ, in units of σ_max²."""
        return rounding(self.n)


def rounding(n: int) -> float:
    """2 ε √n: rounding errors of sums of n products add up like a random walk (Higham & Mary 2019), not like their worst case."""
    return 2 * EPSILON * math.sqrt(n)
