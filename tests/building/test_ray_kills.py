"""Real Ray on several simulated nodes: a worker, a node or the driver killed at random; nodes that come late, or see other folders."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import svdbank
from svdbank.bank.layout import MANIFEST
from svdbank.building.standing import UnfinishedInfo
from tests.building.on_ray import add_node, own_network, pids_at, simulated, started
from tests.building.small import tree, write_small_checkpoint
from tests.building.test_kills import records, solved
from tests.building.test_streaming import content
from tests.checkpoint.hub_server import LocalHub
from tests.structure.source import ROOT

pytestmark = pytest.mark.soak

RANK, LAYERS = 18, 120

#: Kills of the test below, in as many builds as they need.
KILLS = int(os.environ.get("SVDBANK_TEST_RAY_KILLS", "25"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, minilm: Path) -> Path:
    return write_small_checkpoint(tmp_path_factory.mktemp("small") / "model", minilm, layers=LAYERS, out=300, width=384)


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The bank of one process of one thread."""
    alone = tmp_path_factory.mktemp("alone") / "bank"
    svdbank.build(model, alone, rank=RANK, threads=1, jobs=1)
    return tree(alone)


def drained(process: subprocess.Popen[str]) -> list[str]:
    """What a build says, taken as it comes."""
    lines: list[str] = []
    assert process.stdout is not None
    threading.Thread(target=lambda: lines.extend(process.stdout or ()), daemon=True).start()
    return lines


def struck(cluster: Any, bank: Path, driver: subprocess.Popen[str], draw: random.Random) -> str | None:
    """SIGKILL of one worker, of one node with all that runs on it, or of the driver: which; None where it was gone already."""
    what = draw.choice(["an actor", "an actor", "a node", "the driver"])
    if what == "the driver":
        if driver.poll() is not None:
            return None
        driver.kill()
        driver.wait()
    elif what == "a node":
        cluster.remove_node(draw.choice(sorted(cluster.worker_nodes, key=lambda node: str(node.node_id))), allow_graceful=False)
        add_node(cluster)
    else:
        actors = sorted(pid for pid, device in pids_at(bank).items() if device == "cpu")
        with contextlib.suppress(ProcessLookupError):
            if actors:
                os.kill(draw.choice(actors), signal.SIGKILL)
                return what
        return None
    return what


def test_kills_at_random_cost_nothing_that_was_recorded(model: Path, expected: dict[str, bytes], memory_disk: Path) -> None:
    draw = random.Random(16)
    counted: Counter[str] = Counter()
    builds = late = 0
    with own_network(), simulated(1, 1) as cluster:

        def driver(bank: Path) -> subprocess.Popen[str]:
            process = started(model, bank, "--ray", cluster.address)
            drained(process)
            return process

        while counted.total() < KILLS:
            bank = memory_disk / f"bank{builds}"
            builds += 1
            running = driver(bank)
            kept: dict[str, bytes] = {}
            try:
                until = time.monotonic() + 1200
                while not (bank / MANIFEST).exists():
                    assert time.monotonic() < until, f"a build does not end; {dict(counted)}"
                    if running.poll() is not None:
                        assert running.returncode in (-signal.SIGKILL, 0), running.stderr and running.stderr.read()
                        running = driver(bank)
                    target = len(records(bank)) + draw.randrange(2, 20)
                    while len(records(bank)) < target and running.poll() is None and time.monotonic() < until:
                        time.sleep(0.01)
                    may = counted.total() < KILLS and kept and not (bank / MANIFEST).exists()
                    if may and (what := struck(cluster, bank, running, draw)) is not None:
                        counted[what] += 1
                        print(f"{counted.total()} {what} at {len(records(bank))} records", file=sys.stderr, flush=True)
                    if now := records(bank):
                        assert all(now[name] == data for name, data in kept.items()), "a record changed or is gone"
                        kept = now
                running.wait(300)
            finally:
                running.kill()
                running.wait()
            svdbank.build(model, bank, rank=RANK, threads=1)
            assert tree(bank) == expected
            recorded, unrecorded = solved(bank)
            late += unrecorded
            # Who is killed between a record and its line of the log leaves no line.
            assert set(recorded.values()) == {1} and len(recorded) >= LAYERS - counted.total(), "each shard is recorded once"
            print(f"build {builds}: {recorded.total()} recorded, {unrecorded} solved too late", file=sys.stderr, flush=True)
            shutil.rmtree(bank)
    print(f"{counted.total()} kills in {builds} builds of {LAYERS} weights: {dict(counted)}; {late} solves came too late")
    assert late == 0, "nobody was silent for longer than a lease, so nobody solved what another had"


