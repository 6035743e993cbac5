"""Thread counts hold where they are pinned, and come back."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hard_matrices import llm_like
from threadpoolctl import threadpool_info

import svdbank.solver.batch as batch
from svdbank.core.errors import OptionError
from svdbank.solver import minor_bases, minor_basis, pinned_threads


def counts() -> set[int]:
    """What torch and every BLAS and OpenMP pool in the process would use, asked from this thread."""
    used = torch.get_num_threads()  # first: a fresh thread takes over the count at its first call
    pools = {pool["num_threads"] for pool in threadpool_info() if "torch" in pool["filepath"]}
    return {used, *pools}


@pytest.mark.parametrize("threads", [1, 2])
def test_the_count_holds_in_the_caller_and_in_threads_it_starts(threads: int) -> None:
    before = torch.get_num_threads()
    seen: list[set[int]] = []
    with pinned_threads(threads):
        seen.append(counts())
        worker = threading.Thread(target=lambda: seen.append(counts()))
        worker.start()
        worker.join()
    assert seen == [{threads}, {threads}]
    assert torch.get_num_threads() == before


def test_blocks_nest_and_errors_restore() -> None:
    before = torch.get_num_threads()
    with pinned_threads(1):
        with pytest.raises(RuntimeError), pinned_threads(2):
            assert torch.get_num_threads() == 2
            raise RuntimeError
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
    with pytest.raises(OptionError), pinned_threads(0):
        raise AssertionError("unreachable")


def test_a_worker_that_ends_early_gives_its_siblings_no_more_threads() -> None:
    inside, leave = threading.Barrier(2), threading.Event()
    seen: list[int] = []

    def early() -> None:
        with pinned_threads(1):
            inside.wait()

    def late() -> None:
        with pinned_threads(1):
            inside.wait()
            leave.wait()
            seen.append(torch.get_num_threads())

    before = torch.get_num_threads()
    workers = [threading.Thread(target=early), threading.Thread(target=late)]
    for worker in workers:
        worker.start()
    workers[0].join()
    leave.set()
    workers[1].join()
    assert seen == [1]
    with pinned_threads(before):
        assert torch.get_num_threads() == before


def test_every_solve_of_a_batch_runs_on_the_threads_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, set[int]]] = []

    def spy(*args: object, **options: object) -> object:
        seen.append((threading.current_thread().name, counts()))
        return minor_basis(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(batch, "minor_basis", spy)
    before = torch.get_num_threads()
    minor_bases([llm_like(30, 40, seed) for seed in range(6)], 4, jobs=2)
    assert len(seen) == 6
    assert all(name.startswith("svdbank-solver") and used == {1} for name, used in seen)
    assert torch.get_num_threads() == before


def test_calls_from_several_threads_do_not_disturb_each_other() -> None:
    weights = [llm_like(50, 60, seed) for seed in range(6)]
    with pinned_threads(1):
        alone = [minor_basis(weight, 5).minor.left for weight in weights]
        with ThreadPoolExecutor(3) as pool:
            together = list(pool.map(lambda weight: minor_basis(weight, 5).minor.left, weights))
    assert all(torch.equal(one, two) for one, two in zip(alone, together, strict=True))
