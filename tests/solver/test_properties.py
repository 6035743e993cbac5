"""What must hold for any weight, by Hypothesis."""

from __future__ import annotations

import pytest
import torch
from hard_matrices import llm_like, resolved, sine, with_spectrum
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from svdbank.core.errors import NotFiniteError, OptionError
from svdbank.solver import PATHS, canonical_signs, minor_bases, minor_basis

SOLVERS = st.sampled_from([path for path in PATHS if path != "svd"])


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    rows, columns = draw(st.integers(20, 60)), draw(st.integers(20, 60))
    seed = draw(st.integers(0, 2**16))
    kind = draw(st.sampled_from(["llm", "random", "geometric"]))
    if kind == "llm":
        return llm_like(rows, columns, seed)
    if kind == "geometric":
        steps = torch.logspace(0, -draw(st.floats(0.5, 5)), min(rows, columns), dtype=torch.float64)
        return with_spectrum(steps, rows, columns, seed).to(torch.float32)
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def generators(device: str) -> list[Tensor]:
    """States of the global generators that a computation on ``device`` could draw from."""
    return [torch.random.get_rng_state(), *([torch.cuda.get_rng_state()] if device == "cuda" else [])]


def same_subspaces(one: Tensor, other: Tensor, sigma: Tensor) -> None:
    """Rows (R, m) of two bases span the same at every rank that the data resolve."""
    one, other = one.cpu(), other.cpu()
    for r in resolved(sigma):
        if r <= one.shape[0]:
            # Both are within 1e-6 of the truth.
            assert sine(one[:r].mT, other[:r].mT) <= 2e-6


@settings(max_examples=25, deadline=None)
@given(weights(), SOLVERS, st.integers(1, 8))
def test_rank_r_is_a_prefix_of_every_larger_rank(device: str, weight: Tensor, solver: str, rank: int) -> None:
    sigma = torch.linalg.svdvals(weight.double()).flip(0)
    small, large = (minor_basis(weight, r, solver=solver, device=device).minor for r in (rank, rank + 5))
    assert torch.allclose(small.sigma, large.sigma[:rank], rtol=0, atol=1e-10 * sigma[-1].item())
    same_subspaces(small.left, large.left[:rank], sigma)


