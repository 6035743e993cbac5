"""The simulated schedule: small ones by hand, what holds of every one, and the rates that it is fed with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

import svdbank
from svdbank.building.costs import ShardCost, publish_seconds
from svdbank.building.rates import PublishRate, Rates, SolveRate, read_rates, refuse_other_file, solve_seconds, write_rates
from svdbank.building.scaling import COUNTS
from svdbank.building.shards import shard_works
from svdbank.building.simulation import Build, Played, Staff, play
from svdbank.checkpoint.source import Checkpoint
from svdbank.core.errors import OptionError
from svdbank.core.specs import (
    BaseSpec,
    BuildOptions,
    DevicePath,
    FamilySpec,
    Plan,
    ShardSpec,
    SourceFile,
    TensorSource,
    WeightSpec,
)
from svdbank.solver.planning import choose_path, flops
from svdbank_cli.main import run
from tests.building.small import write_small_checkpoint
from tests.structure.source import ROOT

#: What was measured beside the solver counts nothing, so that schedules can be worked out by hand.
RATES = Rates(
    format=1,
    kind="cpu",
    device="a machine of two processors",
    measured=True,
    date="2026-11-28T00:00:00Z",
    versions={},
    notes=("made for a test",),
    processors=2,
    at_once=2,
    slowdown=1.0,
    solves=(SolveRate(24, 40, rank=18, path="dense", threads=1, batch=1, seconds=1.0),),
    read=1e9,
    hash=1e9,
    disk=None,
    upload=None,
    write=1e9,
    shard=0.0,
    weight=0.0,
    busy=1.0,
    publish=PublishRate(once=1.0, family=0.5, shard=0.25, weight=0.125),
    start=2.0,
)


def build_of(solves: Sequence[float], *, read: float = 0.0, write: float = 0.0, threads: Sequence[int] = ()) -> Build:
    """Weights that take these seconds each, one a shard, in one file, of a family each (what shares are balanced by is flops)."""
    families, shards, weights, costs = [], [], {}, {}
    for number, solve in enumerate(solves):
        name, side = f"w{number:03}", 64
        source = TensorSource(name, "model.safetensors", "F32", (side, side), 1000 * number, 1000 * number + 4 * side * side)
        weights[name] = WeightSpec(name, name, "linear", name, side, side, "F32", (source,))
        families.append(FamilySpec(name, "linear", side, side, 8, 0, 1, (name,)))
        shards.append(ShardSpec(name, 0, 0, 1, "dense", threads[number] if threads else 1))
        costs[name, 0] = ShardCost(1, 100 + number, 4 * side * side, read, 0.0, 0.0, 0.0, solve, write, 0.0)
    plan = Plan(
        format=1,
        base=BaseSpec("model", None, "0"),
        options=BuildOptions(8, "both", "float32", "auto", 0),
        families=tuple(families),
        shards=tuple(shards),
        skips=(),
        devices={"cuda": {family.name: DevicePath("dense", 1) for family in families}},
    )
    files = (SourceFile("model.safetensors", 1 << 20, "0"),)
    checkpoint = Checkpoint("model", None, Path(), {}, {}, files, "0", "0", {})
    works = shard_works(plan, weights, plan.shards)
    return Build(plan, works, costs, checkpoint, {"model.safetensors": 0}, by_file=False, remote=False)


def played(build: Build, workers: int = 1, *, jobs: int = 1, machine: int = 1, **changed: Any) -> Played:
    return play(build, Staff(workers, 1, jobs, machine), msgspec.structs.replace(RATES, **changed))


def test_one_worker_takes_the_sum_of_what_does_not_overlap() -> None:
    # Reads lie behind solves, but for the first.
    assert played(build_of([3, 4, 5], read=1, write=0.5)).seconds == pytest.approx(1 + 3 + 4 + 5 + 3 * 0.5)
    # Solves lie behind reads, but for the last.
    assert played(build_of([1, 1, 1], read=4)).seconds == pytest.approx(3 * 4 + 1)
    assert played(build_of([1, 1, 1], read=4)).nbytes == (100 + 101 + 102,)


def test_jobs_solve_beside_each_other_and_large_weights_alone() -> None:
    assert played(build_of([2, 2, 2, 2]), jobs=2).seconds == pytest.approx(4)
    # One thread count at a time: the last of one thread ends before the first of two threads begins.
    assert played(build_of([3, 1, 2, 2], threads=(1, 1, 2, 2)), jobs=2).seconds == pytest.approx(3 + 2 + 2)


def test_solves_beside_each_other_are_slowed_as_measured() -> None:
    assert played(build_of([2, 2]), jobs=2, slowdown=1.25).seconds == pytest.approx(2 * 1.25)
    # Two workers on one machine share its processors, on two machines they do not.
    assert played(build_of([2, 2]), 2, machine=2, slowdown=1.25).seconds == pytest.approx(2 * 1.25)
    assert played(build_of([2, 2]), 2, machine=1, slowdown=1.25).seconds == pytest.approx(2)
    # More threads than processors: a reader beside two solves.
    assert played(build_of([2, 2, 2], read=2), jobs=2).seconds == pytest.approx(2 + 2 + 2 + 2 + 1e-9, abs=1.0)


def test_whoever_is_done_helps_from_the_end_of_the_other_s_share() -> None:
    # Shares are by flops, which are equal here: four weights each. The first is at its own for 40 s, the other takes 4 s for its
    # own and then the first's from the end, but for what the first has claimed: it solves one, holds one that is read and one more.
    two = played(build_of([10, 10, 10, 10, 1, 1, 1, 1]), 2)
    assert two.seconds == pytest.approx(30)
    assert two.nbytes == (100 + 101 + 102, 104 + 105 + 106 + 107 + 103)


def test_a_weight_that_outlasts_all_others_bounds_the_schedule() -> None:
    skewed = build_of([50, *[1] * 20])
    for workers in (2, 3, 7, 21, 64):
        assert 50 <= played(skewed, workers).seconds <= 50 + 2  # what it had claimed and read ahead comes after it


@pytest.mark.parametrize("solves", [[1] * 64, [1 + number % 7 for number in range(100)], [2**-number for number in range(40)]])
def test_what_holds_of_every_schedule(solves: list[float]) -> None:
    build = build_of(solves, read=0.01, write=0.05)
    alone, total = played(build).seconds, sum(range(100, 100 + len(solves)))
    for workers in COUNTS:
        found = played(build, workers)
        # No faster than perfect sharing or the longest alone, no slower than one (by what each holds claimed at the end).
        assert max(alone / workers - 0.02, max(solves)) <= found.seconds <= alone + 1e-9
        assert len(found.nbytes) == workers and sum(found.nbytes) == total


def test_a_device_solves_three_at_a_time_and_writes_behind_them() -> None:
    gpu = {"kind": "cuda", "processors": 16, "at_once": 3, "slowdown": 2.4, "upload": 1e12}
    # Three beside each other take 2.4 times as long each; the seventh is alone at the end.
    assert played(build_of([1] * 6), **gpu).seconds == pytest.approx(2 * 2.4)
    assert played(build_of([1] * 7), **gpu).seconds == pytest.approx(2 * 2.4 + 1)
    # Eight batches are solved or written at a time, so that writing takes an eighth of its seconds.
    assert played(build_of([0] * 80, write=8), **gpu).seconds == pytest.approx(80, rel=0.15)


def test_a_publish_is_paid_once_and_by_family_shard_and_weight() -> None:
    assert publish_seconds(build_of([1, 2, 3]).plan, RATES) == 1.0 + 3 * 0.5 + 3 * 0.25 + 3 * 0.125


def solve(
    out_features: int, in_features: int, seconds: float, *, rank: int = 128, threads: int = 1, batch: int = 1
) -> SolveRate:
    path = choose_path(out_features, in_features, rank)
    return SolveRate(out_features, in_features, rank, path, threads, batch, seconds)


def test_what_was_measured_is_taken_as_it_is_and_everything_else_is_marked() -> None:
    known = msgspec.structs.replace(RATES, solves=(solve(576, 576, 0.07), solve(576, 1536, 0.08), solve(1024, 4096, 0.5)))

    def estimate(out_features: int, in_features: int, *, rank: int = 128, path: str = "dense", threads: int = 1) -> Any:
        return solve_seconds(known, out_features, in_features, rank, path=path, threads=threads, batch=1)

    assert msgspec.structs.astuple(estimate(576, 1536)) == (pytest.approx(0.08), "measured")
    between = estimate(768, 2048)
    assert between.basis == "interpolated" and 0.08 < between.seconds < 0.5
    for other in (
        estimate(192, 576),
        estimate(1200, 4096),
        estimate(576, 1536, rank=16),
        estimate(576, 1536, path="lq"),
        estimate(576, 1536, threads=2),
    ):
        assert other.basis == "extrapolated"


def test_what_grows_as_flops_is_met_between_and_beyond() -> None:
    shapes = [(256, 256), (256, 1024), (1024, 1024), (1024, 4096), (4096, 1024)]
    exact = tuple(solve(*shape, flops(*shape, 128, "dense") / 3e9) for shape in shapes)
    known = msgspec.structs.replace(RATES, solves=exact)
    for shape in [(300, 300), (512, 2048), (2048, 512), (1100, 1200), (128, 4096)]:
        found = solve_seconds(known, *shape, 128, path="dense", threads=1, batch=1)
        assert found.seconds == pytest.approx(flops(*shape, 128, "dense") / 3e9)


def test_threads_between_lie_between_in_logarithms() -> None:
    known = msgspec.structs.replace(RATES, solves=(solve(2048, 2048, 4.0), solve(2048, 2048, 1.0, threads=16)))
    found = solve_seconds(known, 2048, 2048, 128, path="shift-invert", threads=4, batch=1)
    assert found.seconds == pytest.approx(2.0) and found.basis == "interpolated"


def test_a_batch_of_a_shape_unlike_those_measured_takes_what_each_takes_alone() -> None:
    one, many = (
        solve(4096, 4096, 0.03),
        msgspec.structs.replace(solve(4096, 4096, 0.01), out_features=768, in_features=2048, batch=64),
    )
    known = msgspec.structs.replace(RATES, kind="cuda", solves=(one, many))
    assert solve_seconds(known, 768, 2048, 128, path=one.path, threads=1, batch=32).basis == "measured"
    alone = solve_seconds(known, 4096, 4096, 128, path=one.path, threads=1, batch=16)
    assert alone.seconds == pytest.approx(0.03) and alone.basis == "interpolated"


DAMAGED = {
    "not JSON": b"{",
    "of something else": json.dumps({"format": 1, "kind": "cpu"}).encode(),
    "of a later format": msgspec.json.encode({**msgspec.to_builtins(RATES), "format": 2}),
    "with an unknown field": msgspec.json.encode({**msgspec.to_builtins(RATES), "colour": 1}),
    "without a solve": msgspec.json.encode({**msgspec.to_builtins(RATES), "solves": []}),
    "faster than light": msgspec.json.encode({**msgspec.to_builtins(RATES), "hash": 0}),
    "from tomorrow": msgspec.json.encode({**msgspec.to_builtins(RATES), "start": -1.0}),
    "of an unknown path": msgspec.json.encode(RATES).replace(b'"dense"', b'"guess"'),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_file_that_is_no_rates_is_refused_and_not_written_over(what: str, tmp_path: Path) -> None:
    file = tmp_path / "rates.json"
    file.write_bytes(DAMAGED[what])
    with pytest.raises(OptionError, match=r"rates\.json") as refused:
        read_rates(file)
    assert "env --rates" in str(refused.value.hint)
    with pytest.raises(OptionError, match="not overwritten"):
        refuse_other_file(file)


def test_rates_come_back_as_they_were_written(tmp_path: Path) -> None:
    file = tmp_path / "rates.json"
    refuse_other_file(file)
    write_rates(file, RATES)
    assert read_rates(file) == RATES
    refuse_other_file(file)
    with pytest.raises(OptionError, match="cannot be read"):
        read_rates(tmp_path / "none.json")
    with pytest.raises(OptionError, match="no folder"):
        refuse_other_file(tmp_path / "none" / "rates.json")


@pytest.mark.parametrize("file", sorted((ROOT / "docs" / "rates").glob("*.json")), ids=lambda file: file.name)
def test_the_rates_in_the_docs_can_be_read_and_say_where_they_are_from(file: Path) -> None:
    rates = read_rates(file)
    assert all(one.source for one in rates.solves) or (rates.versions["svdbank"] and not rates.notes)


@pytest.fixture
def model(minilm: Path, tmp_path: Path) -> Path:
    return write_small_checkpoint(tmp_path / "model", minilm, layers=12)


def test_plan_shows_the_schedule(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rates(tmp_path / "rates.json", RATES)
    arguments = ["plan", str(model), "-o", str(tmp_path / "bank"), "--rank", "18", "--workers", "3", "--threads", "1"]
    arguments += ["--device-rate", str(tmp_path / "rates.json")]
    assert run([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["schedule"]
    assert [row["workers"] for row in found["table"]] == list(COUNTS)
    one, asked = found["table"][0], found["asked"]
    assert one["work"] == pytest.approx(12, rel=1e-3) and one["publish"] == 1 + 0.5 + 12 * 0.375
    assert one["seconds"] == pytest.approx(2 + one["work"] + one["publish"], rel=1e-4) and one["efficiency"] == 1
    assert asked["workers"] == 3 and asked["work"] == pytest.approx(4, rel=1e-2)
    assert asked["device_hours"] == pytest.approx(3 * asked["seconds"] / 3600, rel=1e-2)
    assert found["solves"] == [{"family": found["solves"][0]["family"], "seconds": pytest.approx(1.0), "basis": "measured"}]
    assert run(arguments) == 0
    shown = capsys.readouterr().out
    assert "device-hours" in shown and "1 measured" in shown and "made for a test" in shown and "3 workers" in shown
    assert not (tmp_path / "bank").exists()


def test_what_cannot_be_meant_is_refused(model: Path, tmp_path: Path) -> None:
    write_rates(tmp_path / "rates.json", RATES)
    place = {"output": tmp_path / "bank", "device_rate": tmp_path / "rates.json"}
    with pytest.raises(OptionError, match=r"rates of a machine of two processors \(cpu\), not of cuda"):
        svdbank.plan(model, device="cuda", **place)
    with pytest.raises(OptionError, match="machine with 2 processors"):
        svdbank.plan(model, threads=3, **place)
    with pytest.raises(OptionError, match="workers"):
        svdbank.plan(model, workers=2000, **place)


def test_workers_share_the_processors_of_the_rates(model: Path, tmp_path: Path) -> None:
    rates = msgspec.structs.replace(RATES, processors=64, at_once=64)
    write_rates(tmp_path / "rates.json", rates)
    report = svdbank.plan(model, tmp_path / "bank", workers=4, device_rate=tmp_path / "rates.json")
    assert report.schedule is not None
    assert (report.schedule.threads, report.schedule.jobs, report.schedule.machine) == (16, 16, 4)


@pytest.mark.soak
def test_rates_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("svdbank.building.calibration._ON_CPU", ((96, 160, 16), (160, 96, 16), (256, 256, 32)))
    svdbank.env(rates=tmp_path / "rates.json", device="cpu")
    rates = read_rates(tmp_path / "rates.json")
    assert [(one.out_features, one.in_features, one.rank) for one in rates.solves] == [
        (96, 160, 16),
        (160, 96, 16),
        (256, 256, 32),
    ]
    # A worker loads torch, a record is durable, and no processor copies or hashes faster than memory.
    assert rates.start > 0.1 and rates.shard > 1e-5 and max(rates.read, rates.hash) < 1e12
    assert 1 <= rates.slowdown <= 2 * rates.processors and rates.versions["svdbank"] == svdbank.__version__
    assert [path.name for path in tmp_path.iterdir()] == ["rates.json"]
