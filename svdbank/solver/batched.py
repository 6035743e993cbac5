"""Many weights of one shape at once on a GPU: every large step is one call for all of them, and the host is seldom waited for.

What a weight gets depends on itself and on the size of the batch, never on its neighbours: each decides for itself how far it is shifted
and filtered, and one that does not pass is left to :func:`svdbank.solver.minor_basis`. A batch that is not full is filled up.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from svdbank.core.basis import EPSILON, Basis, Certificate, Triplets
from svdbank.core.specs import Side
from svdbank.solver.contract import Block, Failure, LinAlgError, triplets
from svdbank.solver.filter import COUPLED, Lower, lower_end, start_block, upper_end
from svdbank.solver.gates import allowances, departure, shown, verdict
from svdbank.solver.orthogonal import orthonormal, orthonormal_factors
from svdbank.solver.sizes import block_width, buffer_size
from svdbank.solver.threads import pinned_threads
from svdbank.solver.weight import rounding

#: Weights that go through the device together; the small problems of so many are solved by the host while the device works on the next.
PIECE = 32


def filter_batch(weights: Sequence[Tensor], rank: int, size: int, *, side: Side = "both") -> list[Basis | str]:
    """Certified minor bases of at most ``size`` weights (out, in) of one shape and dtype on one device, on the ``filter`` path.

    Where a weight has none, the reason stands in its place. Bases lie on the device, float64. Weights of zeros, with entries that are not
    finite or whose squares leave float64's range are left to the single solve, which says what is wrong with them.
    """
    out_features, in_features = weights[0].shape
    k = min(out_features, in_features)
    width = block_width(k, rank)
    if width is None:
        return [f"filter: rank {rank} leaves no room for an iteration in {k} dimensions"] * len(weights)
    piece = min(PIECE, size)
    parts = [weights[first : first + piece] for first in range(0, len(weights), piece)]
    # While the host solves the small problems of one piece the device works on the next.
    begun = [_begin(torch.stack([*part, *[part[0]] * (piece - len(part))]), rank, width) for part in parts]
    bases: list[Basis | str] = []
    for part, work in zip(parts, begun, strict=True):
        bases += _end(work, rank, side)[: len(part)]
    return bases


@dataclass
class _Begun:
    """A piece of a batch whose subspaces are found and whose small eigenproblems are with the host.

    ``matrix`` (piece, k, n) and ``gram`` (piece, k, k); ``image`` = Mᵀ X (piece, n, b); ``largest`` λ_max of each; ``ordinary`` says which
    weights are not a stand-in.
    """

    matrix: Tensor
    gram: Tensor
    lower: Lower
    image: Tensor
    mixing: _Mixing
    largest: list[float]
    ordinary: list[bool]
    tall: bool


def _begin(stacked: Tensor, rank: int, width: int) -> _Begun:
    """Everything before the small eigenproblems of ``stacked`` weights (piece, out, in), and those under way."""
    tall = stacked.shape[-2] > stacked.shape[-1]
    matrix = (stacked.mT if tall else stacked).to(torch.float64)  # (piece, k, n)
    k, n = matrix.shape[-2:]
    ends = torch.stack([matrix.amin((-2, -1)), matrix.amax((-2, -1))]).abs().amax(0)
    ordinary = [1e-60 < largest < 1e60 for largest in ends.tolist()]  # NaN compares false
    if not all(ordinary):
        # In a place of its own each: an exotic weight must not spoil, nor be, a neighbour.
        unit = torch.eye(k, n, dtype=torch.float64, device=matrix.device)
        keep = torch.tensor(ordinary, device="cpu").to(matrix.device)[:, None, None]
        matrix = torch.where(keep, matrix, unit)
    gram = matrix @ matrix.mT
    top = upper_end(gram)
    assert not isinstance(top, Failure)  # which only principal triplets can be
    lower = lower_end(gram, start_block(k, width, matrix.device), rank, top[1], least=32 * rounding(n))
    # Rayleigh–Ritz: the small eigenproblems go to the host's processors, where they run side by side; on the device one waits for another.
    image = matrix.mT @ lower.columns
    mixing = _Mixing(image.mT @ image, rank + buffer_size(k, rank))
    return _Begun(matrix, gram, lower, image, mixing, top[1], ordinary, tall)


def _end(begun: _Begun, rank: int, side: Side) -> list[Basis | str]:
    """The rest: triplets, one Newton step, gates, certificates."""
    matrix, gram, lower, largest = begun.matrix, begun.gram, begun.lower, begun.largest
    k, n = matrix.shape[-2:]
    short = lower.columns @ (mixing := begun.mixing.result())
    long, upper = orthonormal_factors(begun.image @ mixing)
    coupling = upper.triu(1).abs().amax((-2, -1))
    sigma = upper.diagonal(dim1=-2, dim2=-1)
    following, sigma = sigma[:, rank : rank + 1], sigma[:, :rank]
    block = Block(short[..., :rank], long[..., :rank], sigma)

    # One Newton step for all of them (``ritz.refined``): it costs less than to see who needs it.
    defect = matrix @ block.long - block.short * sigma.unsqueeze(-2)
    solve = lower.newton(block.short, sigma)
    step = solve(defect - block.short @ (block.short.mT @ defect))
    step -= block.short @ (block.short.mT @ step)
    block = Block(orthonormal(block.short - step * sigma.unsqueeze(-2)), orthonormal(block.long - matrix.mT @ step), sigma)

    # The gates.
    scale = matrix.new_tensor(largest).sqrt().unsqueeze(-1)
    short_defect = torch.linalg.vector_norm(matrix @ block.long - block.short * sigma.unsqueeze(-2), dim=-2)
    long_defect = torch.linalg.vector_norm(matrix.mT @ block.short - block.long * sigma.unsqueeze(-2), dim=-2)
    columns = torch.maximum(short_defect, long_defect)
    gaps, allowed = allowances(sigma, following, scale)
    slack = 4 * rounding(n) * scale**2
    edge, gap = sigma[:, -1:], gaps[:, -1:]
    square_gap = gap * (2 * edge + gap)
    threshold = torch.where(square_gap > 2 * slack, edge**2 + square_gap / 2, edge**2 - slack)
    lift = 2 * threshold.abs() + gram.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    gram.baddbmm_(block.short * lift.unsqueeze(-1), block.short.mT)
    gram.diagonal(dim1=-2, dim2=-1).sub_(threshold)
    factor, info = torch.linalg.cholesky_ex(gram)
    pivots = factor.diagonal(dim1=-2, dim2=-1).sum(-1)
    ends = [departure(block), coupling, pivots, info.to(torch.float64)]
    figures = torch.cat([columns, gaps, allowed, sigma, *(end.unsqueeze(-1) for end in ends), following], dim=-1).tolist()

    left, right = (block.long, block.short) if begun.tall else (block.short, block.long)
    found = triplets(left, right, sigma, side)
    bases: list[Basis | str] = []
    for index, (row, value) in enumerate(zip(figures, largest, strict=True)):
        certificate = _certificate(row, rank, k, n, max(value, 0.0) ** 0.5, matrix.device)
        if not begun.ordinary[index]:
            bases.append("filter: an exotic weight in a batch")
        elif isinstance(certificate, str):
            bases.append(certificate)
        else:
            right_rows = None if found.right is None else found.right[index].clone()  # not a view that keeps its neighbours
            bases.append(Basis(Triplets(found.left[index].clone(), right_rows, found.sigma[index].clone()), certificate))
    return bases


def _certificate(row: list[float], rank: int, k: int, n: int, scale: float, device: torch.device) -> Certificate | str:
    columns, gaps, allowed, sigma = (row[i * rank : (i + 1) * rank] for i in range(4))
    orthogonality, coupling, pivots, info, following = row[4 * rank :]
    if not scale > 0:
        return "filter: the largest eigenvalue of the Gram matrix was not found"
    if not coupling <= COUPLED * EPSILON * scale:
        return f"filter: the projected weight is still coupled by {coupling / scale:.1e} of σ_max"
    slack = 4 * rounding(n) * scale**2

    def proven() -> bool:
        return shown(gaps[-1], sigma[-1], slack, scale) and info == 0 and pivots == pivots  # NaN is not itself

    decided = verdict(columns, gaps, allowed, orthogonality, 0.0, scale, "cholesky", proven)
    if decided.failed is not None:
        return f"filter: {decided.failed}"
    return Certificate(
        path="filter",
        tried=(),
        dtype="float64",
        device=device.type,
        rank_full=k,
        sigma_max=scale,
        sigma_min=sigma[0],
        sigma_next=following,
        orthogonality=decided.orthogonality,
        residual=decided.residual,
        angle_bound=decided.angle_bound,
        completeness=decided.completeness,
    )


class _Mixing:
    """The first ``size`` eigenvectors of symmetric matrices (count, b, b), ascending, by LAPACK on the host, one thread each.

    Under way once it is made; :meth:`result` waits.
    """

    def __init__(self, matrices: Tensor, size: int) -> None:
        self._device = matrices.device
        pinned = self._device.type == "cuda"
        count, b, _ = matrices.shape
        self._vectors = torch.empty(count, b, size, dtype=matrices.dtype, device="cpu", pin_memory=pinned)
        here = torch.empty(matrices.shape, dtype=matrices.dtype, device="cpu", pin_memory=pinned)
        here.copy_(matrices, non_blocking=pinned)
        fetched = torch.cuda.Event() if pinned else None  # type: ignore[no-untyped-call]
        if fetched is not None:
            fetched.record(torch.cuda.current_stream(self._device))  # of that device, which need not be the current one

        def one(index: int) -> None:
            if fetched is not None:
                fetched.synchronize()
            matrix = here[index]
            try:
                if not bool(torch.isfinite(matrix.sum())):  # LAPACK can hang on NaN
                    raise LinAlgError
                with pinned_threads(1):
                    self._vectors[index].copy_(torch.linalg.eigh(matrix).eigenvectors[:, :size])
            except LinAlgError:
                self._vectors[index].fill_(torch.nan)  # its own gates refuse it; its neighbours know nothing of it

        self._under_way = [_host().submit(one, index) for index in range(count)]

    def result(self) -> Tensor:
        """(count, b, size) on the device they came from; NaN where LAPACK found none."""
        for task in self._under_way:
            task.result()
        return self._vectors.to(self._device)


@cache
def _host() -> ThreadPoolExecutor:
    """Threads for small problems, shared by all batches under way."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return ThreadPoolExecutor(cpus, "svdbank-small")
