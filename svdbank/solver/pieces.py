"""``M Mᵀ`` in float64 by exact float32 products, for devices that have little float64.

Ozaki, Ogita, Oishi & Rump, *Error-free transformations of matrix multiplication by using fast routines* (Numerical Algorithms 59, 2012):
each row is cut into pieces of a few bits on a common grid. Sums of products of two pieces are whole numbers below 2²⁴ times a power
of two, so float32 holds them without rounding, in whatever order they are added; only the pieces' sums are added in float64.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from svdbank.solver.matrices import lower_tiles, mirror

#: Bits of a piece, sign apart, and columns of a panel: products of two pieces have twice the bits, sums of so many 13 more, 23 in all.
BITS, COLUMNS = 5, 8192
#: Most pieces of a row: 54 bits below its largest entry. Pairs of pieces whose product lies below the float64 rounding of G are left out.
MOST_PIECES, MOST_PAIR = 9, 10


def exact_gram(matrix: Tensor) -> Tensor:
    """``M Mᵀ`` (k, k) in float64, symmetric to the last bit, of (k, n) in any floating dtype; as accurate as float64 products."""
    k, n = matrix.shape
    result = torch.zeros(k, k, dtype=torch.float64, device=matrix.device)
    tiles = lower_tiles(k, matrix.device.type)
    for start in range(0, n, COLUMNS):
        scale, cut = _pieces(matrix[:, start : start + COLUMNS].to(torch.float64))
        for first, one in enumerate(cut):
            for second, other in enumerate(cut[first:], start=first):
                if first + second + 2 > MOST_PAIR:
                    break
                unit = 2.0 ** -(2 * BITS + (BITS + 1) * (first + second))
                for rows, columns in tiles:
                    product = (one[rows] @ other[columns].mT).to(torch.float64)
                    if second > first:
                        product += (other[rows] @ one[columns].mT).to(torch.float64)
                    result[rows, columns].addcmul_(product * scale[rows, None], scale[None, columns], value=unit)
    mirror(result)
    return result


def _pieces(panel: Tensor) -> tuple[Tensor, list[Tensor]]:
    """A power of two a row (k,), and float32 matrices of whole numbers of at most ``BITS`` bits.

    The panel is ``scale · Σ piece_i · 2^-(BITS + i (BITS + 1))``.
    """
    largest = panel.abs().amax(1)
    scale = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent)  # |entries| < scale
    rest = panel / scale[:, None]
    found: list[Tensor] = []
    for grid in _grids():
        if len(found) and not bool(rest.any()):
            break
        whole = (rest * grid).round_()
        found.append(whole.to(torch.float32))
        rest = rest.sub_(whole.div_(grid))
    return scale, found


def _grids() -> Iterator[float]:
    for index in range(MOST_PIECES):
        yield 2.0 ** (BITS + index * (BITS + 1))
