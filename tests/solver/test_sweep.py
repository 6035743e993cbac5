"""Shapes × spectra × stored dtypes × ranks against a float64 SVD."""

from __future__ import annotations

import pytest
import torch
from hard_matrices import NAMES, assert_certified, hard_matrix, llm_like, path_of

from svdbank.solver import PATHS, minor_basis

SHAPES = [(72, 72), (48, 120), (120, 48), (1, 40), (40, 1), (2, 4000), (4000, 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_every_hard_matrix_gets_a_certified_basis(name: str, dtype: torch.dtype, device: str) -> None:
    for shape in SHAPES:
        weight = hard_matrix(name, *shape).to(dtype).to(device)
        k = min(shape)
        for rank in sorted({1, min(2, k), min(16, k), max(1, k - 1), k}):
            assert_certified(weight, minor_basis(weight, rank), rank)


@pytest.mark.parametrize("solver", PATHS)
@pytest.mark.parametrize("name", NAMES)
def test_every_path_ends_in_a_certified_basis(name: str, solver: str, device: str) -> None:
    for shape in [(120, 120), (96, 240), (240, 96)]:
        weight = hard_matrix(name, *shape).to(torch.float32).to(device)
        for rank in (1, 5, 16):
            assert_certified(weight, minor_basis(weight, rank, solver=solver), rank)


@pytest.mark.parametrize("name", ["llm", "marchenko-pastur", "geometric 1e4", "clustered", "equal"])
def test_the_fast_path_itself_serves_what_a_gram_matrix_can(name: str, device: str) -> None:
    for shape in [(200, 200), (200, 700), (700, 200)]:
        weight = hard_matrix(name, *shape).to(torch.float32).to(device)
        for rank in (1, 16, 24):
            basis = minor_basis(weight, rank, solver="shift-invert")
            assert basis.certificate.path == "shift-invert", basis.certificate.tried
            assert basis.certificate.completeness == "cholesky"
            assert_certified(weight, basis, rank)


@pytest.mark.parametrize("shape", [(1280, 1280), (1280, 1600), (1600, 1280)])
def test_a_large_weight_takes_the_fast_path_and_reaches_the_accuracy_asked(shape: tuple[int, int], device: str) -> None:
    weight = llm_like(*shape, strong=16).to(torch.bfloat16).to(device)
    basis = minor_basis(weight, 64)
    assert basis.certificate.path == path_of(shape, 64, device)
    assert basis.certificate.tried == ()
    # The target of the project: 1e-12 where κ is that of a trained weight.
    assert basis.certificate.residual <= 1e-12
    assert_certified(weight, basis, 64)


@pytest.mark.parametrize("solver", ["dense", "shift-invert", "lq"])
def test_principal_triplets_come_with_the_same_pass(solver: str, device: str) -> None:
    weight = llm_like(150, 260, strong=6)
    basis = minor_basis(weight, 8, principal=5, solver=solver, device=device)
    assert basis.certificate.path == solver
    left, sigma, right = torch.linalg.svd(weight.double(), full_matrices=False)
    top = basis.principal
    assert top is not None and top.right is not None
    # Five strong directions: gaps of the order of σ_max, so vectors are good to a small multiple of ε.
    assert torch.allclose(top.sigma.cpu(), sigma[:5], rtol=1e-12)
    assert (top.left.cpu() * left[:, :5].mT).sum(1).abs().min() > 1 - 1e-12
    assert (top.right.cpu() * right[:5]).sum(1).abs().min() > 1 - 1e-12


def test_side_left_drops_the_right_vectors_and_changes_nothing_else(device: str) -> None:
    weight = llm_like(90, 50).to(device)
    both, left = minor_basis(weight, 7), minor_basis(weight, 7, side="left")
    assert left.minor.right is None
    assert torch.equal(left.minor.left, both.minor.left)
    assert torch.equal(left.minor.sigma, both.minor.sigma)


@pytest.mark.parametrize("scale", [1e-320, 1e-300, 1e-42, 1e150, 1e300])
def test_magnitudes_whose_squares_leave_float64_are_scaled(scale: float, device: str) -> None:
    weight = torch.randn(40, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    basis = minor_basis(weight * scale, 5, device=device)
    tiny = scale < 1e-307  # subnormal entries carry few digits themselves: compare with the SVD of what they are
    expected = torch.linalg.svdvals((weight * scale) * 2.0**1000 * 2.0**60)[-5:] if tiny else torch.linalg.svdvals(weight)[-5:]
    sigma = basis.sigma(5).cpu()
    found = sigma * 2.0**1000 * 2.0**60 if tiny else sigma / scale
    # 1e-3: at 1e-320 a σ itself is held to 4 digits.
    assert torch.allclose(found, expected, rtol=1e-3 if tiny else 1e-12)
    assert basis.certificate.residual <= 1e-12


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_one_byte_weights_are_decomposed_as_the_values_they_store(dtype: str, device: str) -> None:
    weight = llm_like(40, 60).to(getattr(torch, dtype)).to(device)
    assert_certified(weight.to(torch.float32), minor_basis(weight, 4), 4)


@pytest.mark.soak
@pytest.mark.parametrize("shape", [(2048, 2048), (2048, 5632), (5632, 2048), (60_000, 64), (64, 60_000)])
def test_full_size_weights_against_a_float64_svd(shape: tuple[int, int], device: str) -> None:
    weight = llm_like(*shape, strong=32).to(torch.bfloat16).to(device)
    for rank in (16, 64, 128):
        rank = min(rank, *shape)
        assert_certified(weight, minor_basis(weight, rank), rank)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(4))
def test_large_square_weights_stay_on_the_fast_path(seed: int, device: str) -> None:
    """Random square weights have κ of 1e4 to 1e6: what squaring loses must not send them to a path that takes ten times as long."""
    weight = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(seed)).mul_(0.02).to(torch.bfloat16)
    basis = minor_basis(weight.to(device), 128)
    assert basis.certificate.path == path_of((4096, 4096), 128, device), basis.certificate.tried
    left, sigma = basis.left(128).cpu().double(), basis.sigma(128).cpu()
    # Residual of (σ², u) for the Gram matrix, measured here: 1e-12 of σ_max² is 100 times what float64 products of this length lose.
    image = weight.double().mT @ left
    off = weight.double() @ image - left * sigma.square()
    assert torch.linalg.vector_norm(off, dim=0).max() <= 1e-12 * basis.certificate.sigma_max**2
