"""What each method puts into a fresh adapter, and what it leaves in the base: tensors in, tensors out.

Throughout ``ΔW = s · B A`` with ``A`` (rank, in), ``B`` (out, rank) and PEFT's scale s (α/r, or α/√r with rsLoRA). Vectors come in PEFT's
column order, as :class:`svdbank.bank.reading.Bank` returns them.

=========  =============================  ====================  ====================  ==========================
method     triplets                       B                     A                     base
=========  =============================  ====================  ====================  ==========================
``mica``   the r smallest                 ``U``, frozen         0, trained            W
``milora`` the r smallest                 ``U √(Σ/s)``          ``√(Σ/s) Vᵀ``         ``W − s B A = W − U Σ Vᵀ``
``pissa``  the r largest                  ``U √(Σ/s)``          ``√(Σ/s) Vᵀ``         ``W − s B A = W − U Σ Vᵀ``
=========  =============================  ====================  ====================  ==========================

MiCA: arXiv 2604.01694. MiLoRA: Wang et al., NAACL 2025, arXiv 2406.09044. PiSSA: Meng et al., NeurIPS 2024, arXiv 2404.02948.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, get_args

from svdbank.core.errors import OptionError

if TYPE_CHECKING:  # names of methods are needed where torch is not
    from torch import Tensor

InitialisationMethod = Literal["mica", "milora", "pissa"]
METHODS: tuple[InitialisationMethod, ...] = get_args(InitialisationMethod)

#: Methods that move part of the base into the adapter, so that the adapter belongs to ``W − s B₀ A₀``.
RESIDUAL_METHODS: tuple[InitialisationMethod, ...] = ("milora", "pissa")

#: Smallest σ that MiLoRA and PiSSA work with, as a share of σ_max. Where σ = 0, B and A would both be zero, which is a saddle: no
#: gradient ever reaches them. 1e-6 is below the smallest singular values of trained weights, so their formulas are the papers', and
#: above the rounding of a float32 weight (6e-8), so Adam, which rescales gradients, moves a floored direction like any other. What
#: the floor adds to the adapter is taken out of the base: W' + s B A is W all the same.
SIGMA_FLOOR = 1e-6


#: Largest float32, in which adapters are stored and act.
LARGEST_FLOAT32 = (2 - 2.0**-23) * 2.0**127


def lora_scale(rank: int, alpha: float, *, rslora: bool = False) -> float:
    """PEFT's scale: α/r, or α/√r with rsLoRA (arXiv 2312.03732). Raises :class:`OptionError` where that is no number of float32."""
    scale = alpha / (math.sqrt(rank) if rslora else rank)
    if not abs(scale) <= LARGEST_FLOAT32:
        raise OptionError(f"alpha {alpha:g} at rank {rank} is a scale of {scale:g}, which float32 does not hold")
    return scale


def initial_factors(
    method: InitialisationMethod, left: Tensor, sigma: Tensor | None, right: Tensor | None, scale: float, *, sigma_max: float
) -> tuple[Tensor, Tensor]:
    """The factors ``A`` (rank, in) and ``B`` (out, rank) of MiLoRA or PiSSA, float32, in that order.

    ``left`` (out, rank), ``sigma`` (rank,) and ``right`` (in, rank) are the triplets, the smallest for ``milora``, the largest for
    ``pissa``. ``scale`` is PEFT's s; the product ``s B A = U max(Σ, floor) Vᵀ`` does not depend on it. ``sigma_max`` is the weight's
    largest singular value, which sets the floor (see :data:`SIGMA_FLOOR`). For ``mica``, which needs ``right`` only for its length, use
    :func:`mica_factors`.

    Raises :class:`OptionError` for ``mica`` or a scale that is not positive and finite.
    """
    if method not in RESIDUAL_METHODS or sigma is None or right is None:
        raise OptionError(f"{method!r} takes no singular values", hint="mica_factors(left, in_features)")
    if not (math.isfinite(scale) and scale > 0):
        raise OptionError(f"the scale of an adapter is a positive number, not {scale}")
    root = (floored(sigma, sigma_max) / scale).sqrt()
    A = (root[:, None] * right.double().mT).float()
    B = (left.double() * root).float()
    return A.contiguous(), B.contiguous()


def mica_factors(left: Tensor, in_features: int) -> tuple[Tensor, Tensor]:
    """MiCA's ``A = 0`` (rank, in) and ``B = left`` (out, rank), float32, in that order."""
    import torch

    return torch.zeros(left.shape[1], in_features, dtype=torch.float32, device=left.device), left.float().contiguous()


def floored(sigma: Tensor, sigma_max: float) -> Tensor:
    """``sigma`` in float64, none below the floor. A weight that is all zeros has no σ_max: its floor is absolute."""
    return sigma.double().clamp_min(_floor(sigma_max))


def count_floored(sigma: Tensor, sigma_max: float) -> int:
    """How many of these singular values the floor raises, for reports."""
    return int((sigma.double() < _floor(sigma_max)).sum())


def _floor(sigma_max: float) -> float:
    return SIGMA_FLOOR * (sigma_max or 1.0)


def residual(weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """``W − s B A`` of shape (out, in), summed in float32 (float64 for a float64 weight) and rounded once to the weight's dtype.

    ``weight`` is (out, in): callers transpose what is stored as (in, out).
    """
    return added(weight, A, B, -scale)


def added(weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """``W + s B A`` of shape (out, in), summed in float32 (float64 for a float64 weight) and rounded once to the weight's dtype."""
    import torch

    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    total = weight.to(wide, copy=True)  # the one wide copy: weights can be gigabytes
    return total.addmm_(B.to(total), A.to(total), alpha=scale).to(weight.dtype)


def restored(A: Tensor, B: Tensor, A0: Tensor, B0: Tensor) -> tuple[Tensor, Tensor]:
    """Factors ``[A; A₀]`` (2r, in) and ``[B, −B₀]`` (out, 2r) of a trained MiLoRA or PiSSA adapter for the *unchanged* base.

    With the same scale s: ``W − s B₀A₀ + s B A = W + s [B, −B₀] [A; A₀]``. Doubling the rank keeps s when α becomes 2α, or √2·α with
    rsLoRA: see :func:`restored_alpha`.
    """
    import torch

    return torch.cat([A, A0.to(A)], dim=0), torch.cat([B, -B0.to(B)], dim=1)


def restored_alpha(alpha: float, *, rslora: bool) -> float:
    """α that keeps the scale when :func:`restored` doubles the rank."""
    return alpha * (math.sqrt(2.0) if rslora else 2.0)
