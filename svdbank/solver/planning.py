"""What a solve will cost, from shape and rank alone: the rule that a plan freezes."""

from __future__ import annotations

from svdbank.errors import OptionError
from svdbank.solver.weight import panel_width

#: Names a caller may force; ``auto`` follows :func:`choose_path`.
PATHS = ("shift-invert", "dense", "lq", "svd")


def choose_path(out_features: int, in_features: int, rank: int) -> str:
    """The method for a weight (out, in) at ``rank``: a static rule, so that the same plan gives the same bytes."""
    check_rank(out_features, in_features, rank)
    return "dense"


def check_rank(out_features: int, in_features: int, rank: int) -> None:
    """Raise OptionError unless ``1 ≤ rank ≤ min(out, in)``."""
    if not 1 <= rank <= min(out_features, in_features):
        raise OptionError(
            f"rank {rank} is outside 1..{min(out_features, in_features)}, what a {out_features}×{in_features} weight has"
        )


def flops(out_features: int, in_features: int, rank: int, path: str) -> float:
    """Floating-point operations of a solve that passes at the first attempt, gates included."""
    k, n = sorted((out_features, in_features))
    thin = 8.0 * k * n * rank + 8.0 * n * rank**2  # Rayleigh–Ritz, both residuals, thin QR
    if path == "dense":
        return 1.125 * k * k * n + 9.0 * k**3 + thin
    if path == "lq":
        return 4.0 * k * k * n + 22.0 * k**3 + thin
    if path == "svd":
        return 8.0 * k * k * n + 22.0 * k**3 + thin
    raise OptionError(f"no solver path is called {path!r}")


def peak_bytes(out_features: int, in_features: int, rank: int, path: str, *, dtype_bytes: int) -> int:
    """Upper bound of the memory of a solve in bytes, the weight itself (``dtype_bytes`` an entry) included."""
    k, n = sorted((out_features, in_features))
    held = k * n * dtype_bytes
    thin = 8 * (4 * n + 4 * k) * rank
    panel = 8 * k * panel_width(k, n)
    if path == "dense":
        return held + panel + thin + 8 * 6 * k * k
    if path in ("lq", "svd"):
        return held + 8 * 3 * k * n + 8 * 8 * k * k + thin
    raise OptionError(f"no solver path is called {path!r}")