def test_workers_that_find_no_room_start_when_a_node_joins(model: Path, expected: dict[str, bytes], memory_disk: Path) -> None:
    bank = memory_disk / "bank"
    with own_network(), simulated() as cluster, started(model, bank, "--workers", "2", "--ray", cluster.address) as process:
        lines = drained(process)
        while not any('"wait for a place"' in line for line in lines):
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.1)
        add_node(cluster)
        add_node(cluster)
        assert process.wait(600) == 0, process.stderr and process.stderr.read()
    assert tree(bank) == expected
    assert any(json.loads(line).get("workers", 0) >= 1 for line in lines)


def test_a_node_that_does_not_see_the_folder_is_named_before_the_work(model: Path, memory_disk: Path) -> None:
    bank = memory_disk / "shared" / "bank"
    bank.parent.mkdir()
    with own_network(), simulated(1) as cluster:
        hidden = f"mount -t tmpfs none {bank.parent} && exec ray start --address {cluster.address} --num-cpus 1 --block"
        blind = subprocess.Popen(
            ["unshare", "-m", "sh", "-c", hidden], env={**os.environ, "PATH": _path()}, start_new_session=True
        )
        try:
            cluster.wait_for_nodes()
            while sum(node["Alive"] for node in _nodes(cluster)) < 3:
                time.sleep(0.2)
            with started(model, bank, "--ray", cluster.address) as process:
                drained(process)
                assert process.wait(600) == 1
                errors = process.stderr.read() if process.stderr else ""
        finally:
            os.killpg(blind.pid, signal.SIGKILL)
            blind.wait()
    assert re.search(rf"Error: \S+ \(198\.51\.100\.1\): the bank's folder {bank} is not here", errors), errors
    assert not records(bank)


def test_an_error_of_a_worker_comes_with_its_weight_and_its_words(model: Path, memory_disk: Path) -> None:
    broken, bank = memory_disk / "broken", memory_disk / "bank"
    broken.mkdir()
    tensors = load_file(model / "model.safetensors")
    name = "encoder.layer.7.attention.self.query.weight"
    tensors[name][3, 4] = float("nan")
    save_file(tensors, broken / "model.safetensors")
    (broken / "config.json").write_bytes((model / "config.json").read_bytes())
    with own_network(), started(broken, bank, "--ray") as process:
        drained(process)
        assert process.wait(600) == 1
        errors = process.stderr.read() if process.stderr else ""
    assert re.search(rf"Error: worker \d+ \(cpu on \S+\): {re.escape(name)} in model\.safetensors", errors), errors
    assert "repair the checkpoint" in errors and "Traceback" not in errors


def test_an_interrupt_stops_all_and_the_build_is_finished_without_ray(
    model: Path, expected: dict[str, bytes], memory_disk: Path
) -> None:
    bank = memory_disk / "bank"
    with own_network(), started(model, bank, "--ray") as process:
        drained(process)
        while len(records(bank)) < 5:
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to Ray's processes of this group too
        assert process.wait(600) == 130
        errors = process.stderr.read() if process.stderr else ""
    assert "What was finished is kept; the same command goes on from there" in errors and "Traceback" not in errors
    found = svdbank.info(bank)
    assert isinstance(found, UnfinishedInfo) and 5 <= found.recorded < LAYERS and not found.workers
    reports: list[Any] = []
    svdbank.build(model, bank, rank=RANK, threads=1, on_report=reports.append)
    assert (reports[0].reused, reports[0].solved) == (found.recorded, LAYERS - found.recorded)
    assert tree(bank) == expected


