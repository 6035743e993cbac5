"""Rayleigh–Ritz with the weight itself, and the correction of what squaring κ costs the long vectors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from svdbank.solver.contract import Block
from svdbank.solver.orthogonal import orthonormal, thin_qr
from svdbank.solver.weight import Weight


def rayleigh_ritz(weight: Weight, subspace: Tensor) -> Block:
    """Best triplets of M in the span of ``subspace`` (k, s), orthonormal columns; ascending.

    ``T = Mᵀ X``, thin QR ``T = Q F``, SVD of the s × s factor: ``T = V Σ Cᵀ``, ``U = X C``. It restores what
    squaring lost in σ and orders the vectors. V comes from T, never from ``Mᵀ U / σ``, which loses orthogonality for tiny σ.
    """
    orthonormal, factor = thin_qr(weight.transposed_times(subspace).mT)  # (s, n), (s, s)
    inner, sigma, outer = torch.linalg.svd(factor)
    return Block(subspace @ outer.mH, (inner.mT @ orthonormal).mT, sigma).flipped()


def refined(weight: Weight, block: Block, defect: Tensor, apply_inverse: Callable[[Tensor], Tensor]) -> Block:
    """``block`` corrected for ``defect = M V − U Σ`` (k, s).

    Rounding in ``u`` of size ε along the largest singular vectors becomes ``ε κ`` in ``v = Mᵀ u / σ``. The defect shows it exactly;
    with ``y = (G − σ²)⁻¹ (I − U Uᵀ) r`` a Newton step for the pair is ``u − σ y``, ``v − Mᵀ y`` (Dongarra, Moler & Wilkinson
    1983, *Improving the accuracy of computed eigenvalues and eigenvectors*). G stands for G − σ² here, which is right where it
    matters: for singular values far above σ.
    """
    step = apply_inverse(defect - block.short @ (block.short.mT @ defect))
    step -= block.short @ (block.short.mT @ step)
    return Block(
        orthonormal(block.short - step * block.sigma),
        orthonormal(block.long - weight.transposed_times(step)),
        block.sigma,
    )
