"""Matrices that are hard to decompose, and the float64 reference that the solver is held against."""

from __future__ import annotations

import torch
from torch import Tensor

from svdbank.core.basis import EPSILON, UNRESOLVED, Basis
from svdbank.solver import choose_path
from svdbank.solver.devices import kind_of


def with_spectrum(sigma: Tensor, out_features: int, in_features: int, seed: int = 0) -> Tensor:
    """A float64 matrix (out, in) with these singular values and random singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    k = sigma.shape[0]
    left = torch.linalg.qr(torch.randn(out_features, k, dtype=torch.float64, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(in_features, k, dtype=torch.float64, generator=generator)).Q
    return (left * sigma.to(torch.float64)) @ right.mT


def llm_like(out_features: int, in_features: int, seed: int = 0, strong: int = 4, height: float = 30.0) -> Tensor:
    """Random bulk and a few huge directions, as trained weights have (float32)."""
    generator = torch.Generator().manual_seed(seed)
    bulk = torch.randn(out_features, in_features, generator=generator) * 0.02
    k = min(out_features, in_features)
    strong = min(strong, k)
    edge = 0.02 * (out_features**0.5 + in_features**0.5)
    sigma = edge * torch.logspace(0, 1, strong).flip(0) * height / 10
    return bulk + with_spectrum(sigma, out_features, in_features, seed + 1).to(torch.float32)


def spectra(k: int) -> dict[str, Tensor]:
    """Singular values by name, (k,) each."""
    tail = max(1, k // 4)
    return {
        "geometric 1e4": torch.logspace(0, -4, k, dtype=torch.float64),
        "geometric 1e7": torch.logspace(0, -7, k, dtype=torch.float64),
        "geometric 1e10": torch.logspace(0, -10, k, dtype=torch.float64),
        "geometric 1e14": torch.logspace(0, -14, k, dtype=torch.float64),
        "clustered": torch.cat([torch.linspace(2, 1, k - tail), 1e-2 * (1 + 1e-9 * torch.arange(tail, dtype=torch.float64))]),
        "repeated": torch.cat([torch.full((k - tail,), 2.0), torch.ones(tail)]).to(torch.float64),
        "equal": torch.ones(k, dtype=torch.float64),
        "deficient": torch.cat([torch.linspace(2, 1, k - tail), torch.zeros(tail)]).to(torch.float64),
        "rank one": torch.cat([torch.ones(1), torch.zeros(k - 1)]).to(torch.float64),
    }


SPECTRA = tuple(spectra(8))
NAMES = ("llm", "marchenko-pastur", *SPECTRA, "zero rows", "zero columns", "zero")


def hard_matrix(name: str, out_features: int, in_features: int) -> Tensor:
    """One case of the sweep, float64 (out, in)."""
    if name == "llm":
        return llm_like(out_features, in_features).to(torch.float64)
    random = torch.randn(out_features, in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    if name == "marchenko-pastur":
        return random
    if name == "zero rows":
        random[:: max(2, out_features // 3)] = 0
        return random
    if name == "zero columns":
        random[:, : in_features // 3] = 0
        return random
    if name == "zero":
        return torch.zeros(out_features, in_features, dtype=torch.float64)
    return with_spectrum(spectra(min(out_features, in_features))[name], out_features, in_features)


def path_of(shape: tuple[int, int], rank: int, device: str) -> str:
    """What the solver's rule says for a weight of ``shape`` on ``device``."""
    return choose_path(*shape, rank, kind_of(torch.device(device)))


def sine(one: Tensor, other: Tensor) -> float:
    """Sine of the largest principal angle between the spans of two orthonormal column sets (m, r)."""
    return float(torch.linalg.matrix_norm(one - other @ (other.mT @ one), ord=2))


def reference(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``torch.linalg.svd`` in float64, the most minor first: left (out, k), sigma (k,), right (in, k)."""
    left, sigma, right = torch.linalg.svd(weight.to(torch.float64), full_matrices=False)
    return left.flip(1), sigma.flip(0), right.mT.flip(1)


def resolved(sigma: Tensor) -> list[int]:
    """Ranks r < k at which the data define the subspace to 1e-6: the gap above σ_r is wide enough."""
    gaps = sigma.diff()
    allowed = 100 * EPSILON * sigma[-1] / UNRESOLVED
    return [r + 1 for r in range(gaps.shape[0]) if gaps[r] > allowed]


def assert_certified(weight: Tensor, basis: Basis, rank: int) -> None:
    """Every promise of a basis, measured here, in float64 on the CPU, and not read from its certificate."""
    assert {basis.minor.left.device, basis.minor.sigma.device} == {weight.device}
    dense = weight.cpu().to(torch.float64)
    left, sigma, right = reference(dense)
    scale = sigma[-1].item()
    assert basis.minor.right is not None
    u, v, s = basis.minor.left.cpu().mT, basis.minor.right.cpu().mT, basis.minor.sigma.cpu()
    assert u.shape == (weight.shape[0], rank)
    assert v.shape == (weight.shape[1], rank)
    identity = torch.eye(rank, dtype=torch.float64)
    # 1e-11 and 1e-10 are the gates' own limits; typical figures are 1e-15 and 1e-14.
    assert (u.mT @ u - identity).abs().max() <= 1e-11
    assert (v.mT @ v - identity).abs().max() <= 1e-11
    assert torch.linalg.vector_norm(dense @ v - u * s, dim=0).max() <= 1e-10 * scale
    assert torch.linalg.vector_norm(dense.mT @ u - v * s, dim=0).max() <= 1e-10 * scale
    # A float64 SVD is good to a modest multiple of ε σ_max in every σ; so is a certified residual, up to its own size.
    assert (s - sigma[:rank]).abs().max() <= max(1e-13, 2 * basis.certificate.residual) * scale
    assert bool((s.diff() >= -1e-13 * scale).all())
    # The longer side has a null space of its own: vectors of σ ≈ 0 mix with it freely, whoever computes them.
    mixed = bool(sigma[0] <= 100 * EPSILON * scale / UNRESOLVED)
    out_features, in_features = weight.shape
    for r in resolved(sigma):
        if r <= rank:
            assert (mixed and out_features > in_features) or sine(u[:, :r], left[:, :r]) <= 1e-6, f"left subspace of rank {r}"
            assert (mixed and in_features > out_features) or sine(v[:, :r], right[:, :r]) <= 1e-6, f"right subspace of rank {r}"
