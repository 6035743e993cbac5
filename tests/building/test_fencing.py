"""A worker that is stopped at any moment and goes on at the worst one changes nothing that is recorded or published."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import svdbank
from svdbank.bank.layout import ShardRecord
from svdbank.bank.writing import BankWriter
from svdbank.building.preparation import PreparedBuild
from svdbank.building.records import Solved, shard_record
from svdbank.building.shards import ShardWork, shard_works
from svdbank.checkpoint import open_checkpoint
from svdbank.core import disk
from svdbank.core.probe import taken
from svdbank.core.specs import ShardSpec
from svdbank.solver import minor_basis
from tests.building.small import tree, write_small_checkpoint
from tests.building.test_workers import RANK, prepared_build, published, worked


class Stopped(threading.Thread):
    """A worker that writes a solved shard, and is stopped before file operation ``at`` of that until it is told to go on.

    zarr writes in threads of its own; while this one is ``active``, nobody else does anything.
    """

    def __init__(self, writer: BankWriter, work: ShardWork, solved: list[Solved], at: int) -> None:
        super().__init__(name="stopped worker")
        self.arguments = (work.shard, [one.basis for one in solved], shard_record(work, solved))
        self.writer = writer
        self.at = at
        self.operations: list[str] = []
        self.there, self.go_on = threading.Event(), threading.Event()
        self.result: ShardRecord | BaseException | None = None

    def __call__(self, operation: str, path: Path) -> None:
        if not self.active:
            return
        self.operations.append(f"{operation} {path.name}")
        if len(self.operations) == self.at + 1:
            self.active = False
            self.there.set()
            assert self.go_on.wait(60)

    active = True

    def run(self) -> None:
        try:
            self.result = self.writer.write_shard(*self.arguments)
        except BaseException as error:
            self.result = error
        finally:
            self.active = False
            self.there.set()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, minilm: Path) -> Path:
    return write_small_checkpoint(tmp_path_factory.mktemp("small") / "model", minilm, layers=2)


def solved_otherwise(model: Path, work: ShardWork) -> list[Solved]:
    """The bases of a shard with the signs of another machine: as right, and other bytes."""
    found = []
    with open_checkpoint(model) as checkpoint:
        for weight in work.weights:
            matrix, sha256 = checkpoint.read_hashed(weight)
            basis = minor_basis(matrix, RANK)
            for vectors in (basis.minor.left, basis.minor.right):
                assert vectors is not None
                vectors.neg_()
            found.append(Solved(weight, basis, sha256, taken(matrix)))
    return found


def nothing(prepared: PreparedBuild, model: Path) -> None:
    """The others are no further than its shard."""
    del prepared, model


def finish(prepared: PreparedBuild, model: Path) -> None:
    """The others have published."""
    worked(model, prepared)
    published(prepared)


def begin_anew(prepared: PreparedBuild, model: Path) -> None:
    """Another build has begun a session, because the worker was taken for dead."""
    prepared_build(model, prepared.root)


def delete(prepared: PreparedBuild, model: Path) -> None:
    """The bank was deleted."""
    del model
    svdbank.rm(prepared.root)


def replace(prepared: PreparedBuild, model: Path) -> None:
    """The bank was deleted, and another one of other weights is made at its place."""
    svdbank.rm(prepared.root)
    other = shutil.copytree(model, prepared.root.parent / "other")
    from safetensors.torch import load_file, save_file

    save_file({name: -2 * value for name, value in load_file(model / "model.safetensors").items()}, other / "model.safetensors")
    prepared_build(other, prepared.root)


Meanwhile = Callable[[PreparedBuild, Path], None]


@pytest.mark.parametrize("meanwhile", [nothing, finish, begin_anew, delete, replace])
def test_a_worker_stopped_before_any_file_operation_changes_nothing_recorded(
    meanwhile: Meanwhile, model: Path, memory_disk: Path
) -> None:
    operations: list[str] = []
    at = 0
    while True:
        place = memory_disk / str(at)
        prepared = prepared_build(model, place / "bank")
        shard = prepared.todo[0]
        (work,) = shard_works(prepared.plan, prepared.weights, [shard])
        writer = BankWriter(prepared.root, prepared.plan, generation=0, session=prepared.session)
        late = Stopped(writer, work, solved_otherwise(model, work), at)
        with disk.observe(late):
            late.start()
            assert late.there.wait(60)
            recorded_first = prepared.session is not None and prepared.session.read(shard.family, shard.index) is not None
            worked(model, prepared, shards=slice(0, 1))
            meanwhile(prepared, model)
            before = tree(place / "bank") if (place / "bank").exists() else {}
            record = record_of(prepared, shard)
            late.go_on.set()
            late.join(60)
        after = tree(place / "bank") if (place / "bank").exists() else {}
        where = f"stopped before {at} ({late.operations[-1]}), then: {meanwhile.__doc__}"
        assert {name for name in after if not name.endswith(".tmp")} <= {*before}, where
        assert all(after[name] == data for name, data in before.items() if not name.endswith(".tmp")), where
        if meanwhile is nothing:
            assert record_of(prepared, shard) == record
            assert recorded_first or not isinstance(late.result, ShardRecord), where
            worked(model, prepared)
            published(prepared)
        if meanwhile in (nothing, finish):
            assert svdbank.verify(place / "bank", data=True).sound, where
            assert not list((place / "bank").rglob("*.tmp")) or meanwhile is finish
        elif meanwhile is delete:
            assert not (place / "bank").exists(), where
        elif meanwhile is begin_anew:
            svdbank.build(model, place / "bank", rank=RANK)
            assert svdbank.verify(place / "bank", data=True, model=model).sound, where
        shutil.rmtree(place)
        if len(late.operations) <= at:  # it had ended before
            operations = late.operations
            break
        operations = late.operations
        at += 1 if meanwhile is nothing else 3
    kinds = {entry.split()[0] for entry in operations}
    assert {"create", "write", "fsync", "fsync-dir", "link", "unlink", "mkdir"} <= kinds and len(operations) > 15


def record_of(prepared: PreparedBuild, shard: ShardSpec) -> ShardRecord | None:
    assert prepared.session is not None
    return prepared.session.read(shard.family, shard.index)
