"""A saboteur for each gate: what it is there to catch must not get through, whatever the other gates say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hard_matrices import NAMES, hard_matrix, llm_like, reference
from torch import Tensor

import svdbank.solver.shift_invert as shift_invert
import svdbank.solver.solve as solve
from svdbank.core.basis import Triplets
from svdbank.core.errors import SolverError
from svdbank.core.specs import Side
from svdbank.solver import minor_basis, residual_check
from svdbank.solver.contract import Block, Candidate
from svdbank.solver.gates import judge
from svdbank.solver.lanczos import largest
from svdbank.solver.sizes import shape_for
from svdbank.solver.stored import StoredTriplets, check_stored
from svdbank.solver.weight import Weight

RANK = 12


def truth(weight: Weight) -> tuple[Tensor, Tensor, Tensor]:
    """LAPACK's SVD in float64, the most minor first, as columns on the weight's device."""
    left, sigma, right = reference(weight.matrix.cpu())
    return left.to(weight.device), sigma.to(weight.device), right.to(weight.device)


def exact(weight: Weight, *, spectrum: bool) -> Candidate:
    """The right answer, as either family of methods would hand it over; without a way to repair it."""
    left, sigma, right = truth(weight)
    return Candidate(
        Block(left[:, :RANK], right[:, :RANK], sigma[:RANK]),
        None,
        sigma[RANK].item(),
        sigma[0].item(),
        sigma[-1].item(),
        sigma if spectrum else None,
        None if spectrum else weight.gram(),
        None,
    )


def changed(
    candidate: Candidate, short: Tensor | None = None, long: Tensor | None = None, sigma: Tensor | None = None
) -> Candidate:
    block = candidate.minor
    return replace(
        candidate,
        minor=Block(
            block.short if short is None else short,
            block.long if long is None else long,
            block.sigma if sigma is None else sigma,
        ),
    )


@pytest.fixture(params=[(150, 150), (150, 400)], ids=["square", "wide"])
def weight(request: pytest.FixtureRequest, device: str) -> Weight:
    return Weight(llm_like(*request.param).to(device))


@pytest.fixture(params=[True, False], ids=["spectrum", "cholesky"])
def candidate(weight: Weight, request: pytest.FixtureRequest) -> Candidate:
    return exact(weight, spectrum=request.param)


def test_the_right_answer_passes(weight: Weight, candidate: Candidate) -> None:
    _, verdict = judge(weight, candidate)
    assert verdict.failed is None


def test_a_vector_swapped_for_the_next_one_up_is_seen_by_completeness_alone(weight: Weight, candidate: Candidate) -> None:
    left, sigma, right = truth(weight)
    for missed in (0, RANK // 2, RANK - 1):
        chosen = [index for index in range(RANK + 1) if index != missed]
        swapped = changed(candidate, left[:, chosen], right[:, chosen], sigma[chosen])
        swapped = replace(swapped, sigma_next=sigma[RANK + 1].item(), gram=None if candidate.gram is None else weight.gram())
        _, verdict = judge(weight, swapped)
        assert verdict.failed is not None and verdict.failed.startswith("completeness")
        # No residual can see it: these are exact triplets.
        assert verdict.residual <= 1e-13


def test_a_rotated_pair_is_seen_by_the_residual(weight: Weight, candidate: Candidate) -> None:
    angle = torch.tensor(1e-4, dtype=torch.float64)
    turn = torch.eye(RANK, dtype=torch.float64)
    turn[:2, :2] = torch.tensor([[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]])
    # Both sides turned alike: the subspace is right, the vectors are not singular vectors.
    block = candidate.minor
    turn = turn.to(weight.device)
    _, verdict = judge(weight, changed(candidate, block.short @ turn, block.long @ turn))
    assert verdict.failed is not None and "residual" in verdict.failed
    assert verdict.orthogonality <= 1e-13


@pytest.mark.parametrize("side", ["short", "long"])
def test_a_perturbed_vector_is_seen_by_the_residual(weight: Weight, candidate: Candidate, side: str) -> None:
    block = candidate.minor
    vectors = block.short if side == "short" else block.long
    noise = torch.randn(vectors.shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(5)).to(weight.device)
    noise -= vectors @ (vectors.mT @ noise)
    noise /= noise.norm()
    for size in (1e-2, 1e-5, 1e-7):
        bent = vectors.clone()
        bent[:, 3] = (bent[:, 3] + size * noise) / (1 + size**2) ** 0.5
        _, verdict = judge(weight, changed(candidate, **{side: bent}))
        assert verdict.failed is not None and "residual" in verdict.failed
        assert verdict.orthogonality <= 1e-13


def test_vectors_that_are_not_orthonormal_are_seen(weight: Weight, candidate: Candidate) -> None:
    block = candidate.minor
    short = block.short.clone()
    short[:, 1] = short[:, 0]
    _, verdict = judge(weight, changed(candidate, short))
    assert verdict.failed is not None and verdict.failed.startswith("orthogonality")


def test_a_wrong_sigma_is_seen(weight: Weight, candidate: Candidate) -> None:
    sigma = candidate.minor.sigma.clone()
    sigma[4] *= 1 + 1e-6
    _, verdict = judge(weight, changed(candidate, sigma=sigma))
    assert verdict.failed is not None and "residual" in verdict.failed


def test_nan_fails_every_gate(weight: Weight, candidate: Candidate) -> None:
    _, verdict = judge(weight, changed(candidate, candidate.minor.short * float("nan")))
    assert verdict.failed is not None


def test_a_missed_principal_vector_is_seen(weight: Weight, candidate: Candidate) -> None:
    left, sigma, right = (part.flip(-1) for part in truth(weight))
    top = Block(left[:, :3], right[:, :3], sigma[:3])
    _, verdict = judge(weight, replace(candidate, principal=top, gram=None if candidate.gram is None else weight.gram()))
    assert verdict.failed is None
    chosen = [0, 2, 3]
    wrong = Block(left[:, chosen], right[:, chosen], sigma[chosen])
    _, verdict = judge(weight, replace(candidate, principal=wrong, gram=None if candidate.gram is None else weight.gram()))
    assert verdict.failed is not None and verdict.failed.startswith("completeness")


def test_a_shift_above_the_smallest_eigenvalue_is_refused_by_the_factorisation(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = llm_like(150, 400)
    middle = torch.linalg.svdvals(weight.double())[-5].item() ** 2
    factor = shift_invert.factor
    monkeypatch.setattr(shift_invert, "factor", lambda gram, dtype, *, shift: factor(gram, dtype, shift=middle))
    basis = minor_basis(weight, RANK, solver="shift-invert", device=device)
    assert basis.certificate.path == "lq"
    assert "not positive definite" in basis.certificate.tried[0]


def test_an_iteration_with_a_wrong_operator_is_refused_by_the_gates(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # An indefinite shift that the factorisation let through: the iteration then converges to the eigenvalues around the shift.
    weight = llm_like(150, 400)
    middle = torch.linalg.svdvals(weight.double())[-30].item() ** 2

    class Wrong:
        def __init__(self, gram: Tensor) -> None:
            self.matrix = gram - middle * torch.eye(gram.shape[0], dtype=torch.float64, device=gram.device)

        def solve(self, columns: Tensor) -> Tensor:
            return torch.linalg.solve(self.matrix, columns)

    works = shift_invert.factor

    def wrong_in_float64(gram: Tensor, dtype: torch.dtype, *, shift: float) -> object:
        return Wrong(gram) if dtype == torch.float64 else works(gram, dtype, shift=shift)  # the shift is placed in float32

    monkeypatch.setattr(shift_invert, "factor", wrong_in_float64)
    basis = minor_basis(weight, RANK, solver="shift-invert", device=device)
    assert basis.certificate.path == "lq"
    assert basis.certificate.tried


def test_a_start_block_orthogonal_to_a_wanted_direction_loses_nothing(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Exactly orthogonal, and a diagonal weight keeps it so: the iteration cannot find the direction, completeness must.
    matrix = torch.diag(torch.linspace(40, 1, 600, dtype=torch.float64))
    start = shift_invert._start

    def blind(k: int, block: int, device: torch.device) -> Tensor:
        rows = start(k, block, device)
        rows[:, 597] = 0  # the third smallest; QR leaves an exact zero there
        return rows

    monkeypatch.setattr(shift_invert, "_start", blind)
    basis = minor_basis(matrix, RANK, solver="shift-invert", device=device)
    assert basis.minor.left[2].abs().argmax() == 597
    assert basis.certificate.path == "lq"
    assert "completeness" in basis.certificate.tried[0]


def test_the_iteration_alone_does_lose_it(device: str) -> None:
    # Holds the saboteur above honest: without the gate the answer would have been wrong.
    matrix = torch.diag(torch.linspace(40, 1, 600, dtype=torch.float64) ** 2).to(device)
    shape = shape_for(600, RANK)
    assert shape is not None
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(shape.block, 600, dtype=torch.float64, generator=generator)
    rows[:, 597] = 0
    found = largest(
        lambda columns: torch.linalg.solve(matrix, columns),
        rows.to(device),
        RANK,
        shape,
        lambda v, r, f, n: r[:RANK].max().item() / 1e-9,
        generator,
    )
    assert not hasattr(found, "reason")
    assert found.vectors[:, 597].abs().max() < 1e-6


def test_a_weight_that_no_method_solves_is_an_error_that_names_each_failure(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled(weight: Weight, rank: int, principal: int) -> Candidate:
        candidate = exact(weight, spectrum=True)
        return changed(candidate, short=candidate.minor.short.flip(0))

    monkeypatch.setattr(solve, "SOLVERS", dict.fromkeys(solve.SOLVERS, spoiled))
    with pytest.raises(SolverError, match=r"dense: residual .*; lq: residual .*; svd: residual") as caught:
        minor_basis(llm_like(60, 90), RANK, solver="dense", device=device)
    assert caught.value.hint


def test_residual_check_tells_stored_triplets_from_spoiled_ones(device: str) -> None:
    for shape in [(60, 90), (90, 60)]:
        weight = llm_like(*shape).to(device)
        minor = minor_basis(weight, 8).minor
        assert minor.right is not None
        left, right, sigma = minor.left.float(), minor.right.float(), minor.sigma.float()
        # float32 storage: 2^-24 an entry.
        assert residual_check(weight, left, right, sigma) < 1e-6
        assert residual_check(weight, left, None, sigma) < 1e-6
        assert residual_check(weight, left.roll(1, 0), right, sigma) > 1e-3
        assert residual_check(weight, left.roll(1, 1), None, sigma) > 1e-3
    nothing = (torch.zeros(4, 5), torch.eye(2, 4), torch.eye(2, 5), torch.zeros(2))
    assert residual_check(*(part.to(device) for part in nothing)) == 0.0


DTYPES = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.mark.parametrize("shape", [(48, 48), (40, 90), (90, 40)], ids=str)
@pytest.mark.parametrize("side", ["both", "left"])
@pytest.mark.parametrize("name", NAMES)
def test_what_the_solver_found_and_a_bank_stores_is_proven_whatever_the_weight(
    name: str, side: Side, shape: tuple[int, int]
) -> None:
    weight = hard_matrix(name, *shape)
    basis = minor_basis(weight, RANK, side=side, principal=3)
    assert basis.principal is not None
    for dtype, limit in DTYPES.items():
        ends = [_stored(end, dtype) for end in (basis.minor, basis.principal)]
        for check in check_stored(weight, *ends):
            assert check.residual <= limit and check.orthogonality <= limit and check.ordered and check.complete, dtype


@pytest.mark.parametrize("shape", [(150, 150), (150, 400), (400, 150)], ids=str)
@pytest.mark.parametrize("side", ["both", "left"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triplets_that_are_not_the_smallest_are_not_complete_however_exact(
    dtype: torch.dtype, side: Side, shape: tuple[int, int]
) -> None:
    """The largest in either order, one in the middle left out, one end cut off: no residual tells them from the right ones."""
    weight = llm_like(*shape)
    left, sigma, right = reference(weight)

    def stored(chosen: list[int]) -> StoredTriplets:
        sides = [vectors[:, chosen].mT.contiguous().to(dtype) for vectors in (left, right)]
        return StoredTriplets(sides[0], sides[1] if side == "both" else None, sigma[chosen])

    k = min(shape)
    for chosen in (
        list(range(k - RANK, k)),
        list(range(1, RANK + 1)),
        [index for index in range(RANK + 1) if index != RANK // 2],
        [*range(RANK - 1), k - 1],
    ):
        (check,) = check_stored(weight, stored(chosen))
        assert check.residual <= DTYPES[dtype] and check.orthogonality <= DTYPES[dtype] and check.ordered
        assert not check.complete, chosen
    right_ones = stored(list(range(RANK)))
    assert check_stored(weight, right_ones)[0].complete
    (reversed_,) = check_stored(weight, stored(list(range(RANK))[::-1]))
    assert not reversed_.ordered
    twice = stored([0, *range(RANK - 1)])
    assert check_stored(weight, twice)[0].orthogonality > 0.5
    largest, wrong = stored(list(range(k - 1, k - 5, -1))), stored(list(range(k - 2, k - 6, -1)))
    assert check_stored(weight, right_ones, largest)[1].complete and not check_stored(weight, right_ones, wrong)[1].complete


def _stored(end: Triplets, dtype: torch.dtype) -> StoredTriplets:
    return StoredTriplets(end.left.to(dtype), None if end.right is None else end.right.to(dtype), end.sigma)
