"""Workers that Ray starts make the bank of one process; what cannot be is refused in words, before the work."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import svdbank
from svdbank.building.bundles import SECONDS, Bundles
from svdbank.building.joining import Workplace, joined
from svdbank.building.posting import OWN_RANGES, PostedWorker, Posting, look
from svdbank.building.request import build_request
from svdbank.building.shards import ShardWork, shard_works
from svdbank.core.specs import ignore_progress
from tests.building.on_ray import own_network, started
from tests.building.small import tree, write_small_checkpoint

LAYERS = 24


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, minilm: Path) -> Path:
    return write_small_checkpoint(tmp_path_factory.mktemp("small") / "model", minilm, layers=LAYERS, out=64, width=96)


@pytest.mark.soak  # Ray gives its own processes 30 seconds to start, whatever else a machine has to do
def test_workers_on_ray_make_the_bank_of_one(model: Path, memory_disk: Path) -> None:
    svdbank.build(model, memory_disk / "alone", rank=18, threads=1, jobs=1)
    with own_network(), started(model, memory_disk / "bank", "--workers", "2", "--ray") as process:
        out, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    lines = [json.loads(line) for line in out.splitlines()]  # Ray says nothing in between
    report = lines.pop()
    assert (report["solved"], report["reused"], report["device"]) == (LAYERS, 0, "cpu (Ray)")
    steps = [line for line in lines if line["stage"] == "decompose"]
    assert [step["done"] for step in steps] == sorted(step["done"] for step in steps)
    assert steps[-1]["done"] == LAYERS and max(step["workers"] for step in steps) in (1, 2)
    assert tree(memory_disk / "bank") == tree(memory_disk / "alone")


@pytest.fixture
def here(model: Path, tmp_path: Path) -> Iterator[Workplace]:
    """A driver at a build that it has begun."""
    request = build_request(model, tmp_path / "bank", rank=18, threads=1, device="cpu")
    with joined(request, device="driver", join=True, on_cpu=False, progress=ignore_progress) as place:
        yield place


def posting(here: Workplace, model: Path, bank: Path) -> Posting:
    assert here.prepared.session is not None and here.lease is not None
    request = build_request(model, bank, rank=18, threads=1, device="cpu")
    return Posting(request, here.prepared.session.name, here.lease.name)


def test_a_machine_must_see_the_folder_of_the_build_and_the_model(
    here: Workplace, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("svdbank.building.visit._SEEN_WITHIN", 0.0)
    bank = tmp_path / "bank"
    look(posting(here, model, bank))
    with pytest.raises(svdbank.BankError, match="is not here"):
        look(posting(here, model, tmp_path / "elsewhere"))
    assert not (tmp_path / "elsewhere").exists()
    shutil.copytree(bank, tmp_path / "copy")
    for path in (tmp_path / "copy").rglob(here.lease.name if here.lease else ""):
        path.unlink()
    with pytest.raises(svdbank.BankError, match="is another folder here"):
        look(posting(here, model, tmp_path / "copy"))
    with pytest.raises(svdbank.CheckpointError, match="is not here"):
        look(posting(here, tmp_path / "nowhere", bank))
    other = shutil.copytree(model, tmp_path / "other", copy_function=shutil.copyfile)  # the same values, at another time
    with pytest.raises(svdbank.WrongBaseError, match=r"model\.safetensors"):
        look(posting(here, other, bank))
    said = PostedWorker(posting(here, model, tmp_path / "elsewhere"), "cpu").join()
    assert said.error == "BankError" and "is not here" in said.message


def test_a_worker_does_what_it_is_given_and_leaves(here: Workplace, model: Path, tmp_path: Path) -> None:
    session = here.prepared.session
    assert session is not None
    worker = PostedWorker(posting(here, model, tmp_path / "bank"), "cpu")
    keys = [(shard.family, shard.index) for shard in here.prepared.plan.shards]
    assert worker.join().error is None
    assert [worker.work(keys[:3]).solved, worker.work(keys[:5]).solved, worker.work(keys[:5]).solved] == [3, 2, 0]
    assert session.recorded(here.prepared.plan) == set(keys[:5])
    assert [step.item for step in worker.talk(False) if step.item] and worker.talk(True) == []
    assert worker.work(keys).solved == 0, "it was told to stop"
    worker.leave()
    assert session.recorded(here.prepared.plan) == set(keys[:5]) and not session.claimed(here.prepared.plan)


def works(here: Workplace) -> list[ShardWork]:
    return shard_works(here.prepared.plan, here.prepared.weights, here.prepared.plan.shards)


def test_bundles_take_seconds_and_their_last_ones_less(here: Workplace) -> None:
    all_works = works(here) * 50
    bundles = Bundles(all_works, {"model.safetensors": 0})
    first = bundles.next(2)
    bundles.took(first, len(first) * 0.1)  # a tenth of a second each
    sizes = []
    while bundle := bundles.next(2):
        sizes.append(len(bundle))
    assert len(first) + sum(sizes) == len(all_works)
    assert max(sizes) == int(SECONDS / 0.1) and sizes[-1] == 1 and sizes == sorted(sizes, reverse=True)


def test_bundles_begin_with_what_is_largest_and_leave_out_what_is_done(here: Workplace, minilm: Path, tmp_path: Path) -> None:
    large = write_small_checkpoint(tmp_path / "large", minilm, layers=2, out=200, width=300)
    request = build_request(large, tmp_path / "large.bank", rank=18, threads=1, device="cpu", fetch=OWN_RANGES.fetch)
    with joined(request, device="driver", join=True, on_cpu=False, progress=ignore_progress) as other:
        mixed = works(here)[:5] + works(other) + works(here)[5:]
        bundles = Bundles(mixed, {"model.safetensors": 0}, least=lambda _: 2)
        assert list(bundles.next(1000)) == works(other)
        again = bundles.next(1000)
        bundles.back(again)
        assert bundles.next(1000) == again and len(again) == 2
        assert bundles.next(1, lambda work: False) == () and bundles.next(1) == ()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ray": "ray://head:10001"}, "address of Ray's client"),
        ({"ray": "./model"}, "takes local, auto or HOST:PORT"),
        ({"ray": "local", "shard": "1/2"}, "leave --shard out|share the work by themselves"),
        ({"ray": "local", "device": "cpu,cpu"}, "Ray hands the GPUs out"),
        ({"ray": "local", "device": "cuda"}, "no machine of this Ray cluster has a GPU"),
        ({"ray": "local", "fetch": "shards"}, "byte ranges of their own weights"),
        ({"ray": "local", "threads": 1023}, "no machine of this Ray cluster has 1023 processors"),
    ],
)
def test_what_cannot_be_on_ray_is_refused_before_ray_starts(
    options: dict[str, Any], said: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(svdbank.OptionError, match=said):
        svdbank.build(model, tmp_path / "bank", rank=18, **options)
    assert not (tmp_path / "bank" / "manifest.json").exists()


def test_without_ray_the_error_says_how_to_install_it(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(svdbank.MissingExtraError) as caught:
        svdbank.build(model, tmp_path / "bank", ray="local")
    assert caught.value.hint == "pip install 'svdbank[ray]'" and not (tmp_path / "bank").exists()
