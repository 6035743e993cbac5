"""Certified minor singular triplets of one matrix. Tensors in, a Basis out; knows nothing of files, models or banks.

Names are loaded at their first use: what a solve will cost (``choose_path``, ``peak_bytes`` …) is worked out without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from svdbank.solver.batch import batch_bases as batch_bases
    from svdbank.solver.batch import minor_bases as minor_bases
    from svdbank.solver.batch import on_own_stream as on_own_stream
    from svdbank.solver.check import DeviceCheck as DeviceCheck
    from svdbank.solver.check import check_device as check_device
    from svdbank.solver.contract import canonical_signs as canonical_signs
    from svdbank.solver.gates import residual_check as residual_check
    from svdbank.solver.planning import PATHS as PATHS
    from svdbank.solver.planning import batch_peak_bytes as batch_peak_bytes
    from svdbank.solver.planning import choose_path as choose_path
    from svdbank.solver.planning import flops as flops
    from svdbank.solver.planning import peak_bytes as peak_bytes
    from svdbank.solver.sizes import batch_size as batch_size
    from svdbank.solver.solve import minor_basis as minor_basis
    from svdbank.solver.threads import pinned_threads as pinned_threads
    from svdbank.solver.weight import Precision as Precision

_LAZY = {
    "DeviceCheck": "check",
    "PATHS": "planning",
    "Precision": "weight",
    "batch_bases": "batch",
    "batch_peak_bytes": "planning",
    "batch_size": "sizes",
    "canonical_signs": "contract",
    "check_device": "check",
    "choose_path": "planning",
    "flops": "planning",
    "minor_bases": "batch",
    "minor_basis": "solve",
    "on_own_stream": "batch",
    "peak_bytes": "planning",
    "pinned_threads": "threads",
    "residual_check": "gates",
}

__all__ = [*sorted(_LAZY)]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'svdbank.solver' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f"svdbank.solver.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
