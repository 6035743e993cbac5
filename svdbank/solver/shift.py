"""Where to shift the Gram matrix before it is inverted: just below its smallest eigenvalue.

A shift spreads the inverse's crowded upper end apart and saves about a quarter of the iteration. Finding it in float64 would cost what
it saves; a float32 factor and a few of its solves are enough to place it, because nothing but the speed depends on it: one that
lies too high is refused by the factorisation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from svdbank.solver.cholesky import factor
from svdbank.solver.lanczos import orthogonalise

#: Columns of a block and blocks of the short iteration that looks for the edge (measured: its error is below a tenth of the margin).
BLOCK, STEPS = 8, 6
#: Distance kept from the edge, in units of the spread of the lowest 16 Ritz values.
MARGIN = 0.35
#: Least ratio n : k at which the small end keeps away from zero, so that there is something to gain (none was seen on square weights).
OBLONG = 1.2


def place_shift(gram: Tensor, length: int, fallback: float, generator: torch.Generator) -> float:
    """A shift below λ_min of ``gram`` (k, k), most likely, for a weight of long side ``length``; ``fallback`` where none pays."""
    k = gram.shape[0]
    if length < OBLONG * k:
        return fallback
    rough = factor(gram, torch.float32, shift=fallback)
    if rough is None:
        return fallback
    start = torch.randn(BLOCK, k, dtype=torch.float64, generator=generator).to(gram.device)
    basis = torch.linalg.qr(start.mT).Q.mT
    for _ in range(STEPS - 1):
        image = rough.solve_once(basis[-BLOCK:].mT).mT.contiguous()
        basis = torch.cat([basis, orthogonalise(image, basis, generator)[1]])
    ritz: list[float] = torch.linalg.eigvalsh(basis @ (gram @ basis.mT)).tolist()
    edge, spread = ritz[0], ritz[2 * BLOCK - 1] - ritz[0]
    return max(edge - MARGIN * spread, fallback)