def test_a_build_that_one_process_began_is_finished_on_ray(model: Path, expected: dict[str, bytes], memory_disk: Path) -> None:
    bank = memory_disk / "bank"

    def stop(step: Any) -> None:
        if step.stage == "decompose" and step.done >= 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        svdbank.build(model, bank, rank=RANK, threads=1, jobs=1, progress=stop)
    before = len(records(bank))
    with own_network(), started(model, bank, "--ray") as process:
        lines = drained(process)
        assert process.wait(600) == 0, process.stderr and process.stderr.read()
        time.sleep(0.5)
    report = json.loads(lines[-1])
    assert (report["reused"], report["solved"]) == (before, LAYERS - before) and before >= 10
    assert tree(bank) == expected


def _path() -> str:
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def _nodes(cluster: Any) -> list[dict[str, Any]]:
    return list(cluster.global_state.node_table())


def test_two_drivers_on_one_cluster_share_one_build(model: Path, expected: dict[str, bytes], memory_disk: Path) -> None:
    bank = memory_disk / "bank"
    with own_network(), simulated(1, 1) as cluster:
        drivers = [started(model, bank, "--workers", "1", "--ray", cluster.address) for _ in range(2)]
        lines = [drained(driver) for driver in drivers]
        try:
            for driver in drivers:
                assert driver.wait(600) == 0, driver.stderr and driver.stderr.read()
            time.sleep(0.5)
        finally:
            for driver in drivers:
                driver.kill()
    assert tree(bank) == expected
    recorded, unrecorded = solved(bank)
    assert set(recorded.values()) == {1} and recorded.total() == LAYERS and unrecorded == 0
    assert [json.loads(said[-1])["weights"] for said in lines] == [LAYERS, LAYERS]


def test_the_cluster_that_runs_here_is_found_by_auto(model: Path, expected: dict[str, bytes], memory_disk: Path) -> None:
    bank = memory_disk / "bank"
    with own_network(), simulated(1) as cluster:
        with started(model, bank, "--ray", "auto", RAY_ADDRESS=cluster.address) as process:
            drained(process)
            assert process.wait(600) == 0, process.stderr and process.stderr.read()
        assert sum(node["Alive"] for node in _nodes(cluster)) == 2, "the cluster is as it was"
    assert tree(bank) == expected


def test_workers_fetch_a_model_of_the_hub_by_themselves_and_no_byte_twice(
    model: Path, expected: dict[str, bytes], memory_disk: Path
) -> None:
    bank, name = memory_disk / "bank", "org/model"
    with own_network(), LocalHub() as hub, pytest.MonkeyPatch.context() as patch:
        hub.commit(name, {path.name: path.read_bytes() for path in model.iterdir()})
        hub.point(patch, memory_disk / "hf")
        # Nodes take their environment from where they are started.
        with simulated(1, 1) as cluster, started(Path(name), bank, "--workers", "2", "--ray", cluster.address) as process:
            lines = drained(process)
            assert process.wait(600) == 0, process.stderr and process.stderr.read()
            time.sleep(0.5)
        weights = sum(tensor.nbytes for tensor in load_file(model / "model.safetensors").values())
        assert weights <= hub.sent < weights + 300_000, "headers, configs and listings besides"
    assert json.loads(lines[-1])["solved"] == LAYERS
    assert content(bank) == {name: data for name, data in expected.items() if name not in ("plan.json", "manifest.json")}


def test_a_node_with_another_svdbank_is_named_before_the_work(
    model: Path, memory_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank, other = memory_disk / "bank", memory_disk / "other"
    shutil.copytree(ROOT / "svdbank", other / "svdbank", ignore=shutil.ignore_patterns("__pycache__"))
    (other / "svdbank" / "core" / "version.py").write_text('__version__ = "9.9.9"\n')
    monkeypatch.chdir(memory_disk)  # Ray has its workers import from where the driver runs, too
    with own_network(), simulated(1) as cluster:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", str(other))
            add_node(cluster)
        with started(model, bank, "--ray", cluster.address) as process:
            drained(process)
            assert process.wait(600) == 1
            errors = process.stderr.read() if process.stderr else ""
    assert re.search(r"Error: \S+ \(198\.51\.100\.1\): has svdbank 9\.9\.9, this is \d", errors), errors
    assert "all machines need the same: pip install svdbank==" in errors
    assert not records(bank)
