"""Thin QR by Cholesky against what Householder's promises."""

from __future__ import annotations

import pytest
import torch

from svdbank.solver.matrices import padded_rows
from svdbank.solver.orthogonal import thin_qr


@pytest.mark.parametrize("condition", [1.0, 1e3, 1e7, 1e12])
@pytest.mark.parametrize("scales", [1.0, 1e-150])
def test_factors_of_any_block(condition: float, scales: float, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(300, 24, dtype=torch.float64, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(24, 24, dtype=torch.float64, generator=generator)).Q
    sigma = torch.logspace(0, 1, 24, dtype=torch.float64) ** (-torch.log10(torch.tensor(condition)))
    # Columns of very different length, as images of eigenvectors have, must not count as bad condition.
    block = (left * sigma) @ right * torch.logspace(0, -6, 24, dtype=torch.float64) * scales
    check(block, device)


def test_a_column_of_zeros_and_repeated_columns(device: str) -> None:
    block = torch.randn(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    block[:, 2] = 0
    block[:, 4] = block[:, 5]
    check(block, device)


def test_images_of_eigenvectors_take_one_pass_and_lose_nothing(device: str) -> None:
    """Orthogonal columns over six orders of magnitude."""
    block = torch.linalg.qr(torch.randn(400, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))).Q
    check(block * torch.logspace(0, -6, 32, dtype=torch.float64), device)


def check(block: torch.Tensor, device: str) -> None:
    rows, upper = (factor.cpu() for factor in thin_qr(block.to(device).mT))
    count = block.shape[1]
    # Householder's constants for these sizes lie below 1e-14; ten times that is room for Cholesky's.
    assert (rows @ rows.mT - torch.eye(count, dtype=torch.float64)).abs().max() <= 1e-13
    lengths = torch.linalg.vector_norm(block, dim=0)
    assert bool((torch.linalg.vector_norm(rows.mT @ upper - block, dim=0) <= 1e-13 * lengths).all())
    assert upper.tril(-1).abs().max() <= 1e-13 * lengths.max()


def test_padded_rows_hold_a_matrix_of_the_shape_asked_for(device: str) -> None:
    matrix = padded_rows(3, 512, torch.device(device))
    assert matrix.shape == (3, 512)
    assert matrix.stride(0) % 512 != 0
    assert matrix.stride(1) == 1
