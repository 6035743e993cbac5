"""The path for GPUs, alone and in batches. It is torch: what holds on one device holds on each that is here."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hard_matrices import assert_certified, hard_matrix, llm_like, sine, with_spectrum
from torch import Tensor

import svdbank.solver.batched as batched
import svdbank.solver.devices as devices
import svdbank.solver.filter as filters
from svdbank.core.basis import Basis
from svdbank.core.errors import NotFiniteError, OptionError
from svdbank.solver import Precision, batch_bases, batch_size, choose_path, minor_bases, minor_basis
from svdbank.solver.batched import filter_batch
from svdbank.solver.inverse import gram_of_lower, inverse_factor
from svdbank.solver.orthogonal import orthonormal, orthonormal_factors
from svdbank.solver.pieces import exact_gram
from svdbank.solver.weight import Weight

LOW = Precision(factor=torch.float32, pieces=True)


def positive(k: int, count: int, seed: int = 0) -> Tensor:
    half = torch.randn(count, k, 2 * k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return half @ half.mT


@pytest.mark.parametrize("k", [1, 5, 96, 97, 192, 385])
def test_an_inverse_by_products_is_the_inverse(k: int, device: str) -> None:
    gram, shifts = positive(k, 3).to(device), torch.tensor([0.0, -1.0, 0.1], dtype=torch.float64, device=device)
    lower, info = inverse_factor(gram, shifts)
    assert info.tolist() == [0, 0, 0]
    assert lower.triu(1).abs().max() == 0 if k > 1 else True
    identity = torch.eye(k, dtype=torch.float64, device=device)
    shifted = gram - shifts[:, None, None] * identity
    # κ of these is below 1e3: a hundred times k ε κ is 1e-8 at most, and what is seen lies below 1e-14 κ.
    assert (gram_of_lower(lower) @ shifted - identity).abs().max() <= 1e-11


def test_a_matrix_that_is_not_positive_definite_is_said_and_spoils_no_neighbour(device: str) -> None:
    gram = positive(40, 3).to(device)
    gram[1, 20, 20] = -1.0
    _, info = inverse_factor(gram, torch.zeros(3, dtype=torch.float64, device=device))
    assert [bool(value) for value in info.tolist()] == [False, True, False]


@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6])
def test_cholesky_qr_keeps_span_order_and_signs(condition: float, device: str) -> None:
    generator = torch.Generator().manual_seed(1)
    frame = torch.linalg.qr(torch.randn(300, 20, dtype=torch.float64, generator=generator)).Q
    mixed = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64, generator=generator)).Q
    columns = (frame * torch.logspace(0, -1, 20, dtype=torch.float64) ** torch.log10(torch.tensor(condition))) @ mixed
    found = orthonormal(columns.to(device)).cpu()
    # Two passes reach a small multiple of ε √k up to a condition of 1e7 (Yamamoto et al. 2015).
    assert (found.mT @ found - torch.eye(20, dtype=torch.float64)).abs().max() <= 1e-14
    assert sine(found, frame) <= 1e-15 * condition * 100
    triangle = found.mT @ columns
    assert triangle.tril(-1).abs().max() <= 1e-13 and bool((triangle.diagonal() > 0).all())
    again, upper = orthonormal_factors(found * torch.logspace(0, -6, 20, dtype=torch.float64))
    assert (again @ upper - found * torch.logspace(0, -6, 20, dtype=torch.float64)).abs().max() <= 1e-15


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_gram_matrix_of_exact_pieces_is_what_rational_arithmetic_gives(dtype: torch.dtype, device: str) -> None:
    weight = llm_like(12, 9000).to(dtype)  # more than one panel
    weight[3] *= 2.0**-9
    weight[5, ::7] *= 2.0**-6
    found = exact_gram(weight.to(device)).cpu()
    assert torch.equal(found, found.mT)
    rows = [[Fraction(value) for value in row] for row in weight.double().tolist()]
    for i, j in ((0, 0), (0, 11), (3, 3), (3, 5), (5, 5), (7, 2)):
        exact = sum((a * b for a, b in zip(rows[i], rows[j], strict=True)), Fraction(0))
        scale = Fraction((found[i, i] * found[j, j]).sqrt().item())
        # 2^-53 for each of some forty additions in float64, of the product of the rows' lengths.
        assert abs(Fraction(found[i, j].item()) - exact) <= scale * Fraction(40, 2**53)


@pytest.mark.parametrize("name", ["llm", "marchenko-pastur", "geometric 1e4"])
@pytest.mark.parametrize("shape", [(200, 200), (201, 640), (640, 200)])
def test_the_filter_itself_serves_what_a_gram_matrix_can(name: str, shape: tuple[int, int], device: str) -> None:
    weight = hard_matrix(name, *shape).to(torch.float32)
    for rank in (1, 16, 40):
        basis = minor_basis(weight.to(device), rank, solver="filter")
        assert (basis.certificate.path, basis.certificate.tried) == ("filter", ())
        assert (basis.certificate.completeness, basis.certificate.dtype) == ("cholesky", "float64")
        # The target of the project.
        assert basis.certificate.residual <= 1e-12
        assert_certified(weight, basis_on_cpu(basis), rank)


@pytest.mark.parametrize("seed", range(4))
def test_square_weights_stay_on_the_filter(seed: int, device: str) -> None:
    """κ of 1e4 to 1e6: what squaring loses, one Newton step that is exact beside its block brings back."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(640, 640, generator=generator).mul_(0.02).to(torch.bfloat16) if seed % 2 else llm_like(640, 640, seed)
    basis = minor_basis(weight.to(device), 64, solver="filter")
    assert (basis.certificate.path, basis.certificate.tried) == ("filter", ())
    # Without the series behind the Newton step these lie at 1e-13 to 1e-12, and at 4096 one in eight fails its gates.
    assert basis.certificate.residual <= 2e-14


