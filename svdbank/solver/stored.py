"""Whether stored triplets are the smallest of a weight: measured against the weight itself, without a decomposition.

Residuals say that each is a triplet of the weight, not which one: the largest pass too. That none smaller was missed is proven by one
Cholesky factorisation. With an orthonormal Q of R columns, ``G − τ I + c Q Qᵀ`` positive definite ⇒ at most R eigenvalues of
G = M Mᵀ lie below τ (Weyl), whatever Q is; τ is just below σ_R². So the proof trusts no vector: it fails where they are not the right ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from svdbank.solver.cholesky import factor, factorise
from svdbank.solver.gates import residual_check
from svdbank.solver.weight import Weight, rounding

#: Relative rounding of an entry in each dtype in which vectors are stored.
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}

#: Rounds of inverse iteration that clean vectors of fewer digits than float32, or that come from the long side.
_ROUNDS = 2


@dataclass(frozen=True)
class StoredTriplets:
    """One end of a spectrum as a bank stores it, the outermost first: ``left`` (R, out), ``right`` (R, in) or None, ``sigma`` (R,)."""

    left: Tensor
    right: Tensor | None
    sigma: Tensor


@dataclass(frozen=True)
class StoredCheck:
    """Figures of stored triplets.

    Attributes
    ----------
    residual
        As :func:`svdbank.solver.gates.residual_check`: over ‖W‖_F.
    orthogonality
        Largest entry of ``|UᵀU − I|`` and ``|VᵀV − I|``.
    ordered, complete
        Whether σ come in their order, and whether no other singular value lies beyond the last of them.
    """

    residual: float
    orthogonality: float
    ordered: bool
    complete: bool


def check_stored(weight: Tensor, minor: StoredTriplets, principal: StoredTriplets | None = None) -> list[StoredCheck]:
    """Figures of the minor triplets, and of the principal ones where they are stored. ``weight`` is (out, in), of any stored dtype."""
    if weight.element_size() == 1:  # torch has no arithmetic for float8
        weight = weight.to(torch.float32)
    tall = weight.shape[0] > weight.shape[1]
    view = Weight(weight.mT if tall else weight)
    gram: Tensor | None = None
    found = []
    for end, smallest in ((minor, True), (principal, False)):
        if end is None:
            continue
        sigma = end.sigma.to(torch.float64)
        steps = sigma.diff() if smallest else -sigma.diff()
        scale = float(sigma.abs().max())
        complete = end.sigma.shape[0] == view.k
        if not complete:
            gram = view.gram() if gram is None else gram
            complete = _is_end(view, gram, end, tall=tall, smallest=smallest)
        found.append(
            StoredCheck(
                residual=residual_check(weight, end.left, end.right, end.sigma),
                orthogonality=max(_departure(side) for side in (end.left, end.right) if side is not None),
                ordered=bool((sigma >= 0).all() and (steps >= -4 * rounding(view.n) * scale).all()),
                complete=complete,
            )
        )
    return found


def _departure(rows: Tensor) -> float:
    wide = rows.to(torch.float64)
    return float((wide @ wide.mT - torch.eye(wide.shape[0], dtype=torch.float64)).abs().max())


def _is_end(view: Weight, gram: Tensor, end: StoredTriplets, *, tall: bool, smallest: bool) -> bool:
    """Whether no singular value but those of ``end`` lies below σ_R, or above it, to what storage and float64 leave unknown."""
    size = float(torch.linalg.vector_norm(gram))  # at least σ_max², and at most √k times that
    if size == 0:
        return True
    rank = end.sigma.shape[0]
    edge = float(end.sigma[-1]) ** 2
    short = end.right if tall else end.left
    columns = view.transposed_times(end.left.to(torch.float64).mT) if short is None and not tall else None
    if short is not None:
        columns = short.to(torch.float64).mT
    elif tall:
        columns = view.times(end.left.to(torch.float64).mT)
    assert columns is not None
    lost = rank * ROUNDING.get(end.left.dtype, 2.0**-24) ** 2
    slack = 4 * rounding(view.n) * size + 2 * lost * size
    Q = torch.linalg.qr(columns).Q
    if smallest and (short is None or end.left.dtype != torch.float32):
        # What such columns hold of large directions would hide behind ‖G‖; inverse iteration takes it out and keeps the others.
        inverse = factor(gram, torch.float64, shift=-4 * rounding(view.n) * size)
        if inverse is None:
            return False
        for _ in range(_ROUNDS):
            Q = torch.linalg.qr(inverse.solve_once(Q)).Q
        slack = 4 * rounding(view.n) * size + 4 * lost * edge
    lift = 2 * (edge + size)
    matrix = gram.addmm(Q * lift, Q.mT) if smallest else gram.neg().addmm_(Q * lift, Q.mT)
    matrix.diagonal().add_(slack - edge if smallest else edge + slack)
    return factorise(matrix)
