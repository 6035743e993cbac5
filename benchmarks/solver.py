"""The solver against what users run today: time, accuracy, distance to the floor, growth.

    python -m benchmarks.solver            all of it
    python -m benchmarks.solver --quick    small shapes, about two minutes
    python -m benchmarks.solver --only shapes,batches --json results.json
    python -m benchmarks.solver --device cuda      on a GPU: gpu-shapes, gpu-batches, gpu-streams

Rivals run beside the solver in one process, one after the other, on the same data: trust the ratios. R = 128, both sides,
certificate included.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import device as devices
from benchmarks import sections, solver_gpu
from benchmarks import solver_cases as cases
from benchmarks import solver_rivals as rivals
from svdbank.core.basis import EPSILON, UNRESOLVED
from svdbank.solver import choose_path, minor_bases, minor_basis, pinned_threads

RANK = 128
PEFT_RANK = 16
#: Shape, and the least times faster than float32 SVD it is to be: on W, and on Wᵀ where that is asked too.
SHAPES = [
    ((1024, 4096), 3.0, None),
    ((2048, 5632), 5.0, 2.0),
    ((4096, 4096), 4.0, None),
    ((4096, 14336), 10.0, 3.0),
    ((14336, 4096), 3.5, None),
]
QUICK = [((512, 2048), None, None), ((1024, 4096), 3.0, None)]

Row = dict[str, Any]


def timed(work: Callable[[], Any], repeats: int = 1) -> tuple[float, Any]:
    """Best wall-clock seconds of ``repeats`` runs, and the last result."""
    best, result = float("inf"), None
    for _ in range(repeats):
        start = time.perf_counter()
        result = work()
        best = min(best, time.perf_counter() - start)
    return best, result


def sine(one: Tensor, other: Tensor) -> float:
    one, other = (torch.linalg.qr(side.to(torch.float64)).Q for side in (one, other))
    return float(torch.linalg.matrix_norm(one - other @ (other.mT @ one), ord=2))


def truth(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Left vectors (out, k), most minor last, and σ descending, by float64 SVD of the taller orientation."""
    dense = weight.to(torch.float64)
    if dense.shape[0] >= dense.shape[1]:
        left, sigma, _ = torch.linalg.svd(dense, full_matrices=False)
        return left, sigma
    _, sigma, right = torch.linalg.svd(dense.mT.contiguous(), full_matrices=False)
    return right.mT, sigma


def is_resolved(sigma: Tensor, rank: int) -> bool:
    """Whether the data define the rank-``rank`` subspace to 1e-6 (σ descending)."""
    return bool(sigma[-rank - 1] - sigma[-rank] > 100 * EPSILON * sigma[0] / UNRESOLVED)


def floor_seconds(shape: tuple[int, int]) -> float:
    """float64 Gram (one triangle) and one Cholesky at the rate this machine multiplies 4096 × 4096 matrices."""
    square = torch.randn(4096, 4096, dtype=torch.float64)
    seconds, _ = timed(lambda: square @ square, 3)
    k, n = sorted(shape)
    return (k * k * n + k**3 / 3) / (2 * 4096**3 / seconds)


def report(row: Row) -> None:
    """One result, as it comes."""
    parts = [
        f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items() if key != "section"
    ]
    print(f"[{row['section']}] " + " · ".join(parts), flush=True)


def shapes(quick: bool) -> list[Row]:
    """The large weights against float32 SVD as PEFT calls it."""
    rows: list[Row] = []
    known: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    for shape, target, target_transposed in QUICK if quick else SHAPES:
        out_features, in_features = shape
        weight = cases.llm_like(min(shape), max(shape))
        weight = weight if out_features <= in_features else weight.mT.contiguous()
        ours, basis = timed(lambda w=weight: minor_basis(w, RANK), 2)
        svd, theirs = timed(lambda w=weight: rivals.torch_svd(w, RANK))
        again, _ = timed(lambda w=weight: minor_basis(w, RANK), 1)
        ours = min(ours, again)
        certificate = basis.certificate
        row: Row = {
            "section": "shapes",
            "weight": f"{out_features}×{in_features}",
            "path": certificate.path,
            "seconds": ours,
            "svd fp32 seconds": svd,
            "times faster": svd / ours,
            "target": target,
        }
        if out_features < in_features:
            other, _ = timed(lambda w=weight: rivals.torch_svd_transposed(w, RANK))
            row |= {"svd fp32 on Wᵀ seconds": other, "times faster than on Wᵀ": other / ours, "target on Wᵀ": target_transposed}
        bound = floor_seconds(shape)
        row |= {
            "floor seconds": bound,
            "times the floor": ours / bound,
            "residual": certificate.residual,
            "κ": certificate.sigma_max / certificate.sigma_min,
        }
        # A tall case is the transpose of the wide one before it only in shape: the reference is its own.
        left, sigma = known.setdefault(shape, truth(weight))
        for rank in (PEFT_RANK, RANK):
            mine, peft = sine(basis.left(rank), left[:, -rank:]), sine(theirs[:, -rank:], left[:, -rank:])
            row |= {
                f"sin r={rank}": mine,
                f"sin r={rank} svd fp32": peft,
                f"error ratio r={rank}": peft / mine,
                f"resolved r={rank}": is_resolved(sigma, rank),
            }
        known.clear()
        rows.append(row)
        report(row)
    return rows