@settings(max_examples=25, deadline=None)
@given(weights(), SOLVERS, st.integers(0, 2**16))
def test_permuting_rows_and_columns_permutes_the_vectors(device: str, weight: Tensor, solver: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (torch.randperm(size, generator=generator) for size in weight.shape)
    sigma = torch.linalg.svdvals(weight.double()).flip(0)
    plain, mixed = (minor_basis(w, 6, solver=solver, device=device).minor for w in (weight, weight[rows][:, columns]))
    assert plain.right is not None and mixed.right is not None
    same_subspaces(plain.left[:, rows], mixed.left, sigma)
    same_subspaces(plain.right[:, columns], mixed.right, sigma)


@settings(max_examples=25, deadline=None)
@given(weights(), SOLVERS, st.integers(-40, 40), st.sampled_from([1.0, 3.0, 0.7]))
def test_scaling_scales_sigma_alone(device: str, weight: Tensor, solver: str, exponent: int, factor: float) -> None:
    weight = weight.double()
    sigma = torch.linalg.svdvals(weight).flip(0)
    scale = factor * 2.0**exponent
    plain, scaled = (minor_basis(w, 6, solver=solver, device=device).minor for w in (weight, weight * scale))
    assert torch.allclose(plain.sigma * scale, scaled.sigma, rtol=0, atol=1e-10 * sigma[-1].item() * scale)
    same_subspaces(plain.left, scaled.left, sigma)


@settings(max_examples=25, deadline=None)
@given(weights(), SOLVERS)
def test_transposing_exchanges_the_sides(device: str, weight: Tensor, solver: str) -> None:
    sigma = torch.linalg.svdvals(weight.double()).flip(0)
    plain, turned = (minor_basis(w, 6, solver=solver, device=device).minor for w in (weight, weight.mT))
    assert plain.right is not None and turned.right is not None
    same_subspaces(plain.left, turned.right, sigma)
    same_subspaces(plain.right, turned.left, sigma)


@settings(max_examples=25, deadline=None)
@given(weights(), SOLVERS)
def test_the_same_call_gives_the_same_bytes_and_leaves_the_global_generator_alone(
    device: str, weight: Tensor, solver: str
) -> None:
    weight = weight.to(device)
    before = [state.clone() for state in generators(device)]
    one, two = minor_basis(weight, 6, solver=solver), minor_basis(weight.clone(), 6, solver=solver)
    assert all(map(torch.equal, before, generators(device)))
    assert torch.equal(one.minor.left, two.minor.left)
    assert one.minor.right is not None and two.minor.right is not None
    assert torch.equal(one.minor.right, two.minor.right)
    assert torch.equal(one.minor.sigma, two.minor.sigma)
    assert one.certificate == two.certificate


@settings(max_examples=25, deadline=None)
@given(weights(), SOLVERS, st.integers(1, 20))
def test_results_are_contiguous_float64_rows_with_canonical_signs(device: str, weight: Tensor, solver: str, rank: int) -> None:
    weight = weight.to(device)
    kept = weight.clone()
    minor = minor_basis(weight, rank, solver=solver).minor
    assert torch.equal(kept, weight)
    assert minor.right is not None
    for part in (minor.left, minor.right, minor.sigma):
        assert part.dtype == torch.float64 and part.is_contiguous() and not part.requires_grad
    largest = minor.left.gather(1, minor.left.abs().argmax(1, keepdim=True))
    assert bool((largest > 0).all())


def test_the_first_of_equal_entries_decides_the_sign(device: str) -> None:
    left = torch.tensor([[0.5, -0.5, 0.1], [-0.5, 0.5, -0.9], [0.5, 0.5, 0.1]], dtype=torch.float64)
    assert canonical_signs(left.to(device)).tolist() == [1.0, -1.0, -1.0]


def test_a_weight_that_needs_gradients_is_no_obstacle(device: str) -> None:
    weight = torch.nn.Parameter(llm_like(30, 40).to(device))
    assert not minor_basis(weight, 3).minor.left.requires_grad


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [(0, 0), (17, 39)])
def test_not_finite_is_an_error_before_any_factorisation(
    bad: float, place: tuple[int, int], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("a factorisation was called")

    weight = llm_like(18, 40)
    weight[place] = bad
    for name in ("eigh", "svd", "qr", "cholesky_ex"):
        monkeypatch.setattr(torch.linalg, name, never)
    with pytest.raises(NotFiniteError, match="NaN or infinity"):
        minor_basis(weight.to(device), 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank 0"),
        ({"rank": 13}, "rank 13"),
        ({"rank": 3, "principal": 13}, "principal 13"),
        ({"rank": 3, "side": "right"}, "side"),
        ({"rank": 3, "solver": "magic"}, "magic"),
    ],
)
def test_options_that_cannot_be_meant_are_errors(options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        minor_basis(torch.randn(12, 20), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("weight", [torch.ones(3), torch.ones(2, 2, 2), torch.ones(3, 3, dtype=torch.int32)])
def test_only_floating_point_matrices_are_weights(weight: Tensor) -> None:
    with pytest.raises(OptionError, match="floating-point matrix"):
        minor_basis(weight, 1)


def test_a_batch_gives_what_single_calls_give_whatever_the_number_of_jobs(device: str) -> None:
    batch = [llm_like(40, 70, seed).to(device) for seed in range(7)]
    ranks = [3, 5, 7, 3, 5, 7, 1]
    serial, parallel = minor_bases(batch, ranks, jobs=1), minor_bases(batch, ranks, jobs=3)
    for one, two, rank in zip(serial, parallel, ranks, strict=True):
        assert one.rank == rank
        assert torch.equal(one.minor.left, two.minor.left)
        assert one.certificate == two.certificate


def test_a_batch_raises_the_error_of_its_bad_weight(device: str) -> None:
    batch = [weight.to(device) for weight in (llm_like(20, 30), torch.full((20, 30), float("nan")), llm_like(20, 30))]
    with pytest.raises(NotFiniteError):
        minor_bases(batch, 2, jobs=2)
    with pytest.raises(OptionError, match="2 ranks were given for 3 weights"):
        minor_bases(batch, [1, 2], jobs=2)
    with pytest.raises(OptionError, match="jobs"):
        minor_bases(batch, 2, jobs=0)
