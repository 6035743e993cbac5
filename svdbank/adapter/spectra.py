"""Singular values of ``ΔW`` and its best approximations, from SVDs of small matrices alone; float64."""

from __future__ import annotations

import torch
from torch import Tensor

from svdbank.adapter.components import Component, Free, InBank


def singular_values(component: Component) -> Tensor:
    """Singular values of ``ΔW``, float64, descending; as many as it has rows of ``A``, or fewer."""
    _, sigma, _ = _small_svd(component)
    return sigma


def truncated(component: Component, rank: int) -> Component:
    """The best approximation of ``ΔW`` of rank ``rank`` (Eckart–Young), from an SVD of a small matrix.

    In the bank the directions stay: ``C`` becomes its own best approximation. Free factors are orthonormalised by QR first.
    """
    if rank >= component.max_rank:
        return component
    left, sigma, right = _small_svd(component)
    left, sigma, right = left[:, :rank], sigma[:rank], right[:rank]
    if isinstance(component, InBank) and component.orthonormal:
        return InBank(component.bands, ((left * sigma) @ right).float(), component.left, True, rank)
    root = sigma.sqrt()
    return Free((root[:, None] * right).float(), (left * root).float())


def _small_svd(component: Component) -> tuple[Tensor, Tensor, Tensor]:
    """(left, sigma, right) with ``ΔW = left · diag(sigma) · right`` up to directions, float64.

    For a component on orthonormal directions, ``left`` is in their coordinates (n, m); else (out, m).
    """
    A, B = (factor.double() for factor in component.factors)
    if isinstance(component, InBank) and component.orthonormal:
        return _thin_svd(A)
    Q, R = torch.linalg.qr(B)
    left, sigma, right = _thin_svd(R @ A)
    return Q @ left, sigma, right


def _thin_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Reduced SVD of a wide, flat matrix by way of the QR of its transpose: (n, in) becomes (n, n)."""
    if matrix.shape[1] <= matrix.shape[0]:
        left, sigma, right = torch.linalg.svd(matrix, full_matrices=False)
        return left, sigma, right
    Q, R = torch.linalg.qr(matrix.mT)
    left, sigma, right = torch.linalg.svd(R.mT, full_matrices=False)
    return left, sigma, right @ Q.mT


def compact(component: Component) -> tuple[Tensor, Tensor]:
    """Factors ``A`` (k, in) and ``B`` (out, k) for a file, with k the known bound on the rank.

    The directions themselves where the rank needs them all (the last column the most minor, PEFT's order); else ``B = left Q``,
    ``A = Qᵀ C`` with Q from the SVD of ``C``.
    """
    A, B = component.factors
    if not isinstance(component, InBank):
        return A, B
    if component.max_rank == A.shape[0]:
        return A.flip(0), B.flip(1)
    left, sigma, right = _thin_svd(A.double())
    k = component.max_rank
    return (sigma[:k, None] * right[:k]).float(), (B.double() @ left[:, :k]).float()
