"""The frozen plan: made once, whole, and of certain bytes, which whoever joins reads or stops."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import svdbank
from svdbank.bank.layout import MANIFEST, plan_name
from svdbank.building.fetching import files_of
from svdbank.building.freezing import frozen_plan
from svdbank.building.joining import joined
from svdbank.building.request import build_request
from svdbank.building.shards import shard_works
from svdbank.building.shares import cost, divided, parse_share
from svdbank.checkpoint import decomposable, open_checkpoint
from svdbank.core.specs import Progress, ignore_progress
from tests.building.small import tree, write_small_checkpoint
from tests.building.test_streaming import Builder, content
from tests.building.test_workers import RANK, request
from tests.checkpoint.hub_server import LocalHub


@pytest.fixture
def model(tmp_path: Path, minilm: Path) -> Path:
    return write_small_checkpoint(tmp_path / "model", minilm, layers=4)


def stop_after(count: int) -> Any:
    def progress(progress: Progress) -> None:
        if progress.stage == "decompose" and progress.done >= count:
            raise KeyboardInterrupt

    return progress


def begin(model: Path | str, bank: Path, *, after: int = 2) -> None:
    with pytest.raises(KeyboardInterrupt):
        svdbank.build(model, bank, rank=RANK, jobs=1, device="cpu", progress=stop_after(after))
    assert not (bank / MANIFEST).exists()


def of_other_values(model: Path, folder: Path) -> Path:
    """The same names, shapes and configuration."""
    shutil.copytree(model, folder)
    values = load_file(model / "model.safetensors")
    save_file({name: value + 1 for name, value in values.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    assert (folder / "model.safetensors").stat().st_size == (model / "model.safetensors").stat().st_size
    return folder


@pytest.mark.parametrize("done", [0, 2])
def test_a_second_checkpoint_of_the_same_shapes_is_refused_before_work(done: int, model: Path, tmp_path: Path) -> None:
    bank, other = tmp_path / "bank", of_other_values(model, tmp_path / "other")
    begin(model, bank, after=done)
    before = tree(bank)
    for options in ({}, {"shard": "1/2"}):
        with pytest.raises(svdbank.WrongBaseError):
            svdbank.build(other, bank, rank=RANK, **options)
        assert tree(bank) == before
    svdbank.build(model, bank, rank=RANK)
    assert svdbank.verify(bank, model=model).sound


def test_a_copy_that_kept_its_times_goes_on_and_one_that_did_not_joins_nobody(model: Path, tmp_path: Path) -> None:
    bank = tmp_path / "bank"
    kept = tmp_path / "kept"
    shutil.copytree(model, kept, copy_function=shutil.copy2)
    touched = Path(shutil.copytree(model, tmp_path / "touched"))
    os.utime(touched / "model.safetensors", (1, 1))
    begin(model, bank)
    with alive(model, bank), pytest.raises(svdbank.WrongBaseError, match=r"model\.safetensors is not the one of model"):
        svdbank.build(touched, bank, rank=RANK, shard="2/2")
    reports: list[Any] = []
    svdbank.build(kept, bank, rank=RANK, shard="2/2", on_report=reports.append)
    assert reports[0].reused >= 2 and svdbank.verify(bank, model=model).sound


def test_alone_files_whose_times_changed_go_on_where_what_is_recorded_is_of_their_bytes(model: Path, tmp_path: Path) -> None:
    bank = tmp_path / "bank"
    begin(model, bank)
    os.utime(model / "model.safetensors", (1, 1))
    reports: list[Any] = []
    svdbank.build(model, bank, rank=RANK, on_report=reports.append)
    assert reports[0].reused >= 2 and svdbank.verify(bank, model=model).sound


class alive:  # noqa: N801 - reads as a word
    """A worker that is at the bank for the length of the block, and does nothing."""

    def __init__(self, model: Path, bank: Path) -> None:
        self.joined = joined(request(model, bank), device="cpu", join=True, on_cpu=True, progress=ignore_progress)

    def __enter__(self) -> Any:
        return self.joined.__enter__()

    def __exit__(self, *error: Any) -> Any:
        return self.joined.__exit__(*error)


def test_who_joins_reads_no_header_and_makes_nothing(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = tmp_path / "bank"
    with alive(model, bank) as first:
        before = {path: path.stat().st_mtime_ns for path in bank.rglob("zarr.json")}
        monkeypatch.setattr("svdbank.checkpoint.source.parse_header", None)
        monkeypatch.setattr("svdbank.bank.writing.BankWriter.begin", None)
        monkeypatch.setattr("svdbank.bank.writing.BankWriter.whole", None)
        with alive(model, bank) as second:
            assert second.prepared.session == first.prepared.session
            assert second.prepared.weights == first.prepared.weights
            assert second.checkpoint.planned and not second.checkpoint.tensors
        assert {path: path.stat().st_mtime_ns for path in bank.rglob("zarr.json")} == before


def _prepare(model: str, bank: str, barrier: Any, found: Any) -> None:
    barrier.wait()
    with joined(request(Path(model), Path(bank)), device="cpu", join=True, on_cpu=True, progress=ignore_progress) as here:
        found.put((here.prepared.session.name, here.prepared.plan.sources))
        barrier.wait()


def test_two_that_begin_at_once_have_one_plan_and_one_session(model: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, found = context.Barrier(2), context.Queue()
    workers = [context.Process(target=_prepare, args=(str(model), str(tmp_path / "bank"), barrier, found)) for _ in range(2)]
    for worker in workers:
        worker.start()
    seen = [found.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert seen[0] == seen[1]


@pytest.fixture(scope="module")
def hub() -> Iterator[LocalHub]:
    with LocalHub() as server:
        yield server


@pytest.mark.parametrize("fetch", ["ranges", "shards"])
def test_a_branch_that_moved_is_read_at_the_commit_of_the_plan(fetch: str, hub: LocalHub, model: Path, tmp_path: Path) -> None:
    """Of two processes the second comes after the branch has moved; without that, the bank is the one of the first commit alone."""
    repo, bank = f"org/moving-{fetch}", tmp_path / "bank"
    hub.commit(repo, {path.name: path.read_bytes() for path in model.iterdir()})
    svdbank.build(model, tmp_path / "expected", rank=8)
    stopped = Builder(hub, tmp_path)
    program = f"""
