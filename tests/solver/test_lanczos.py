"""What the iteration owes to the rounding of its blocks, its restarts and its cut, on spectra made to show it."""

from __future__ import annotations

import pytest
import torch
from hard_matrices import assert_certified, with_spectrum
from torch import Tensor

from svdbank.core.basis import EPSILON
from svdbank.solver import minor_basis
from svdbank.solver.lanczos import largest, orthogonalise
from svdbank.solver.sizes import Shape


def below(k: int, count: int, level: float, width: float) -> Tensor:
    """σ from 2 to 1 and, far below them, ``count`` that lie ``width`` of ``level`` apart: (k,)."""
    low = level * (1 + width * torch.arange(count, dtype=torch.float64))
    return torch.cat([torch.linspace(2, 1, k - count, dtype=torch.float64), low])


@pytest.mark.parametrize("ratio", [1.0, 1e3, 1e6, 1e10])
@pytest.mark.parametrize("large", [1, 10, 15])
def test_a_block_of_very_different_images_is_orthogonal_to_the_basis(ratio: float, large: int) -> None:
    """16 images of which ``large`` directions are ``ratio`` times longer than the rest: QR divides by the smallest pivot."""
    generator = torch.Generator().manual_seed(large)
    frame = torch.linalg.qr(torch.randn(200, 64, dtype=torch.float64, generator=generator)).Q.mT
    basis, apart = frame[:48], frame[48:]
    lengths = torch.ones(16, dtype=torch.float64)
    lengths[:large] = ratio
    turn = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64, generator=generator)).Q
    image = (turn * lengths) @ apart + torch.randn(16, 48, dtype=torch.float64, generator=generator) @ basis
    coefficients, following, upper = orthogonalise(image.clone(), basis, generator)
    # ε times a small multiple of √200, the length of the sums.
    assert (following @ basis.mT).abs().max() <= 100 * EPSILON
    assert (following @ following.mT - torch.eye(16)).abs().max() <= 100 * EPSILON
    assert torch.linalg.matrix_norm(coefficients @ basis + upper.mT @ following - image) <= 100 * EPSILON * ratio * 16


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("width", [1e-9, 1e-6])
@pytest.mark.parametrize("level", [0.3, 1e-2])
@pytest.mark.parametrize("count", [10, 40])
@pytest.mark.parametrize("shape", [(200, 200), (200, 700), (320, 400)])
def test_a_cluster_is_served_by_the_fast_path(
    shape: tuple[int, int], count: int, level: float, width: float, seed: int
) -> None:
    """Members that the data cannot tell apart, inside the rank, across it, and wider than its buffer; κ up to 200."""
    weight = with_spectrum(below(min(shape), count, level, width), *shape, seed).to(torch.float32)
    for rank in (1, 16, 24):
        basis = minor_basis(weight, rank, solver="shift-invert")
        assert basis.certificate.path == "shift-invert", basis.certificate.tried
        # 3e-14 would be the rounding of G at κ = 200 (ε κ / 2): the cut leaves the cluster whole, and M does not square κ.
        # Where the rank ends between σ that are apart, the iteration stops at 1e-12.
        assert basis.certificate.residual <= 1e-12
        assert_certified(weight, basis, rank)


@pytest.mark.parametrize("level", [1e-2, 1e-3])
@pytest.mark.parametrize("shape", [(200, 200), (700, 200), (400, 1000)])
def test_triplets_beyond_a_few_tiny_ones_lose_nothing_to_them(shape: tuple[int, int], level: float) -> None:
    """θ of the tiny ones is 1e4 and 1e6 times that of the others, and eigh knows the others to ε times it: restarts must not keep that."""
    weight = with_spectrum(below(min(shape), 10, level, 1e-9), *shape).to(torch.float32)
    basis = minor_basis(weight, 16, solver="shift-invert")
    assert basis.certificate.path == "shift-invert", basis.certificate.tried
    assert basis.certificate.residual <= 1e-12  # where the iteration stops; without the care 1e-10
    assert_certified(weight, basis, 16)


def test_an_iteration_that_falls_no_further_ends_where_rounding_holds_it() -> None:
    """An ``excess`` that asks for the impossible: the pairs come back as good as float64 gives them, not a failure."""
    generator = torch.Generator().manual_seed(0)
    theta = torch.linspace(11, 0.2, 200, dtype=torch.float64)
    frame = torch.linalg.qr(torch.randn(200, 200, dtype=torch.float64, generator=generator)).Q
    start = torch.randn(16, 200, dtype=torch.float64, generator=generator)
    found = largest(
        lambda columns: frame @ (theta[:, None] * (frame.mT @ columns)),
        start,
        24,
        Shape(16, 128, 72),
        lambda values, residuals, following, noise: float(residuals[:24].max() / 1e-20),
        generator,
    )
    assert not hasattr(found, "reason"), found
    vectors = found.vectors.mT
    image = frame @ (theta[:, None] * (frame.mT @ vectors))
    # 1e4 ε is the level at which such a halt is believed (lanczos.HALTED).
    assert torch.linalg.vector_norm(image - vectors * found.values[:24], dim=0).max() <= 2e4 * EPSILON * 11
