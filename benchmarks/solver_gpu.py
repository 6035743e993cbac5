"""The sections of ``benchmarks.solver`` for a GPU: large weights, batches of small ones, several at a time.

Weights are made on the device. Every way runs there, one after the other, on the same data; R = 128, both sides, certificate included.
They run on a CPU as well, at small sizes, where a driver of CUDA's is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.device import Goal, Results, synchronise, timed, timed_median
from benchmarks.solver_cases import llm_like
from svdbank.core.basis import Basis
from svdbank.solver import minor_bases, minor_basis

Row = dict[str, Any]

RANK, QUICK_RANK = 128, 32
PEFT_RANK = 16
#: Shape, and the least times faster than PEFT's call it is to be.
SHAPES = [
    ((1024, 4096), None),
    ((2048, 5632), None),
    ((4096, 4096), 25.0),
    ((4096, 14336), 18.0),
    ((14336, 4096), 18.0),
    ((8192, 8192), 45.0),
]
QUICK_SHAPES = [((192, 768), None), ((384, 384), 25.0), ((768, 192), 18.0)]
#: The most times the quickest of torch's own ways that it is to take, at any shape.
AT_MOST_QUICKEST = 1.1
#: Count, shape, least times faster than PEFT's call.
BATCHES = [(64, (768, 2048), 25.0), (16, (2048, 7168), 20.0)]
QUICK_BATCHES = [(6, (96, 256), 25.0)]
STREAMED, QUICK_STREAMED = (9, (4096, 14336)), (3, (256, 896))
#: Shapes up to which the slow driver is asked, and up to which the truth is a float64 SVD.
GESVD_MOST, TRUTH_MOST = 2048, 4096


def dense_eigh(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """``eigh`` of the float64 Gram matrix of the short side, then Rayleigh–Ritz with W: left (out, rank), most minor last, and σ."""
    dense = weight.to(torch.float64)
    tall = dense.shape[0] > dense.shape[1]
    short = dense.mT if tall else dense
    near = torch.linalg.eigh(short @ short.mT).eigenvectors[:, :rank].flip(1)
    long, triangle = torch.linalg.qr(short.mT @ near)
    turn, sigma, back = torch.linalg.svd(triangle, full_matrices=False)
    return (long @ turn if tall else near @ back.mT), sigma


def float32_svd(weight: Tensor, rank: int, driver: str | None = None) -> Tensor:
    """Float32, reduced, as PEFT calls it: the default driver is gesvdj on CUDA."""
    return torch.linalg.svd(weight.to(torch.float32), full_matrices=False, driver=driver).U[:, -rank:]


def tall_side_svd(weight: Tensor, rank: int, driver: str) -> Tensor:
    """The same on the orientation that has more rows than columns."""
    if weight.shape[0] >= weight.shape[1]:
        return float32_svd(weight, rank, driver)
    flipped = weight.to(torch.float32).mT.contiguous()
    return torch.linalg.svd(flipped, full_matrices=False, driver=driver).Vh[-rank:].mT


def floor(weight: Tensor) -> Tensor:
    """Gram matrix of the short side and one Cholesky, float64: what no way through the Gram matrix does without."""
    dense = weight.to(torch.float64)
    short = dense.mT if dense.shape[0] > dense.shape[1] else dense
    gram = short @ short.mT
    gram.diagonal().add_(1e-6 * gram.diagonal().mean())
    return torch.linalg.cholesky_ex(gram).L


@dataclass(frozen=True)
class Truth:
    """Left vectors (out, rank), most minor last, to measure against; where they come from, and by Wedin's bound how good they are.

    No figure below ``good_to`` says more than that two ways agree.
    """

    left: Tensor
    source: str
    good_to: dict[int, float]


def truth(weight: Tensor, rank: int, basis: Basis) -> Truth:
    """A float64 SVD on the side with more rows; above :data:`TRUTH_MOST`, where that takes too long, svdbank's own basis."""
    if min(weight.shape) > TRUTH_MOST:
        bound = basis.certificate.angle_bound
        return Truth(basis.left(rank), "svdbank's own, certified", {} if bound is None else {rank: bound})
    dense = weight.to(torch.float64)
    wide = dense.shape[0] < dense.shape[1]
    left, sigma, right = torch.linalg.svd(dense.mT.contiguous() if wide else dense, full_matrices=False)
    left, right = (right.mT, left) if wide else (left, right.mT)
    u, v, s = left[:, -rank:], right[:, -rank:], sigma[-rank:]
    columns = torch.maximum((dense @ v - u * s).norm(dim=0), (dense.mT @ u - v * s).norm(dim=0))
    good_to = {r: float(columns[-r:].max() / (sigma[-r - 1] - sigma[-r])) for r in (PEFT_RANK, rank) if r < min(weight.shape)}
    return Truth(u.contiguous(), "float64 SVD", good_to)


