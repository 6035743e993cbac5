"""What happens when memory runs out, a driver fails or a step works in less than float64; and the bounds a plan states."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hard_matrices import assert_certified, llm_like
from torch import Tensor

import svdbank.solver.contract as contract
import svdbank.solver.dense as dense_paths
import svdbank.solver.solve as solve
from svdbank.core.errors import OptionError, SolverError
from svdbank.solver import PATHS, Precision, choose_path, flops, minor_basis, peak_bytes
from svdbank.solver.cholesky import factor, factorise
from svdbank.solver.contract import Candidate, Failure
from svdbank.solver.devices import Turns
from svdbank.solver.sizes import DEVICE_PANEL_ENTRIES
from svdbank.solver.weight import Weight

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("device"), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9")]
)
def test_out_of_memory_is_retried_with_smaller_panels_and_recorded(
    error: Exception, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, entries = solve.SOLVERS["dense"], DEVICE_PANEL_ENTRIES[device]

    def short_of_memory(weight: Weight, rank: int, principal: int) -> Candidate | Failure:
        if weight.panel_entries == entries:
            raise error
        return dense(weight, rank, principal)

    monkeypatch.setitem(solve.SOLVERS, "dense", short_of_memory)
    weight = llm_like(40, 60).to(device)
    basis = minor_basis(weight, 4, solver="dense")
    assert basis.certificate.path == "dense"
    said = f"dense: out of memory on {device} with panels of {entries} entries"
    # Of a device all memory is asked for first, then less.
    assert basis.certificate.tried == ((said,) if device == "cpu" else (f"{said}, other solves beside it", said))
    assert_certified(weight, basis, 4)


def test_memory_that_never_suffices_sends_a_device_to_the_cpu_and_the_cpu_to_the_next_path(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, calls = solve.SOLVERS["dense"], list[str]()

    def short_of_memory(weight: Weight, rank: int, principal: int) -> Candidate | Failure:
        calls.append(weight.device.type)
        if weight.device.type == device:
            raise torch.OutOfMemoryError("device")
        return dense(weight, rank, principal)

    monkeypatch.setitem(solve.SOLVERS, "dense", short_of_memory)
    weight = llm_like(40, 60).to(device)
    basis = minor_basis(weight, 4, solver="dense")
    assert calls == (["cpu", "cpu"] if device == "cpu" else [device, device, device, "cpu"])
    assert basis.certificate.path == ("lq" if device == "cpu" else "dense")
    assert basis.certificate.device == "cpu"
    assert [note.split(" with ")[0] for note in basis.certificate.tried] == [
        f"dense: out of memory on {device}" for place in calls if place == device
    ]
    assert_certified(weight, basis, 4)


def test_a_solve_that_ran_out_of_memory_waits_for_the_others_and_keeps_new_ones_out() -> None:
    turns, events = Turns(), list[str]()
    others_run, may_end, alone = threading.Event(), threading.Event(), threading.Event()

    def other() -> None:
        with turns.shared():
            others_run.set()
            may_end.wait()
            events.append("other ends")

    def short_of_memory() -> None:
        with turns.shared() as turn:
            others_run.wait()
            threading.Timer(0.05, may_end.set).start()
            turn.alone()
            events.append("alone")
            alone.set()

    def late() -> None:
        alone.wait()
        with turns.shared():
            events.append("late")

    threads = [threading.Thread(target=work) for work in (other, short_of_memory, late)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert events == ["other ends", "alone", "late"]


def test_a_solve_that_is_interrupted_while_it_waits_leaves_its_turn() -> None:
    turns = Turns()
    other_runs, may_end = threading.Event(), threading.Event()

    def other() -> None:
        with turns.shared():
            other_runs.set()
            may_end.wait(10)

    running = threading.Thread(target=other)
    running.start()
    other_runs.wait()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), turns.shared() as turn:
            threading.Timer(0.05, signal.raise_signal, [signal.SIGINT]).start()
            turn.alone()
    finally:
        signal.signal(signal.SIGINT, before)
    may_end.set()
    running.join()
    entered = threading.Event()

    def later() -> None:
        with turns.shared() as turn:
            turn.alone()
            entered.set()

    threading.Thread(target=later, daemon=True).start()
    assert entered.wait(5)


def test_a_weight_that_fails_lets_its_widened_self_go_before_another_path_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[bool] = []
    lq = solve.SOLVERS["lq"]
    monkeypatch.setattr("svdbank.solver.gates.RESIDUAL_LIMIT", 0.0)

    def watching(weight: Weight, rank: int, principal: int) -> Candidate | Failure:
        alive.append("_widened" in weight.__dict__)
        monkeypatch.setattr("svdbank.solver.gates.RESIDUAL_LIMIT", 1e-10)
        return lq(weight, rank, principal)

    monkeypatch.setitem(solve.SOLVERS, "lq", watching)
    assert minor_basis(llm_like(40, 60), 4, solver="dense").certificate.path == "lq"
    assert alive == [False]


def test_other_runtime_errors_are_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(weight: Weight, rank: int, principal: int) -> Candidate:
        raise RuntimeError("a defect of ours")

    monkeypatch.setitem(solve.SOLVERS, "dense", broken)
    with pytest.raises(RuntimeError, match="a defect of ours"):
        minor_basis(llm_like(20, 30), 2, solver="dense")


def test_a_driver_that_does_not_converge_is_got_round_and_recorded(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    svd = torch.linalg.svd
    failures = iter([contract.LinAlgError("did not converge")])

    def flaky(matrix: Tensor, **options: object) -> tuple[Tensor, Tensor, Tensor]:
        for failure in failures:
            raise failure
        return svd(matrix, **options)

    monkeypatch.setattr(dense_paths.torch.linalg, "svd", flaky)
    weight = llm_like(40, 60).to(device)
    basis = minor_basis(weight, 4, solver="lq")
    monkeypatch.undo()
    assert basis.certificate.path == "lq"
    assert basis.certificate.tried == ("lq: svd driver: did not converge; solved the transpose",)
    assert_certified(weight, basis, 4)


def test_an_eigensolver_that_fails_hands_over_to_lq(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(matrix: Tensor) -> Tensor:
        raise contract.LinAlgError("linalg.eigh: did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    basis = minor_basis(llm_like(40, 60), 4, solver="dense", device=device)
    assert basis.certificate.path == "lq"
    assert basis.certificate.tried == ("dense: linalg.eigh: did not converge",)


def test_lapack_is_not_called_beyond_its_32_bit_workspaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("svdbank.solver.dense.LAPACK_LIMIT", 1000)
    monkeypatch.setattr("svdbank.solver.dense.LAPACK_LIMIT", 1000)
    with pytest.raises(SolverError, match=r"32-bit workspace for syevd.*32-bit workspace for gesdd"):
        minor_basis(llm_like(40, 60), 4, solver="dense")


def test_the_limits_are_those_of_lapack() -> None:
    # syevd: 2 k² + 6 k + 1; gesdd: 4 k² + 7 k; both must fit a signed 32-bit integer.
    assert 2 * 32766**2 + 6 * 32766 + 1 <= contract.LAPACK_LIMIT < 2 * 32767**2 + 6 * 32767 + 1
    assert 4 * 23169**2 + 7 * 23169 <= contract.LAPACK_LIMIT < 4 * 23170**2 + 7 * 23170


@pytest.mark.parametrize("shape", [(300, 300), (300, 900), (900, 300)])
def test_a_float32_factor_gives_the_same_basis_certified_in_float64(shape: tuple[int, int], device: str) -> None:
    weight = llm_like(*shape).to(device)
    basis = minor_basis(weight, 16, solver="shift-invert", precision=Precision(factor=torch.float32))
    assert basis.certificate.residual <= 1e-12
    if shape != (300, 300):  # κ² of the square one exceeds what float32 can factorise: it is handed over
        assert basis.certificate.path == "shift-invert"
        assert basis.certificate.dtype == "float32"
    assert_certified(weight, basis, 16)


def test_a_float32_gram_matrix_is_not_good_enough_and_the_gates_say_so(device: str) -> None:
    weight = llm_like(300, 900).to(device)
    basis = minor_basis(weight, 16, solver="dense", precision=Precision(gram=torch.float32))
    assert basis.certificate.path == "lq"
    assert basis.certificate.tried[0].startswith("dense: ")
    assert_certified(weight, basis, 16)


@pytest.mark.parametrize("size", [1, 5, 255, 256, 257, 700])
def test_blocked_cholesky_is_cholesky(size: int, device: str) -> None:
    half = torch.randn(size, size + 20, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).to(device)
    gram = half @ half.mT
    found = factor(gram, torch.float64)
    assert found is not None
    # Backward error of Cholesky: a small multiple of k ε.
    lower = found.both.tril()
    assert (lower @ lower.mT - gram).abs().max() <= 1e-14 * size * gram.abs().max()
    spoiled = gram.clone()
    spoiled[-1, -1] = -1.0
    assert not factorise(spoiled)


def test_panels_change_nothing_but_rounding(device: str) -> None:
    matrix = llm_like(70, 5000).to(torch.bfloat16).to(device)
    whole, pieces = Weight(matrix), Weight(matrix, panel_entries=70 * 64)
    exact = matrix.double() @ matrix.double().mT
    # n ε relative to the largest entry bounds the order of summation.
    assert (whole.gram() - exact).abs().max() <= 1e-12 * exact.abs().max()
    assert (pieces.gram() - exact).abs().max() <= 1e-12 * exact.abs().max()
    assert torch.equal(pieces.gram(), pieces.gram().mT)


def test_the_path_is_a_rule_on_shape_and_rank() -> None:
    assert choose_path(576, 576, 128) == "dense"
    assert choose_path(14336, 4096, 128) == choose_path(4096, 14336, 128) == "shift-invert"
    assert choose_path(4096, 4096, 4096) == "dense"
    with pytest.raises(OptionError):
        choose_path(10, 20, 11)
    for estimate in (flops, lambda *shape: peak_bytes(*shape, dtype_bytes=2)):
        with pytest.raises(OptionError, match="no solver path"):
            estimate(10, 20, 3, "magic")


def test_costs_grow_with_every_argument() -> None:
    for path in PATHS:
        assert flops(2048, 4096, 64, path) < flops(2048, 8192, 64, path) < flops(4096, 8192, 64, path)
        assert flops(2048, 4096, 64, path) < flops(2048, 4096, 128, path)
        assert flops(2048, 4096, 64, path) == flops(4096, 2048, 64, path)
        assert peak_bytes(2048, 4096, 64, path, dtype_bytes=2) < peak_bytes(2048, 4096, 64, path, dtype_bytes=4)


def test_the_largest_weights_fit_8_gib_on_every_path_they_may_take() -> None:
    for shape in [(8192, 28672), (28672, 8192), (32768, 8192)]:
        for path in ("shift-invert", "lq"):
            assert peak_bytes(*shape, 128, path, dtype_bytes=2) <= 8 * 2**30


MEASURE = """
import resource, sys, torch
from svdbank.solver import minor_basis, peak_bytes, pinned_threads
rows, columns, rank, path = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
with pinned_threads(1):
    minor_basis(torch.randn(300, 400), 16)  # libraries and their buffers are not the solve's
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    weight = torch.empty(rows, columns, dtype=torch.bfloat16)
    for start in range(0, rows, 512):
        weight[start : start + 512] = torch.randn(min(512, rows - start), columns)
    basis = minor_basis(weight, rank, solver=path)
assert basis.certificate.path == path, basis.certificate.tried
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
print(peak, peak_bytes(rows, columns, rank, path, dtype_bytes=2))
"""


def assert_bound_kept(rows: int, columns: int, rank: int, path: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(rows), str(columns), str(rank), path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    peak, bound = map(int, done.stdout.split())
    # 64 MiB: MKL's packing buffers, which grow once with the largest product.
    assert peak <= bound + 64 * 2**20, f"{peak / 2**20:.0f} MiB against a stated {bound / 2**20:.0f}"


@pytest.mark.parametrize("path", PATHS)
def test_the_stated_memory_bound_is_kept(path: str) -> None:
    assert_bound_kept(768, 8192, 32, path)


@pytest.mark.soak
@pytest.mark.parametrize("shape", [(8192, 28672), (32768, 8192)])
def test_the_largest_weights_keep_the_bound(shape: tuple[int, int]) -> None:
    assert_bound_kept(*shape, 128, "shift-invert")
