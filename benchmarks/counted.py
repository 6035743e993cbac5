"""What a solve would take on a card with little float64: operations counted here, times by a data sheet. Nothing is measured there.

    python -m benchmarks.counted                            RTX 4090: 1.29 TFLOP/s of float64, 82.6 of float32
    python -m benchmarks.counted --float64 1.2 --float32 77 --name B300

The solver runs here on weights of a quarter of each shape's sides and a quarter of its rank, where it takes the same number of
products; flops of products grow with the cube, so they are multiplied by 64. Factorisations are counted beside them by their leading
terms. Times assume that half of the data sheet's rate is reached and that nothing waits.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.solver_cases import llm_like
from svdbank.solver import Precision, minor_basis
from svdbank.solver.weight import DEFAULT_PRECISION

SHAPES = ((1024, 4096), (4096, 4096), (4096, 14336), (8192, 8192))
RANK, SHRUNK = 128, 4
#: Share of a data sheet's rate that products of this size reach (an H200 reaches nine tenths of its own).
REACHED = 0.5


class Counting(TorchDispatchMode):
    """Counts flops of products, factorisations and substitutions by dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.flops: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        tensors = [value for value in args if isinstance(value, torch.Tensor)]
        if name in ("mm", "bmm"):
            self._add(tensors[0], 2 * tensors[0].numel() * tensors[1].shape[-1])
        elif name in ("addmm", "addmm_", "baddbmm", "baddbmm_"):
            self._add(tensors[1], 2 * tensors[1].numel() * tensors[2].shape[-1])
        elif name == "linalg_cholesky_ex":
            self._add(tensors[0], tensors[0].shape[-1] ** 3 // 3)
        elif name == "linalg_solve_triangular":
            self._add(tensors[0], tensors[0].shape[-1] * tensors[1].numel())
        elif name in ("_linalg_eigh", "linalg_eigh"):
            self._add(tensors[0], 9 * tensors[0].shape[-1] ** 3)
        return result

    def _add(self, tensor: torch.Tensor, flops: int) -> None:
        self.flops[str(tensor.dtype).removeprefix("torch.")] += flops


def counted(shape: tuple[int, int], precision: Precision) -> dict[str, Any]:
    """Flops by dtype of a solve of ``shape`` at rank 128, and what its certificate says of the small weight that was counted."""
    weight = llm_like(shape[0] // SHRUNK, shape[1] // SHRUNK)
    with Counting() as counts:
        basis = minor_basis(weight, RANK // SHRUNK, solver="filter", precision=precision)
    return {
        "flops": {dtype: flops * SHRUNK**3 for dtype, flops in sorted(counts.flops.items())},
        "path": basis.certificate.path,
        "residual": basis.certificate.residual,
        "handed over": list(basis.certificate.tried),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="RTX 4090", help="of the card, for the table")
    parser.add_argument("--float64", type=float, default=1.29, help="TFLOP/s of its data sheet")
    parser.add_argument("--float32", type=float, default=82.6, help="TFLOP/s of its data sheet, without tensor cores")
    options = parser.parse_args()
    rates = {"float64": options.float64, "float32": options.float32}
    print(f"{options.name} by its data sheet: {options.float64} TFLOP/s of float64, {options.float32} of float32; NOT MEASURED")
    rows = []
    for shape in SHAPES:
        row: dict[str, Any] = {"weight": f"{shape[0]}×{shape[1]}"}
        for label, precision in (("all in float64", Precision()), ("little float64", DEFAULT_PRECISION["cuda-low-float64"])):
            found = counted(shape, precision)
            seconds = sum(flops / (REACHED * rates[dtype] * 1e12) for dtype, flops in found["flops"].items() if dtype in rates)
            row[label] = found | {"seconds": seconds}
            flops = ", ".join(f"{dtype} {flops / 1e9:.0f} GFLOP" for dtype, flops in found["flops"].items())
            print(
                f"{row['weight']}, {label}: {flops}; {1e3 * seconds:.0f} ms; residual of the one counted {found['residual']:.0e}"
            )
        rows.append(row)
    facts = {"torch": torch.__version__, "python": platform.python_version(), "rates": rates, "reached": REACHED}
    print(json.dumps({"card": options.name, "measured": False, "environment": facts, "rows": rows}))


if __name__ == "__main__":
    main()
