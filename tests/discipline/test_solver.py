"""Every path of the solver on a pretended device: no devices meet, the host waits only where it must, and how often."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from svdbank.core.basis import Basis
from svdbank.solver import PATHS, minor_bases, minor_basis, residual_check
from svdbank.solver.batched import filter_batch
from svdbank.solver.contract import Candidate, Failure
from svdbank.solver.solve import SOLVERS
from svdbank.solver.weight import Weight
from tests.discipline.pretended import HEADING, Counts, OnDevice, PretendedDevice

SHAPES = {"square": (256, 256), "wide": (192, 640), "tall": (640, 192)}
RANK = 12

#: Most host synchronisations of one solve of these shapes, and most launches: what was counted, and about a tenth more.
#: A path that is not named keeps to :data:`OTHERS`: what a method made for a GPU may need.
BOUNDS = {
    "shift-invert": (230, 1450),
    "filter": (30, 430),
    "dense": (20, 150),
    "lq": (14, 80),
    "svd": (14, 80),
}
OTHERS = (60, 1500)

_TABLE: list[str] = []


@pytest.fixture(scope="module", autouse=True)
def _table() -> Iterator[None]:
    """What was counted, for whoever asks with -s."""
    yield
    print("", HEADING, *_TABLE, sep="\n")


def matrix(shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    """A random bulk under four strong directions, as trained weights have (float32)."""
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(shape[0], 4, generator=generator), torch.randn(4, shape[1], generator=generator)
    return torch.randn(shape, generator=generator) + 10 * left @ right / 4


def solved(weight: torch.Tensor, label: str, device: PretendedDevice, **options: object) -> tuple[Basis, Counts]:
    there = device.put(weight)
    with device.counting() as counts:
        basis = minor_basis(there, RANK, **options)  # type: ignore[arg-type]
    _TABLE.append(counts.row(label))
    for part in (basis.minor.left, basis.minor.right, basis.minor.sigma):
        assert isinstance(part, OnDevice)
    assert basis.certificate.device == "cuda"
    return basis, counts


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("path", PATHS)
def test_a_path_keeps_the_rules_and_its_bounds(path: str, shape: str, pretended: PretendedDevice) -> None:
    weight = matrix(SHAPES[shape])
    basis, counts = solved(weight, f"{path}, {shape}", pretended, solver=path)
    assert basis.certificate.path == path, basis.certificate.tried
    # The project's target for weights of this κ.
    assert basis.certificate.residual <= 1e-12
    # The same subspace as on the CPU, to the accuracy that the gates ask of every one.
    here = minor_basis(weight, RANK, solver=path)
    one, two = basis.minor.left.cpu(), here.minor.left
    assert torch.linalg.matrix_norm(one - one @ two.mT @ two, ord=2) <= 1e-6
    synchronisations, launches = BOUNDS.get(path, OTHERS)
    assert counts.synchronisations <= synchronisations, dict(counts.syncs)
    assert counts.launches <= launches


@pytest.mark.parametrize("path", PATHS)
def test_the_other_end_keeps_the_rules(path: str, pretended: PretendedDevice) -> None:
    basis, _ = solved(matrix(SHAPES["wide"]), f"{path}, principal", pretended, solver=path, principal=4)
    assert basis.principal is not None and isinstance(basis.principal.left, OnDevice)


def test_a_weight_that_is_handed_over_keeps_the_rules(pretended: PretendedDevice) -> None:
    left, right = (torch.linalg.qr(torch.randn(n, 200, dtype=torch.float64)).Q for n in (200, 300))
    weight = (left * torch.logspace(0, -12, 200, dtype=torch.float64)) @ right.mT
    basis, _ = solved(weight, "handed over", pretended, solver="dense")
    assert basis.certificate.path == "lq"


def test_zero_and_tiny_weights_keep_the_rules(pretended: PretendedDevice) -> None:
    solved(torch.zeros(40, 60), "zero", pretended)
    solved(matrix((40, 60)).double() * 1e-200, "1e-200", pretended)


def test_a_weight_of_the_cpu_is_solved_on_the_device_it_is_sent_to(pretended: PretendedDevice) -> None:
    basis = minor_basis(matrix((60, 90)), RANK, device="cuda")
    assert isinstance(basis.minor.left, OnDevice)


def test_a_device_that_has_no_memory_at_all_hands_over_to_the_cpu(
    pretended: PretendedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, calls = SOLVERS["dense"], list[str]()

    def short_of_memory(weight: Weight, rank: int, principal: int) -> Candidate | Failure:
        calls.append(weight.device.type)
        if weight.device.type == "cuda":
            raise torch.OutOfMemoryError("device")
        return dense(weight, rank, principal)

    monkeypatch.setitem(SOLVERS, "dense", short_of_memory)
    certificate = minor_basis(matrix((40, 60)), RANK, solver="dense", device="cuda").certificate
    assert calls == ["cuda", "cuda", "cuda", "cpu"], "as it was, alone, with smaller panels, on the CPU"
    assert (certificate.path, certificate.device) == ("dense", "cpu")
    assert len(certificate.tried) == 3 and all("out of memory on cuda" in note for note in certificate.tried)
    assert "other solves beside it" in certificate.tried[0] and "other solves" not in certificate.tried[1]


@pytest.mark.parametrize("path", PATHS)
def test_no_weight_comes_back_to_the_host(path: str, pretended: PretendedDevice) -> None:
    weight = matrix(SHAPES["wide"])
    _, counts = solved(weight, f"{path}, bytes", pretended, solver=path)
    # Numbers and small problems may: a tenth of a weight of this size is 12 problems of side 32.
    assert counts.to_host <= weight.nbytes / 10


def test_a_batch_in_threads_keeps_the_rules(pretended: PretendedDevice) -> None:
    weights = [pretended.put(matrix((48, 80), seed)) for seed in range(6)]
    with pretended.counting() as counts:
        bases = minor_bases(weights, RANK, jobs=2)
    _TABLE.append(counts.row("batch of 6"))
    assert all(isinstance(basis.minor.left, OnDevice) for basis in bases)
    # And each waits for its stream.
    assert counts.synchronisations <= 6 * (BOUNDS["dense"][0] + 1)


def test_a_batch_of_equal_weights_waits_as_often_as_one_of_them(pretended: PretendedDevice) -> None:
    waits = {}
    for size in (2, 6):
        weights = [pretended.put(matrix(SHAPES["wide"], seed)) for seed in range(size)]
        with pretended.counting() as counts:
            bases = filter_batch(weights, RANK, size)
        _TABLE.append(counts.row(f"filter, {size} at once"))
        for basis in bases:
            assert isinstance(basis, Basis), basis
            assert isinstance(basis.minor.left, OnDevice) and basis.certificate.path == "filter"
        waits[size] = counts.synchronisations
    assert waits[2] == waits[6] <= BOUNDS["filter"][0]


def test_stored_triplets_are_checked_on_the_device_and_three_numbers_come_back(pretended: PretendedDevice) -> None:
    weight = pretended.put(matrix((60, 90)))
    minor = minor_basis(weight, RANK).minor
    with pretended.counting() as counts:
        assert residual_check(weight, minor.left.float(), minor.right.float(), minor.sigma.float()) < 1e-6  # type: ignore[union-attr]
    assert counts.synchronisations <= 3
