"""One weight in, its certified minor basis out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from svdbank.core.basis import Basis, Certificate, Triplets
from svdbank.core.errors import NotFiniteError, OptionError, SolverError
from svdbank.core.specs import Side
from svdbank.solver.contract import Block, Candidate, Failure, LinAlgError, triplets
from svdbank.solver.dense import solve_dense, solve_lq, solve_svd
from svdbank.solver.devices import Turn, give_back_device, kind_of, start, turns
from svdbank.solver.filter import solve_filter
from svdbank.solver.gates import Verdict, judge
from svdbank.solver.planning import PATHS, check_rank, choose_path
from svdbank.solver.shift_invert import solve_shift_invert
from svdbank.solver.sizes import DEVICE_PANEL_ENTRIES, PANEL_ENTRIES
from svdbank.solver.weight import DEFAULT_PRECISION, Precision, Weight

Solver = Callable[[Weight, int, int], Candidate | Failure]

#: Paths with steps that may work in less than float64.
ITERATING = ("shift-invert", "filter")

#: What is asked next where a path fails. What squaring κ spoils for one path it spoils for the other, so both hand over to ``lq``;
#: ``dense`` closes the row of ``shift-invert`` because LAPACK's limit on k is wider for it.
FALLBACKS = {
    "filter": ("filter", "lq", "svd", "dense"),
    "shift-invert": ("shift-invert", "lq", "svd", "dense"),
    "dense": ("dense", "lq", "svd"),
    "lq": ("lq", "svd"),
    "svd": ("svd",),
}
SOLVERS: dict[str, Solver] = {
    "shift-invert": solve_shift_invert,
    "filter": solve_filter,
    "dense": solve_dense,
    "lq": solve_lq,
    "svd": solve_svd,
}


def minor_basis(
    weight: Tensor,
    rank: int,
    *,
    side: Side = "both",
    solver: str = "auto",
    principal: int = 0,
    device: torch.device | str | None = None,
    precision: Precision | None = None,
    before: Sequence[str] = (),
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
        Where to compute; default: where ``weight`` is. The result stays there, also where memory ran out and the CPU stepped in.
    precision
        Working dtype of the steps that may leave float64; default: :data:`DEFAULT_PRECISION` of the device.
    before
        What was tried elsewhere and why it did not serve, for the certificate.

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
    check_request(weight, rank, side, principal)
    out_features, in_features = weight.shape
    target = torch.device(device) if device is not None else weight.device
    kind = kind_of(target)
    first = choose_path(out_features, in_features, rank, kind, principal=principal) if solver == "auto" else solver
    if first not in PATHS:
        raise OptionError(f"no solver path is called {solver!r}; there are auto, {', '.join(PATHS)}")

    start(target)
    with turns(target).shared() as turn:
        scaled, exponent = _scaled(weight.detach().to(target))
        if exponent is None:
            return _zero_basis(out_features, in_features, rank, principal, side, target)
        transposed = out_features > in_features
        view = Weight(
            scaled.mT if transposed else scaled,
            precision or DEFAULT_PRECISION[kind],
            DEVICE_PANEL_ENTRIES.get(target.type, PANEL_ENTRIES),
        )
        tried: list[str] = [*before]
        for path, seen in _attempts(first, view):
            solved = _solve(SOLVERS[path], path, seen, rank, principal, tried, turn)
            if solved is None:
                continue
            candidate, verdict, view_used = solved
            scale = 2.0**exponent
            following = candidate.sigma_next
            certificate = Certificate(
                path=path,
                tried=tuple(tried),
                dtype=str(seen.precision.factor).removeprefix("torch.") if path in ITERATING else "float64",
                device=view_used.device.type,
                rank_full=min(out_features, in_features),
                sigma_max=candidate.sigma_max * scale,
                sigma_min=candidate.sigma_min * scale,
                sigma_next=None if following is None else following * scale,
                orthogonality=verdict.orthogonality,
                residual=verdict.residual,
                angle_bound=verdict.angle_bound,
                completeness=verdict.completeness,
            )
            top = candidate.principal
            return Basis(
                minor=_triplets(candidate.minor, transposed, side, scale, target),
                certificate=certificate,
                principal=None if top is None else _triplets(top, transposed, side, scale, target),
            )
    raise SolverError(
        f"no method passed the gates for this {out_features}×{in_features} weight at rank {rank}: {'; '.join(tried)}",
        hint="report the weight: a matrix that a float64 SVD cannot decompose is a defect of the LAPACK in use",
    )


def check_request(weight: Tensor, rank: int, side: str, principal: int) -> None:
    """OptionError for a weight, rank, side or number of principal triplets that cannot be meant."""
    if weight.ndim != 2 or not weight.is_floating_point():
        raise OptionError(f"a weight is a floating-point matrix, not {weight.dtype} of shape {tuple(weight.shape)}")
    check_rank(weight.shape[0], weight.shape[1], rank)
    if not 0 <= principal <= min(weight.shape):
        raise OptionError(f"principal {principal} is outside 0..{min(weight.shape)}")
    if side not in ("both", "left"):
        raise OptionError(f"side is 'both' or 'left', not {side!r}")


def _attempts(first: str, view: Weight) -> Iterator[tuple[str, Weight]]:
    """Paths in the order in which they are asked, with the weight as each sees it.

    A filter in float32 that does not serve is asked again in float64, before the slow ways that never square κ.
    """
    for path in FALLBACKS[first]:
        yield path, view
        if path == "filter" and view.precision.factor != torch.float64:
            yield path, replace(view, precision=replace(view.precision, factor=torch.float64))


def _solve(
    method: Solver, path: str, view: Weight, rank: int, principal: int, tried: list[str], turn: Turn
) -> tuple[Candidate, Verdict, Weight] | None:
    """Run one method and judge it; None, with the reason appended to ``tried``, where it has no certified result.

    Out of memory: again once no other solve uses the device, then with smaller panels, then on the CPU.
    """
    smaller = replace(view, panel_entries=view.panel_entries // 8)
    try:
        return _climbed(method, path, (view, smaller), rank, principal, tried, turn)
    finally:  # what is asked next needs the room, and not this
        for seen in (view, smaller):
            seen.__dict__.pop("_widened", None)


def _climbed(
    method: Solver, path: str, views: tuple[Weight, Weight], rank: int, principal: int, tried: list[str], turn: Turn
) -> tuple[Candidate, Verdict, Weight] | None:
    """The attempts of :func:`_solve`, with panels as they are and smaller ones."""
    view, smaller = views
    on_device = view.device.type != "cpu"
    ladder = [view, view, smaller] if on_device and not turn.is_alone else [view, smaller]
    for number, attempt in enumerate([*ladder, None] if on_device else ladder):
        # Only here, outside the handler below, has what the last attempt held been let go; the widened weight is the view's own.
        if number:
            for seen in views:
                seen.__dict__.pop("_widened", None)
        if number and on_device:
            turn.alone()
            give_back_device(view.device)
        if attempt is None:
            attempt = replace(smaller, matrix=view.matrix.cpu())
        try:
            candidate = method(attempt, rank, principal)
            if isinstance(candidate, Failure):
                tried.append(f"{path}: {candidate.reason}")
                return None
            candidate, verdict = judge(attempt, candidate)
        except LinAlgError as error:
            tried.append(f"{path}: {error}")
            return None
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error):
                raise
            others = ", other solves beside it" if on_device and not turn.is_alone else ""
            tried.append(
                f"{path}: out of memory on {attempt.device.type} with panels of {attempt.panel_entries} entries{others}"
            )
            continue
        tried.extend(f"{path}: {note}" for note in candidate.notes)
        if verdict.failed is not None:
            tried.append(f"{path}: {verdict.failed}")
            return None
        return candidate, verdict, attempt
    return None


def _out_of_memory(error: Exception) -> bool:
    # torch has a class for devices only; its CPU allocator raises a plain RuntimeError.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


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


def _triplets(block: Block, transposed: bool, side: Side, scale: float, target: torch.device) -> Triplets:
    left, right = (block.long, block.short) if transposed else (block.short, block.long)
    found = triplets(left, right, block.sigma * scale, side)
    return Triplets(
        left=found.left.to(target),
        right=None if found.right is None else found.right.to(target),
        sigma=found.sigma.to(target),
    )


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