import svdbank
def progress(progress):
    if progress.stage == "decompose" and progress.done >= 2:
        raise KeyboardInterrupt
try:
    svdbank.build({repo!r}, {str(bank)!r}, rank=8, jobs=1, fetch={fetch!r}, progress=progress)
except KeyboardInterrupt:
    pass
"""
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=120)
    assert len(frozen_weights(bank)) == 4 and not (bank / MANIFEST).exists()
    other = of_other_values(model, tmp_path / "other")
    hub.commit(repo, {path.name: path.read_bytes() for path in other.iterdir()})
    report = stopped("build", repo, bank, fetch=fetch, shard="1/2")
    assert "error" not in report, report
    assert report["reused"] >= 2 and report["solved"] >= 1
    assert content(bank) == content(tmp_path / "expected")
    named = stopped("build", f"{repo}@{'0' * 40}", tmp_path / "none", fetch=fetch)
    assert named["kind"] == "CheckpointError"
    stopped.close()


def frozen_weights(bank: Path) -> list[str]:
    frozen = frozen_plan(bank)
    assert frozen is not None and frozen.sources is not None
    assert json.loads((bank / plan_name(0)).read_text())["sources"] in {path.name for path in bank.iterdir()}
    return [weight.name for weight in frozen.sources.weights]


SLURM = {"SLURM_ARRAY_TASK_ID": "13", "SLURM_ARRAY_TASK_MIN": "10", "SLURM_ARRAY_TASK_MAX": "19", "SLURM_ARRAY_TASK_STEP": "3"}


@pytest.mark.parametrize(
    ("text", "environment", "expected"),
    [
        ("2/3", {}, (1, 3, None)),
        ("auto", {**SLURM, "SLURM_ARRAY_TASK_COUNT": "4"}, (1, 4, None)),
        ("auto/8", {**SLURM, "SLURM_ARRAY_TASK_COUNT": "4"}, (1, 8, None)),
        ("auto/3", {**SLURM, "SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "3"}, (1, 3, None)),
        ("auto/4", {"JOB_COMPLETION_INDEX": "0"}, (0, 4, None)),
        ("auto", {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, (5, 8, "cuda:1")),
    ],
)
def test_a_launcher_says_which_worker_this_is(text: str, environment: dict[str, str], expected: tuple[Any, ...]) -> None:
    share = parse_share(text, environment)
    assert (share.index, share.count, share.device) == expected


@pytest.mark.parametrize(
    ("text", "environment", "said"),
    [
        ("auto", {}, "nothing here says which worker this is"),
        ("auto", {"JOB_COMPLETION_INDEX": "0"}, "not of how many"),
        ("auto", {**SLURM, "SLURM_ARRAY_TASK_COUNT": "3"}, "are a list"),
        ("auto/2", {"JOB_COMPLETION_INDEX": "2"}, "worker 2 .from 0. of 2"),
        ("0/2", {}, "1/2 to 2/2"),
        ("1", {}, "I/N, auto or auto/N"),
        ("auto", {"RANK": "x", "WORLD_SIZE": "2"}, "not a number"),
    ],
)
def test_what_no_launcher_says_is_an_error(text: str, environment: dict[str, str], said: str) -> None:
    with pytest.raises(svdbank.OptionError, match=said):
        parse_share(text, environment)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shares_are_disjoint_whole_and_of_like_cost(count: int, minilm: Path, tmp_path: Path) -> None:
    with open_checkpoint(minilm) as checkpoint:
        plan = svdbank.plan(minilm, tmp_path / "bank").plan
        weights = {weight.name: weight for weight in decomposable(checkpoint)[0]}
        works = shard_works(plan, weights, plan.shards)
        places = {file.name: number for number, file in enumerate(checkpoint.files)}
    parts = divided(works, count, places, by_file=False)
    assert len(parts) == count
    assert {one.shard for part in parts for one in part} == {*plan.shards}
    assert sum(map(len, parts)) == len(plan.shards)
    costs = [sum(map(cost, part)) for part in parts]
    assert max(costs) - min(costs) <= 2 * max(map(cost, works))
    sources = [[weight.sources[0] for one in part for weight in one.weights] for part in parts]
    spans = [(min(source.begin for source in part), max(source.end for source in part)) for part in sources]
    assert all(one[1] <= other[0] for one, other in itertools.pairwise(spans)), "each a run of bytes of its own"
    assert {name for part in parts for one in part for weight in one.weights for name in files_of(weight)} == {*places}


def test_more_threads_than_processors_are_refused(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVDBANK_THREADS", "2")
    with pytest.raises(svdbank.OptionError, match="may use 2 processors"):
        svdbank.build(model, tmp_path / "bank", threads=3)
    wide = write_wide(tmp_path / "wide")
    with pytest.raises(KeyboardInterrupt):
        svdbank.build(wide, tmp_path / "bank", rank=2, threads=2, solver="dense", progress=stop_after(0))
    frozen = frozen_plan(tmp_path / "bank")
    assert frozen is not None and {shard.threads for shard in frozen.plan.shards} == {2}
    monkeypatch.setenv("SVDBANK_THREADS", "1")
    for options in ({}, {"shard": "2/2"}):
        with pytest.raises(svdbank.OptionError, match="the plan solves with 2 threads, and this worker has 1"):
            svdbank.build(wide, tmp_path / "bank", rank=2, solver="dense", **options)


def write_wide(folder: Path) -> Path:
    import torch

    folder.mkdir()
    weight = torch.randn(1030, 1030, generator=torch.Generator().manual_seed(0))
    save_file({"model.layers.0.self_attn.q_proj.weight": weight}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


def test_requests_say_how_many_processors_a_worker_takes(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVDBANK_THREADS", "8")
    assert request(model, tmp_path / "bank").threads == 8
    assert build_request(model, None, rank=2, device="cpu", workers=4).threads == 2
    assert build_request(model, None, rank=2, device="cpu,cpu").threads == 4
