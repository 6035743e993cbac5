"""The base without what MiLoRA or PiSSA moved into the adapter, as a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from svdbank.adapter.methods import added
from svdbank.bank.reading import Bank
from svdbank.core.errors import OptionError
from svdbank.core.specs import ProgressCallback

if TYPE_CHECKING:
    from svdbank.core.specs import WeightSpec

#: Rows whose rounding is measured at a time.
_ROWS = 1024


def write_residual(
    bank: Bank,
    source: str | Path | None,
    output: Path,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    scales: Mapping[str, float],
    progress: ProgressCallback | None,
) -> float:
    """Write ``W − s B A`` as a checkpoint; returns what rounding lost, relative to the weight, at worst."""
    from svdbank.checkpoint.naming.selection import decomposable
    from svdbank.checkpoint.source import open_checkpoint
    from svdbank.checkpoint.writing.tensors import write_checkpoint

    if source is None:
        raise OptionError(
            "a residual is made from the base's weights, and a bank does not say where they are",
            hint="name the model instead of the bank, or pass it with --base-model",
        )
    lost: dict[str, list[float]] = {}

    def without_start(spec: WeightSpec, values: Tensor, out: Tensor, rows: slice, columns: slice) -> None:
        A, B = factors[spec.name][0][:, columns], factors[spec.name][1]
        start, scale = B[rows], scales[spec.name]
        out.copy_(added(values, A, start, -scale))
        tally = lost.setdefault(spec.name, [0.0, 0.0])
        for first in range(0, values.shape[0], _ROWS):  # float64 copies of a few rows, not of the weight
            block = slice(first, first + _ROWS)
            own = values[block].double()
            exact = own - scale * (start[block].double() @ A.double())
            tally[0] += float((out[block].double() - exact).square().sum())
            tally[1] += float(own.square().sum())

    with open_checkpoint(source) as checkpoint:
        modules = sorted({bank[name].module for name in factors})
        specs, _ = decomposable(checkpoint, modules)
        specs = [spec for spec in specs if spec.name in factors]
        expected = {name: bank[name].source_sha256 for name in factors}
        if len(specs) != len(factors):
            missing = next(name for name in factors if name not in {spec.name for spec in specs})
            raise OptionError(f"{checkpoint.name}: has no {missing}", hint="name the base that the bank was built from")
        write_checkpoint(checkpoint, output, specs, without_start, expected=expected, progress=progress)
    return max((math.sqrt(error / whole) for error, whole in lost.values() if whole), default=0.0)
