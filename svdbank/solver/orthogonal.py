"""Orthonormal columns and thin QR factors by Cholesky, for blocks that are well conditioned once their columns are scaled."""

from __future__ import annotations

import torch
from torch import Tensor

from svdbank.solver.inverse import inverse_lower

#: Least ratio of pivots at which Cholesky QR serves: squared, it is far above ε.
LEAST_PIVOT = 1e-5
#: Largest cosine between two columns at which one pass is as orthonormal as two.
NEARLY_ORTHOGONAL = 1e-2


def thin_qr(rows: Tensor) -> tuple[Tensor, Tensor]:
    """``Qᵀ`` (b, k) with orthonormal rows and the (b, b) factor ``R`` with ``rowsᵀ = Q R``, for ``rows`` (b, k), b ≤ k.

    Cholesky QR, twice (Yamamoto, Nakatsukasa, Yanagisawa & Fukaya, *Roundoff error analysis of the CholeskyQR2 algorithm*, ETNA 44,
    2015), after scaling: as orthonormal as Householder's at a fraction of its time on blocks this thin. Images of eigenvectors are
    orthogonal but for rounding: then once is enough. Householder's where pivots differ too much or a row is zero.
    """
    lengths = torch.linalg.vector_norm(rows, dim=1)
    scaled = rows / lengths[:, None]
    cosines = scaled @ scaled.mT
    first, info = torch.linalg.cholesky_ex(cosines)
    pivots = first.diagonal()
    if info.item() != 0 or not bool(pivots.min() > LEAST_PIVOT):
        columns, upper = torch.linalg.qr(rows.mT)
        return columns.mT, upper
    once = torch.linalg.solve_triangular(first, scaled, upper=False)
    if float(cosines.sub_(torch.eye(len(rows), dtype=rows.dtype, device=rows.device)).abs().max()) <= NEARLY_ORTHOGONAL:
        return once, first.mT * lengths
    second = torch.linalg.cholesky(once @ once.mT)
    return torch.linalg.solve_triangular(second, once, upper=False), (first @ second).mT * lengths


def orthonormal(columns: Tensor, *, passes: int = 2, lifted: bool = True) -> Tensor:
    """Orthonormal columns with the span of ``columns`` (…, k, b), in their order; no host is waited for.

    Cholesky QR, shifted so that no factor fails (Fukaya, Kannan, Nakatsukasa, Yamamoto & Yanagisawa, *Shifted Cholesky QR*, SIAM J. Sci.
    Comput. 42, 2020), after scaling the columns: two passes for a condition up to 1e7. One pass leaves of a condition κ some ε κ², which
    does between filters, where only the span counts. Without ``lifted`` columns that one pass has made nearly orthogonal become so, of
    length one to the last bit. Signs are kept.
    """
    count = columns.shape[-1]
    found = columns / torch.linalg.vector_norm(columns, dim=-2, keepdim=True).clamp_min(torch.finfo(columns.dtype).tiny)
    lift = 8 * count * torch.finfo(columns.dtype).eps
    for number in range(passes):
        cosines = found.mT @ found
        if lifted and number == 0:  # later ones meet columns that are orthogonal already: a shift would only scale them
            cosines.diagonal(dim1=-2, dim2=-1).add_(lift)
        found = _divided(found, torch.linalg.cholesky_ex(cosines).L)
    result: Tensor = found
    return result


def _divided(columns: Tensor, factor: Tensor) -> Tensor:
    """``X L⁻ᵀ`` for X (…, k, b) and a lower triangular L (…, b, b)."""
    if columns.ndim > 2:  # the library's substitution takes the matrices of a batch apart
        divided: Tensor = columns @ inverse_lower(factor).mT
        return divided
    result: Tensor = torch.linalg.solve_triangular(factor.mT, columns, upper=True, left=False)
    return result


def orthonormal_factors(columns: Tensor) -> tuple[Tensor, Tensor]:
    """``(Q, R)`` with ``columns = Q R`` for columns (…, k, b) that are nearly orthogonal once scaled; R's diagonal is positive."""
    lengths = torch.linalg.vector_norm(columns, dim=-2, keepdim=True).clamp_min(torch.finfo(columns.dtype).tiny)
    found = columns / lengths
    upper: Tensor | None = None
    for _ in range(2):
        factor = torch.linalg.cholesky_ex(found.mT @ found).L
        found = _divided(found, factor)
        upper = factor.mT if upper is None else factor.mT @ upper
    assert upper is not None
    return found, upper * lengths