def test_principal_triplets_come_with_the_filter(device: str) -> None:
    weight = llm_like(150, 260, strong=6)
    basis = minor_basis(weight.to(device), 8, principal=5, solver="filter")
    assert basis.certificate.path == "filter" and basis.principal is not None
    left, sigma, _ = torch.linalg.svd(weight.double(), full_matrices=False)
    # Gaps of the order of σ_max: a small multiple of ε.
    assert torch.allclose(basis.principal.sigma.cpu(), sigma[:5], rtol=1e-12)
    assert (basis.principal.left.cpu() * left[:, :5].mT).sum(1).abs().min() > 1 - 1e-12


@pytest.mark.parametrize("shape", [(240, 240), (200, 640), (640, 200)])
def test_a_card_with_little_float64_certifies_the_same(shape: tuple[int, int], device: str) -> None:
    weight = llm_like(*shape)
    low = minor_basis(weight.to(device), 24, solver="filter", precision=LOW)
    assert (low.certificate.path, low.certificate.dtype, low.certificate.tried) == ("filter", "float32", ())
    assert low.certificate.residual <= 1e-12
    assert_certified(weight, basis_on_cpu(low), 24)


def test_what_float32_cannot_invert_is_filtered_in_float64_before_anything_slower_is_asked(device: str) -> None:
    weight = with_spectrum(torch.logspace(0, -4, 200, dtype=torch.float64), 200, 300).to(torch.float32)
    basis = minor_basis(weight.to(device), 8, solver="filter", precision=LOW)
    assert (basis.certificate.path, basis.certificate.dtype) == ("filter", "float64")
    assert len(basis.certificate.tried) == 1 and basis.certificate.tried[0].startswith("filter: ")
    assert_certified(weight, basis_on_cpu(basis), 8)


