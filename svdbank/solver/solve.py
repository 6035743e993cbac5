"""One weight in, its certified minor basis out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from svdbank.basis import Basis, Certificate, Triplets
from svdbank.errors import NotFiniteError, OptionError, SolverError
from svdbank.solver.careful import solve_lq, solve_svd
from svdbank.solver.contract import Block, Candidate, Failure
from svdbank.solver.dense import solve_dense
from svdbank.solver.gates import judge
from svdbank.solver.planning import PATHS, check_rank, choose_path
from svdbank.solver.shift_invert import solve_shift_invert
from svdbank.solver.weight import Weight
from svdbank.specs import Side

LinAlgError: type[RuntimeError] = torch.linalg.LinAlgError  # type: ignore[attr-defined]

Method = Callable[[Weight, int, int], Candidate | Failure]

METHODS: dict[str, Method] = {"shift-invert": solve_shift_invert, "dense": solve_dense, "lq": solve_lq, "svd": solve_svd}


def minor_basis(
    weight: Tensor,
    rank: int,
    *,
    side: Side = "both",
    solver: str = "auto",
    principal: int = 0,
    device: torch.device | str | None = None,
) -> Basis:
    """The ``rank`` minor singular triplets of ``weight`` (out, in), certified.

    Parameters
    ----------
    weight
        (out, in), any floating dtype; not changed.
    rank
        1 … min(out, in). More is an error here: whoever plans clamps.
    side
        ``left`` drops the right vectors from the result (they are computed all the same: the gates need them).
    solver
        ``auto`` for :func:`choose_path`'s rule, or a path's name to start from. A path that fails a gate hands over.
    principal
        How many triplets of the largest singular values to return as well.
    device
        Where to compute; default: where ``weight`` is. The result stays there.

    Returns
    -------
    Basis
        float64, contiguous rows: left (R, out), right (R, in) or None, sigma (R,) ascending. Signs are canonical: the entry of
        largest magnitude of each left vector is positive (the first one on a tie), the right vector follows.

    Raises
    ------
    OptionError
        Rank, principal, side or solver that cannot be meant; a weight that is not a floating-point matrix.
    NotFiniteError
        NaN or infinity in the weight, found before any factorisation (LAPACK can hang on them).
    SolverError
        Every method failed a gate; the message says which and by how much.
    """
    if weight.ndim != 2 or not weight.is_floating_point():
        raise OptionError(f"a weight is a floating-point matrix, not {weight.dtype} of shape {tuple(weight.shape)}")
    out_features, in_features = weight.shape
    check_rank(out_features, in_features, rank)
    if not 0 <= principal <= min(weight.shape):
        raise OptionError(f"principal {principal} is outside 0..{min(weight.shape)}")
    if side not in ("both", "left"):
        raise OptionError(f"side is 'both' or 'left', not {side!r}")
    first = choose_path(out_features, in_features, rank) if solver == "auto" else solver
    if first not in PATHS:
        raise OptionError(f"no solver path is called {solver!r}; there are auto, {', '.join(PATHS)}")

    weight = weight.detach()
    if device is not None:
        weight = weight.to(device)
    weight, exponent = _scaled(weight)
    transposed = out_features > in_features
    view = Weight(weight.mT if transposed else weight)
    if exponent is None:
        return _zero_basis(out_features, in_features, rank, principal, side, view.device)

    tried: list[str] = []
    for path in PATHS[PATHS.index(first) :]:
        try:
            candidate = METHODS[path](view, rank, principal)
        except LinAlgError as error:
            tried.append(f"{path}: {error}")
            continue
        if isinstance(candidate, Failure):
            tried.append(f"{path}: {candidate.reason}")
            continue
        candidate, verdict = judge(view, candidate)
        if verdict.failed is not None:
            tried.append(f"{path}: {verdict.failed}")
            continue
        back = 2.0**exponent
        following = candidate.sigma_next
        certificate = Certificate(
            path=path,
            tried=tuple(tried),
            dtype="float64",
            device=view.device.type,
            rank_full=min(out_features, in_features),
            sigma_max=candidate.sigma_max * back,
            sigma_min=candidate.sigma_min * back,
            sigma_next=None if following is None else following * back,
            orthogonality=verdict.orthogonality,
            residual=verdict.residual,
            angle_bound=verdict.angle_bound,
            completeness=verdict.completeness,
        )
        top = candidate.principal
        return Basis(
            minor=_triplets(candidate.minor, transposed, side, back),
            certificate=certificate,
            principal=None if top is None else _triplets(top, transposed, side, back),
        )
    raise SolverError(
        f"no method passed the gates for this {out_features}×{in_features} weight at rank {rank}: {'; '.join(tried)}",
    )


def _scaled(weight: Tensor) -> tuple[Tensor, int | None]:
    """The weight, multiplied by a power of two where squares would leave float64's range, and the exponent to undo it.

    None instead of the exponent for a weight of zeros. Raises NotFiniteError.
    """
    if weight.element_size() == 1:  # torch has no reductions for float8
        weight = weight.to(torch.float32)
    low, high = torch.aminmax(weight)
    largest = max(abs(low.item()), abs(high.item()))
    # NaN wins in aminmax, but Python's max may lose it: look at both ends.
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        raise NotFiniteError("the weight holds NaN or infinity")
    if largest == 0.0:
        return weight, None
    if 1e-60 < largest < 1e60:  # squares, sums and their differences stay normal numbers
        return weight, 0
    exponent = int(torch.frexp(torch.tensor(largest, dtype=torch.float64)).exponent.item())
    # In two halves: 2^1074 itself is not a float64.
    half = -exponent // 2
    return weight.to(torch.float64).mul(2.0**half).mul_(2.0 ** (-exponent - half)), exponent


def _triplets(block: Block, transposed: bool, side: Side, back: float) -> Triplets:
    left, right = (block.long, block.short) if transposed else (block.short, block.long)
    sign = canonical_signs(left)
    return Triplets(
        left=(left * sign).mT.contiguous(),
        right=(right * sign).mT.contiguous() if side == "both" else None,
        sigma=(block.sigma * back).contiguous(),
    )


def canonical_signs(left: Tensor) -> Tensor:
    """±1 for each column of ``left`` (out, R): what makes its entry of largest magnitude positive, the first one on a tie."""
    magnitude = left.abs()
    # argmax does not promise the first of equal entries; the smallest index that attains the maximum does.
    index = torch.arange(left.shape[0], device=left.device).unsqueeze(1)
    first = torch.where(magnitude == magnitude.amax(0), index, left.shape[0]).amin(0)
    entry = left.gather(0, first.unsqueeze(0)).squeeze(0)
    return torch.where(entry < 0, -1.0, 1.0).to(left.dtype)


def _zero_basis(out_features: int, in_features: int, rank: int, principal: int, side: Side, device: torch.device) -> Basis:
    """A weight of zeros: any orthonormal vectors are right; the first unit vectors are taken."""

    def unit(count: int) -> Triplets:
        left = torch.eye(count, out_features, dtype=torch.float64, device=device)
        right = torch.eye(count, in_features, dtype=torch.float64, device=device) if side == "both" else None
        return Triplets(left, right, torch.zeros(count, dtype=torch.float64, device=device))

    certificate = Certificate(
        path="zero",
        tried=(),
        dtype="float64",
        device=device.type,
        rank_full=min(out_features, in_features),
        sigma_max=0.0,
        sigma_min=0.0,
        sigma_next=0.0 if rank < min(out_features, in_features) else None,
        orthogonality=0.0,
        residual=0.0,
        angle_bound=None,
        completeness="spectrum",
    )
    return Basis(minor=unit(rank), certificate=certificate, principal=unit(principal) if principal else None)
