import torch

from svdbank.solver import minor_basis


def test_triplets_are_those_of_a_float64_svd():
    weight = torch.randn(60, 90, generator=torch.Generator().manual_seed(0))
    basis = minor_basis(weight, 7)
    reference = torch.linalg.svd(weight.double(), full_matrices=False)
    # 1e-12: gaps here are about 1e-2 of σ_max.
    assert torch.allclose(basis.sigma(7), reference.S[-7:], rtol=0, atol=1e-12)
    overlap = torch.linalg.svdvals(basis.left(7).mT @ reference.U[:, -7:])
    assert overlap.min() > 1 - 1e-12
