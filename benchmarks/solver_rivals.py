"""What users run today, and what a numerical analyst would try: each returns left vectors of the ``rank`` smallest, (out, rank)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Rival = Callable[[Tensor, int], Tensor]


def torch_svd(weight: Tensor, rank: int) -> Tensor:
    """As PEFT calls it: float32, reduced."""
    return torch.linalg.svd(weight.to(torch.float32), full_matrices=False).U[:, -rank:]


def torch_svd_transposed(weight: Tensor, rank: int) -> Tensor:
    """The same call on Wᵀ, which LAPACK solves faster for wide weights."""
    return torch.linalg.svd(weight.to(torch.float32).mT.contiguous(), full_matrices=False).Vh[-rank:].mT


def torch_eigh(weight: Tensor, rank: int) -> Tensor:
    """All eigenvectors of the float64 Gram matrix on the left side."""
    dense = weight.to(torch.float64)
    return torch.linalg.eigh(dense @ dense.mT).eigenvectors[:, :rank].flip(1)


def scipy_eigh_subset(weight: Tensor, rank: int) -> Tensor:
    """Only the wanted ones (MRRR)."""
    import scipy.linalg

    dense = weight.to(torch.float64)
    _, vectors = scipy.linalg.eigh((dense @ dense.mT).numpy(), subset_by_index=[0, rank - 1])
    return torch.from_numpy(np.ascontiguousarray(vectors)).flip(1)


def torch_lobpcg(weight: Tensor, rank: int) -> Tensor:
    """LOBPCG on the float64 Gram matrix, 100 iterations at most."""
    dense = weight.to(torch.float64)
    start = torch.randn(dense.shape[0], rank, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return torch.lobpcg(dense @ dense.mT, k=rank, X=start, niter=100, tol=1e-12, largest=False)[1].flip(1)


def scipy_svds(weight: Tensor, rank: int) -> Tensor:
    """ARPACK for the smallest singular values, 200 iterations at most."""
    import scipy.sparse.linalg

    left, _, _ = scipy.sparse.linalg.svds(weight.to(torch.float64).numpy(), k=rank, which="SM", maxiter=200, rng=0)
    return torch.from_numpy(np.ascontiguousarray(left)).flip(1)


def peft_init(weights: dict[str, Tensor], rank: int) -> Tensor:
    """PEFT's own ``init_lora_weights="mica"`` over a module with these linears; all B stacked, (out total, rank)."""
    from peft import LoraConfig, get_peft_model

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, weight in weights.items():
                layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
                layer.weight = torch.nn.Parameter(weight, requires_grad=False)
                self.add_module(name.replace(".", "_"), layer)

    names = [name.replace(".", "_") for name in weights]
    config = LoraConfig(r=rank, init_lora_weights="mica", target_modules=names)
    model = get_peft_model(Model(), config)
    layers = model.base_model.model
    return torch.cat([getattr(layers, name).lora_B["default"].weight.detach() for name in names])