def test_a_shift_inside_the_spectrum_is_refused_by_the_factor(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = llm_like(200, 200)
    middle = torch.linalg.svdvals(weight.double())[-40].item() ** 2
    monkeypatch.setattr(filters, "_shift", lambda values, rank, nudge, least: middle)
    basis = minor_basis(weight.to(device), 12, solver="filter")
    assert basis.certificate.path == "lq"
    assert "not positive definite" in basis.certificate.tried[0]


def blind(k: int, width: int, device: torch.device) -> Tensor:
    columns = torch.randn(k, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    columns[k - 3] = 0  # the third smallest of the weight below; a diagonal weight keeps it so
    return columns.to(device)


def test_a_direction_that_the_filter_never_saw_is_missed_by_no_gate(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.diag(torch.linspace(40, 1, 300, dtype=torch.float64))
    monkeypatch.setattr(filters, "start_block", blind)
    basis = minor_basis(weight.to(device), 12, solver="filter")
    assert basis.certificate.path == "lq" and "completeness" in basis.certificate.tried[0]
    assert basis.minor.left[2].abs().argmax() == 297
    monkeypatch.setattr(batched, "start_block", blind)
    found = filter_batch([weight.to(device)] * 2, 12, 2)
    assert all(isinstance(basis, str) and "completeness" in basis for basis in found)


def basis_on_cpu(basis: Basis) -> Basis:
    minor = basis.minor
    assert minor.right is not None
    return Basis(type(minor)(minor.left.cpu(), minor.right.cpu(), minor.sigma.cpu()), basis.certificate)


@pytest.mark.parametrize("shape", [(256, 300), (600, 256)])
def test_a_batch_gives_certified_bases_like_those_of_single_solves(shape: tuple[int, int], device: str) -> None:
    weights = [llm_like(*shape, seed).to(torch.bfloat16) for seed in range(5)]
    found = filter_batch([weight.to(device) for weight in weights], 16, 8)
    for weight, basis in zip(weights, found, strict=True):
        assert not isinstance(basis, str)
        assert basis.certificate.path == "filter" and basis.certificate.residual <= 1e-12
        assert_certified(weight, basis_on_cpu(basis), 16)
        single = minor_basis(weight.to(device), 16, solver="filter")
        # Both certificates bound the angle to the truth.
        bound = (basis.certificate.angle_bound or 0) + (single.certificate.angle_bound or 0)
        assert sine(basis.minor.left.mT.cpu(), single.minor.left.mT.cpu()) <= max(1e-12, bound)


def test_what_a_weight_gets_depends_on_no_neighbour(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Easy and hard ones, zeros, NaN and infinity beside it, another place, another company, a batch that is not full."""
    monkeypatch.setattr(batched, "PIECE", 4)
    own = llm_like(256, 320, 1)
    hard = [
        hard_matrix(name, 256, 320).to(torch.float32) for name in ("clustered", "equal", "geometric 1e14", "deficient", "zero")
    ]
    spoilt = [own * float("nan"), own * 1e30, torch.full_like(own, float("inf"))]
    expected = filter_batch([own.to(device)], 16, 8)[0]
    assert not isinstance(expected, str)
    for place, company in ((0, hard), (3, hard), (2, spoilt), (1, [llm_like(256, 320, seed) for seed in range(2, 9)])):
        weights = [*company[:place], own, *company[place:]][:8]
        found = filter_batch([weight.to(device) for weight in weights], 16, 8)[place]
        assert not isinstance(found, str)
        assert torch.equal(found.minor.left, expected.minor.left)
        assert found.minor.right is not None and expected.minor.right is not None
        assert torch.equal(found.minor.right, expected.minor.right)
        assert found.certificate == expected.certificate


@pytest.mark.parametrize("exotic", ["one entry", "ones", "one column", "two rows"])
def test_a_weight_of_few_directions_ends_no_batch_and_moves_no_neighbour(exotic: str, device: str) -> None:
    weight = torch.zeros(256, 320)
    if exotic == "one entry":
        weight[5, 7] = 1
    elif exotic == "ones":
        weight.fill_(1)
    elif exotic == "one column":
        weight[:, 0] = torch.randn(256, generator=torch.Generator().manual_seed(2))
    else:
        weight[:2] = torch.randn(2, 320, generator=torch.Generator().manual_seed(2))
    good = llm_like(256, 320, 1)
    alone = filter_batch([good.to(device)], 16, 4)[0]
    beside = filter_batch([good.to(device), weight.to(device)], 16, 4)[0]
    assert not isinstance(alone, str) and not isinstance(beside, str)
    assert torch.equal(alone.minor.left, beside.minor.left)
    assert_certified(weight, basis_on_cpu(minor_bases([good.to(device)] * 4 + [weight.to(device)], 16)[-1]), 16)


def test_filters_of_any_degree_are_the_same_beside_any_other(device: str) -> None:
    """The last filter of this weight has degree 2, of its neighbour 3."""
    generator = torch.Generator().manual_seed(0)
    one, _, other = (torch.randn(256, 300, generator=generator) for _ in range(3))
    other = other @ torch.diag(torch.linspace(1, 3, 300))
    alone, beside = (filter_batch([w.to(device) for w in ws], 16, 4)[0] for ws in ([other], [other, one]))
    assert not isinstance(alone, str) and not isinstance(beside, str)
    assert torch.equal(alone.minor.left, beside.minor.left) and alone.certificate == beside.certificate


@pytest.mark.parametrize("rows", [1, 3, 9, 23])
def test_the_scale_of_the_gates_is_never_above_the_norm(rows: int, device: str) -> None:
    """Columns of a block that few directions fill lose their orthogonality: Ritz values of them once came out 3e7 times too large."""
    for seed in range(12, 18):
        weight = torch.zeros(128, 140)
        entries = torch.randn(rows, 140, generator=torch.Generator().manual_seed(seed))
        weight[:rows] = entries * torch.logspace(0, -9, rows)[:, None]
        norm = torch.linalg.matrix_norm(weight.double(), 2).item()
        gram = Weight(weight.to(device)).gram()
        top = filters.upper_end(gram)
        assert not isinstance(top, filters.Failure)
        # 1 % below at most where one direction leads, as here.
        assert 0.99 * norm**2 <= top[1][0] <= norm**2 * (1 + 1e-12)
        assert_certified(weight, basis_on_cpu(minor_basis(weight.to(device), 1, solver="filter")), 1)


def test_principal_triplets_are_left_to_the_dense_path() -> None:
    assert choose_path(4096, 4096, 128, "cuda", principal=1) == "dense"
    assert choose_path(4096, 4096, 128, principal=1) == "shift-invert"


@pytest.mark.parametrize("weight", [torch.ones(3), torch.ones(2, 2, 2), torch.ones(30, 30, dtype=torch.complex64)])
def test_a_list_is_checked_as_a_weight_is(weight: Tensor, device: str) -> None:
    with pytest.raises(OptionError, match="floating-point matrix"):
        minor_bases([weight.to(device)] * 5, 1)
    with pytest.raises(OptionError, match="side"):
        minor_bases([torch.ones(30, 30, device=device)] * 5, 1, side="right")  # type: ignore[arg-type]


def test_every_weight_of_a_list_is_served_whatever_its_batch_makes_of_it(device: str) -> None:
    weights = [llm_like(256, 320, seed) for seed in range(4)] + [
        hard_matrix(name, 256, 320).to(torch.float32) for name in ("zero", "deficient", "geometric 1e14")
    ]
    for weight, basis in zip(weights, minor_bases([w.to(device) for w in weights], 16), strict=True):
        assert_certified(weight, basis_on_cpu(basis), 16)
    with pytest.raises(NotFiniteError):
        minor_bases([*[w.to(device) for w in weights], torch.full((256, 320), float("nan"), device=device)], 16)


def test_a_batch_that_runs_out_of_memory_twice_leaves_its_weights_to_single_solves(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def short_of_memory(weights: list[Tensor], rank: int, size: int, *, side: str = "both") -> list[Basis | str]:
        calls.append(len(weights))
        raise torch.OutOfMemoryError("device")

    monkeypatch.setattr("svdbank.solver.batch.filter_batch", short_of_memory)
    weights = [llm_like(256, 320, seed).to(device) for seed in range(3)]
    assert all(isinstance(found, str) and "device" in found for found in batch_bases(weights, 8, 4))
    assert calls == [3, 3]


def test_the_rule_of_a_gpu_looks_at_shape_rank_and_number_alone() -> None:
    assert choose_path(4096, 14336, 128, "cuda") == choose_path(1024, 4096, 128, "cuda") == "filter"
    assert choose_path(768, 2048, 128, "cuda") == choose_path(4096, 4096, 1024, "cuda") == "dense"
    assert choose_path(768, 2048, 128, "cuda", 16) == "filter"
    assert choose_path(768, 2048, 700, "cuda", 16) == "dense"  # no room for a block
    assert choose_path(768, 2048, 128) == "dense" and choose_path(2048, 2048, 128) == "shift-invert"
    assert batch_size(768, 2048, 200) == 64 and batch_size(768, 2048, 3) == 1
    assert batch_size(768, 2048, 200, "cuda-low-float64") == 1
    assert 1 <= batch_size(8192, 28672, 64) < batch_size(4096, 4096, 64) <= 64


@pytest.mark.parametrize(
    ("capability", "kind"),
    [((8, 0), "cuda"), ((9, 0), "cuda"), ((10, 0), "cuda"), ((8, 9), "cuda-low-float64"), ((10, 3), "cuda-low-float64")],
    ids=["A100", "H100", "B200", "RTX 4090", "B300"],
)
def test_a_card_is_judged_by_its_capability(capability: tuple[int, int], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert devices._kind_of.__wrapped__(torch.device("cuda", 0)) == kind
    assert devices.kind_of(torch.device("cpu")) == "cpu"


def test_products_and_columns_of_an_iteration_are_few(device: str) -> None:
    """What is counted here is what a GPU's time is made of; each bound is a fifth above what these spectra take."""
    for shape, most in (((512, 512), 24), ((512, 1792), 64), ((512, 4096), 130)):
        weight = Weight(llm_like(*shape, strong=16).to(device))
        gram = weight.gram()
        top = filters.upper_end(gram)
        assert not isinstance(top, filters.Failure)
        width = filters.block_width(512, 32)
        assert width is not None
        start = filters.start_block(512, width, gram.device)
        lower = filters.lower_end(gram, start, 32, top[1], least=32 * weight.rounding)
        assert lower.products <= most * width, lower.products / width