def trained(quick: bool) -> list[Row]:
    """Every linear weight of two trained models: time against PEFT's init, residuals and subspace errors."""
    rows: list[Row] = []
    for name, weights, target in (("SmolLM2-135M", cases.smollm2(), 2.0), ("all-MiniLM-L6-v2", cases.minilm(), None)):
        if weights is None:
            print(f"[trained] {name}: its package is not installed", flush=True)
            continue
        if quick:
            weights = dict(list(weights.items())[:14])
        listed = list(weights.values())
        ours, bases = timed(lambda w=listed: minor_bases(w, RANK_OF(w), jobs=2, threads=1))
        peft, _ = timed(lambda w=weights: rivals.peft_init(w, PEFT_RANK))
        row: Row = {
            "section": "trained",
            "model": name,
            "weights": len(listed),
            "seconds": ours,
            "PEFT init seconds": peft,
            "times faster": peft / ours,
            "target": target,
            "paths": sorted({basis.certificate.path for basis in bases}),
            "residual worst": max(basis.certificate.residual for basis in bases),
            "residual median": sorted(basis.certificate.residual for basis in bases)[len(bases) // 2],
            "κ worst": max(basis.certificate.sigma_max / max(basis.certificate.sigma_min, 1e-300) for basis in bases),
        }
        mine, theirs, ratios, skipped = [], [], [], 0
        for weight, basis in list(zip(listed, bases, strict=True))[:: 1 if quick else 6]:
            left, sigma = truth(weight)
            if not is_resolved(sigma, PEFT_RANK):
                skipped += 1
                continue
            mine.append(sine(basis.left(PEFT_RANK), left[:, -PEFT_RANK:]))
            theirs.append(sine(rivals.torch_svd(weight, PEFT_RANK), left[:, -PEFT_RANK:]))
            ratios.append(theirs[-1] / mine[-1])
        row |= {
            "weights compared": len(mine),
            "not resolved at r=16": skipped,
            "sin worst r=16": max(mine),
            "sin worst r=16 svd fp32": max(theirs),
            "error ratio least": min(ratios),
        }
        rows.append(row)
        report(row)
    return rows


def RANK_OF(weights: list[Tensor]) -> list[int]:  # noqa: N802 - a constant made for each weight
    """R = 128, clamped as a build clamps it."""
    return [min(RANK, *weight.shape) for weight in weights]


def batches(quick: bool) -> list[Row]:
    """Many equal small weights, and who gets the threads."""
    count = 16 if quick else 256
    experts = [cases.llm_like(768, 2048, seed) for seed in range(count)]
    rows: list[Row] = []
    one, _ = timed(lambda: minor_bases(experts[: count // 4], RANK, jobs=1, threads=2))
    two, _ = timed(lambda: minor_bases(experts[: count // 4], RANK, jobs=2, threads=1))
    rows.append(
        {"section": "batches", "weights": f"{count // 4} of 768×2048", "1 job × 2 threads": one, "2 jobs × 1 thread": two}
    )
    report(rows[-1])
    ours, _ = timed(lambda: minor_bases(experts, RANK, jobs=2, threads=1))
    svd, _ = timed(lambda: [rivals.torch_svd(weight, RANK) for weight in experts])
    rows.append(
        {
            "section": "batches",
            "weights": f"{count} of 768×2048",
            "seconds": ours,
            "svd fp32 seconds": svd,
            "times faster": svd / ours,
            "target": 4.0,
        }
    )
    report(rows[-1])
    return rows


def others(quick: bool) -> list[Row]:
    """Rivals beyond the SVD that PEFT calls, in time and error."""
    shape = (512, 2048) if quick else (2048, 5632)
    weight = cases.llm_like(*shape)
    left, _ = truth(weight)
    named: dict[str, rivals.Rival] = {
        "svdbank": lambda w, r: minor_basis(w, r).left(r),
        "torch.linalg.svd fp32": rivals.torch_svd,
        "torch.linalg.eigh of W Wᵀ fp64": rivals.torch_eigh,
        "scipy eigh subset of W Wᵀ fp64": rivals.scipy_eigh_subset,
        "torch.lobpcg of W Wᵀ fp64, ≤ 100 iterations": rivals.torch_lobpcg,
        "scipy svds SM, ≤ 200 iterations (R = 16)": rivals.scipy_svds,
    }
    rows: list[Row] = []
    for name, rival in named.items():
        rank = PEFT_RANK if "svds" in name else RANK
        row: Row = {"section": "others", "method": name, "weight": f"{shape[0]}×{shape[1]}", "rank": rank}
        try:
            seconds, found = timed(lambda f=rival, r=rank: f(weight, r))
            row |= {"seconds": seconds, "sin": sine(found, left[:, -rank:])}
        except Exception as error:  # a rival that gives up is a result
            row |= {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:100]}
        rows.append(row)
        report(row)
    return rows


def growth(quick: bool) -> list[Row]:
    """Cost as n grows at R = 128, and as R grows."""
    rows: list[Row] = []
    for n in (512, 1024) if quick else (1024, 2048, 4096, 8192):
        weight = cases.llm_like(n, n)
        seconds, basis = timed(lambda w=weight: minor_basis(w, RANK))
        rows.append(
            {"section": "growth", "weight": f"{n}×{n}", "rank": RANK, "path": basis.certificate.path, "seconds": seconds}
        )
        report(rows[-1])
    shape = (512, 2048) if quick else (2048, 5632)
    weight = cases.llm_like(*shape)
    for rank in (16, 32, 64, 128, 256, 512):
        seconds, basis = timed(lambda r=rank: minor_basis(weight, r))
        path = basis.certificate.path
        rows.append({"section": "growth", "weight": f"{shape[0]}×{shape[1]}", "rank": rank, "path": path, "seconds": seconds})
        report(rows[-1])
    return rows


def crossover(quick: bool) -> list[Row]:
    """Dense against shift-invert around the static rule that chooses between them."""
    rows: list[Row] = []
    for k in (768, 1024) if quick else (768, 1024, 1536, 2048):
        for ratio in (8, 12, 16, 32):
            weight, rank = cases.llm_like(k, 2 * k), k // ratio
            dense, _ = timed(lambda w=weight, r=rank: minor_basis(w, r, solver="dense"))
            fast, _ = timed(lambda w=weight, r=rank: minor_basis(w, r, solver="shift-invert"))
            chosen = choose_path(k, 2 * k, rank)
            rows.append({"section": "crossover", "k": k, "k/R": ratio, "dense": dense, "shift-invert": fast, "chosen": chosen})
            report(rows[-1])
    return rows


SECTIONS: dict[str, Callable[[bool], list[Row]]] = {
    "shapes": shapes,
    "trained": trained,
    "batches": batches,
    "others": others,
    "growth": growth,
    "crossover": crossover,
}


def environment(threads: int) -> Row:
    """What a figure is worth nothing without."""
    return {
        "command": " ".join(["python -m benchmarks.solver", *sys.argv[1:]]),
        "commit": devices.commit(),
        "cpu": devices.processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "synthetic weights": cases.SYNTHETIC,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes only")
    sections.add_option(parser, (*SECTIONS, *solver_gpu.SECTIONS))
    parser.set_defaults(only=None)
    parser.add_argument("--device", help="of the gpu- sections, which are the default where this is given: cuda, cuda:1, cpu …")
    parser.add_argument("--threads", type=int, help="2 by default; with --device as many as torch takes")
    parser.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args()
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    only = options.only or tuple(solver_gpu.SECTIONS if options.device else SECTIONS)
    if not options.device:
        options.threads = options.threads or 2
    facts = environment(options.threads or torch.get_num_threads())
    if any(name in solver_gpu.SECTIONS for name in only):
        facts |= devices.facts(device)
    devices.show(facts)
    results = devices.Results(facts, options.json)
    rows = results.rows
    start = time.perf_counter()
    with pinned_threads(options.threads) if options.threads else contextlib.nullcontext():
        for name in only:
            if name in solver_gpu.SECTIONS:
                with results.section(name):
                    devices.start(device)
                    solver_gpu.SECTIONS[name](device, options.quick, results)
            else:
                rows += SECTIONS[name](options.quick)
                print(f"-- {name} done after {time.perf_counter() - start:.0f} s", flush=True)
            results.write()
    if not any(name in SECTIONS for name in only):
        return results.close()
    missed = [
        row
        for row in rows
        for key, goal in (("times faster", "target"), ("times faster than on Wᵀ", "target on Wᵀ"))
        if row.get(goal) and row[key] < row[goal]
    ]
    print(
        "\ntargets: "
        + (
            "all met"
            if not missed
            else "; ".join(f"{row.get('weight', row.get('model', row.get('weights')))} missed" for row in missed)
        )
    )
    return results.close() if results.goals else 0


if __name__ == "__main__":
    sys.exit(main())