def sine(one: Tensor, other: Tensor) -> float:
    """Of the largest angle between the spans of two blocks of columns; NaN where one is not finite."""
    if not bool(torch.isfinite(one).all() & torch.isfinite(other).all()):
        return float("nan")
    one, other = (torch.linalg.qr(side.to(torch.float64)).Q for side in (one, other))
    return float(torch.linalg.matrix_norm(one - other @ (other.mT @ one), ord=2))


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms"


def _errors(row: Row, name: str, found: Tensor, left: Tensor) -> None:
    ranks = [rank for rank in (PEFT_RANK, left.shape[1]) if rank <= left.shape[1]]
    for rank in ranks:
        row[f"{name} sin r={rank}"] = sine(found[:, -rank:].to(left.device), left[:, -rank:])


def gpu_shapes(device: torch.device, quick: bool, results: Results) -> None:
    """Single weights against PEFT's call, CUDA's other drivers, the dense way through the Gram matrix, and the floor."""
    rank = QUICK_RANK if quick else RANK
    for shape, target in QUICK_SHAPES if quick else SHAPES:
        name, k = f"{shape[0]}×{shape[1]}", min(shape)
        weight = llm_like(*shape, device=device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        ours, basis = timed_median(device, lambda w=weight: minor_basis(w, rank), 5)
        goals: list[Goal] = []
        certificate = basis.certificate
        row: Row = {"section": "gpu-shapes", "weight": name, "rank": rank, "svdbank seconds": ours, "path": certificate.path}
        if device.type == "cuda":
            row["svdbank peak GB"] = torch.cuda.max_memory_allocated(device) / 1e9
        row |= {
            "residual": certificate.residual,
            "angle bound": certificate.angle_bound,
            "κ": certificate.sigma_max / certificate.sigma_min,
            "handed over": list(certificate.tried),
        }
        known = truth(weight, rank, basis)
        left, row["truth"] = known.left, known.source
        row |= {f"truth good to r={r}": bound for r, bound in known.good_to.items()}
        if known.source == "float64 SVD":
            _errors(row, "svdbank", basis.left(rank), left)
        # PEFT's call counts once: gesvdj takes seconds at the larger shapes, and its times repeat. The first of a kind loads kernels.
        ways: dict[str, tuple[int, bool, Callable[[], Tensor]]] = {
            "svd fp32": (1, k <= 4096, lambda w=weight: float32_svd(w, rank)),
            "eigh fp64": (3, k <= 4096, lambda w=weight: dense_eigh(w, rank)[0]),
        }
        if device.type == "cuda" and k <= 4096:
            ways["gesvda fp32"] = (3, True, lambda w=weight: tall_side_svd(w, rank, "gesvda"))
        if device.type == "cuda" and k <= GESVD_MOST:
            ways["gesvd fp32"] = (1, False, lambda w=weight: float32_svd(w, rank, "gesvd"))
        took: dict[str, float] = {}
        for way, (repeats, warm, work) in ways.items():
            try:
                took[way], found = timed_median(device, work, repeats, warm=warm)
            except RuntimeError as error:  # a rival that gives up is a result
                row[f"{way} failed"] = str(error).splitlines()[0][:100]
                synchronise(device)
                continue
            row[f"{way} seconds"] = took[way]
            _errors(row, way, found, left)
            del found
        row["floor seconds"], _ = timed_median(device, lambda w=weight: floor(w), 5)
        row["times the floor"] = ours / row["floor seconds"]
        if "svd fp32" in took:
            row["times faster"], row["target"] = took["svd fp32"] / ours, target
            if target is not None:
                goals.append(
                    Goal(
                        name, _milliseconds(ours), "PEFT's call " + _milliseconds(took["svd fp32"]), row["times faster"], target
                    )
                )
        if took:
            quickest = min(took, key=lambda way: took[way])
            row["quickest of torch"], row["times the quickest"] = quickest, ours / took[quickest]
            goals.append(
                Goal(
                    name,
                    _milliseconds(ours),
                    f"torch's quickest: {quickest} {_milliseconds(took[quickest])}",
                    row["times the quickest"],
                    AT_MOST_QUICKEST,
                    at_most=True,
                )
            )
        results.add(row, *goals)
        del weight, basis, known, left
        _empty(device)


def gpu_batches(device: torch.device, quick: bool, results: Results) -> None:
    """Equal small weights in one call, against PEFT's call on three of them, scaled to all."""
    rank = QUICK_RANK if quick else RANK
    for count, shape, target in QUICK_BATCHES if quick else BATCHES:
        weights = [llm_like(*shape, seed, device=device) for seed in range(count)]
        first, bases = timed(device, lambda w=weights: minor_bases(w, rank, device=device))
        ours, bases = timed_median(device, lambda w=weights: minor_bases(w, rank, device=device), 3, warm=False)
        single, _ = timed_median(device, lambda w=weights: minor_basis(w[0], rank), 3)
        compared = weights[:3]
        svd, theirs = timed_median(device, lambda w=compared: [float32_svd(weight, rank) for weight in w], 1)
        svd *= count / len(compared)
        eigh, dense = timed_median(device, lambda w=compared: [dense_eigh(weight, rank)[0] for weight in w], 1)
        eigh *= count / len(compared)
        row: Row = {
            "section": "gpu-batches",
            "weights": f"{count} of {shape[0]}×{shape[1]}",
            "rank": rank,
            "seconds": ours,
            "seconds a weight": ours / count,
            "first call seconds": first,
            "one by one, seconds a weight": single,
            "svd fp32 seconds, three scaled": svd,
            "eigh fp64 seconds, three scaled": eigh,
            "times faster": svd / ours,
            "target": target,
            "times faster than eigh": eigh / ours,
            "paths": sorted({basis.certificate.path for basis in bases}),
            "handed over": sum(bool(basis.certificate.tried) for basis in bases),
            "residual worst": max(basis.certificate.residual for basis in bases),
            "truth": "float64 SVD of three",
        }
        for at, weight in enumerate(compared):
            known = truth(weight, rank, bases[at])
            left = known.left
            each: Row = {f"truth good to r={r}": bound for r, bound in known.good_to.items()}
            _errors(each, "svdbank", bases[at].left(rank), left)
            _errors(each, "svd fp32", theirs[at], left)
            _errors(each, "eigh fp64", dense[at], left)
            row |= {f"{key}, worst": max(value, row.get(f"{key}, worst", 0.0)) for key, value in each.items()}
        rival = "PEFT's call, scaled " + _milliseconds(svd)
        results.add(row, Goal(row["weights"], _milliseconds(ours), rival, row["times faster"], target))
        del weights, compared, bases, theirs, dense
        _empty(device)


def gpu_streams(device: torch.device, quick: bool, results: Results) -> None:
    """Large weights one, two and three at a time."""
    rank = QUICK_RANK if quick else RANK
    count, shape = QUICK_STREAMED if quick else STREAMED
    weights = [llm_like(*shape, seed, device=device) for seed in range(count)]
    nbytes = sum(weight.nbytes for weight in weights)
    for jobs in (1, 2, 3):

        def run(jobs: int = jobs) -> list[Basis]:
            return minor_bases(weights, rank, jobs=jobs, device=device)

        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        run()
        seconds, bases = timed_median(device, run, 2, warm=False)
        row: Row = {
            "section": "gpu-streams",
            "weights": f"{count} of {shape[0]}×{shape[1]}",
            "at a time": jobs,
            "seconds": seconds,
            "seconds a weight": seconds / count,
            "GB of weights a second": nbytes / seconds / 1e9,
            "residual worst": max(basis.certificate.residual for basis in bases),
        }
        del bases
        if device.type == "cuda":
            row["peak GB"] = torch.cuda.max_memory_allocated(device) / 1e9
        results.add(row)


def _empty(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


SECTIONS: dict[str, Callable[[torch.device, bool, Results], None]] = {
    "gpu-shapes": gpu_shapes,
    "gpu-batches": gpu_batches,
    "gpu-streams": gpu_streams,
}
