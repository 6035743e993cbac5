"""After each kind of harm on each kind of file, ``repair`` ends with the bank that was published, proven against its source."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import svdbank
import svdbank.building.repairing as repairing
import svdbank.building.solving as solving
from svdbank.bank.layout import MANIFEST
from svdbank.building.mending import Mender
from svdbank.core import disk
from svdbank.core.errors import BankNotFoundError, OptionError, WrongBaseError
from svdbank.core.specs import WeightSpec
from svdbank.verbs.repair import RepairReport
from svdbank_cli.main import run
from tests.building.crashes import Crash, FaultyDisk
from tests.building.small import tree, write_small_checkpoint

RANK = 18


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def _swap(path: Path) -> None:
    """Another file of the bank in its place: of its sibling shard where there is one, else the largest that is not it."""
    root = next(parent for parent in path.parents if (parent / "build.log.jsonl").exists())
    siblings = [other for other in path.parents[2].glob("*/0/0") if other != path] if path.name == "0" else []
    others = [*siblings, *sorted((p for p in root.rglob("*") if p.is_file() and p != path), key=lambda p: p.stat().st_size)]
    shutil.copyfile(others[0] if siblings else others[-1], path)


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/hostname")


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


HARMS: dict[str, Callable[[Path], object]] = {
    "flipped": _flip,
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "deleted": Path.unlink,
    "swapped": _swap,
    "a pipe": _pipe,
    "a link": _link,
    "a folder": _folder,
}

#: A file of each kind, as a pattern in the bank.
KINDS = {
    "manifest": MANIFEST,
    "index": "index-*.json",
    "plan": "plan.json",
    "root": "zarr.json",
    "family": "*/zarr.json",
    "metadata of vectors": "*/left/zarr.json",
    "left": "*/left/c/1/0/0",
    "right": "*/right/c/0/0/0",
    "sigma": "*/sigma/c/0/0",
    "metadata of sigma": "*/sigma/zarr.json",
    "probe": "*/probe/c/0/0",
    "certificate": "*/residual/c/0",
    "hashes": "*/source_sha256/c/0/0",
}


@pytest.fixture(scope="module")
def model(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_checkpoint(tmp_path_factory.mktemp("repair") / "model", minilm, layers=3)


@pytest.fixture(scope="module")
def whole(model: Path) -> Path:
    return svdbank.build(model, model.parent / "bank", rank=RANK).path


def repaired(bank: Path, model: Path) -> RepairReport:
    """The report of a repair that ends with a proven bank, and leaves nothing beside it."""
    report = svdbank.repair(bank, model=model)
    assert report.sound and report.damage
    assert svdbank.verify(bank, data=True, model=model).sound
    assert not (bank / repairing.WORKSHOP).exists() and not svdbank.verify(bank).unrecorded
    return report


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("harm", [*list(HARMS)[:3], *(pytest.param(h, marks=pytest.mark.soak) for h in list(HARMS)[3:])])
def test_after_any_harm_the_bank_is_what_it_was(harm: str, kind: str, whole: Path, model: Path, memory_disk: Path) -> None:
    bank = Path(shutil.copytree(whole, memory_disk / "bank"))
    (path,) = bank.glob(KINDS[kind])
    HARMS[harm](path)
    if kind in ("manifest", "index"):
        (damage,) = svdbank.verify(bank).damage
        assert damage.file == path.name and path.name not in damage.what and str(bank) not in damage.what
    report = repaired(bank, model)
    expected = {"left": 1, "right": 1, "sigma": 3, "metadata of sigma": 3, "probe": 3, "manifest": 3, "index": 3}
    assert report.solved == expected.get(kind, 0)
    assert report.anew == (kind in ("manifest", "index"))
    # Of a lost plan nobody knows what was left out of the model and what was asked for: it is another document, under a new manifest.
    others = {"plan.json", MANIFEST} if kind in ("plan", "manifest", "index") else set()
    after, before = tree(bank), tree(whole)
    assert after.keys() == before.keys() and {name for name in after if after[name] != before[name]} <= others
    assert report.anew or not report.changed


def test_a_sound_bank_is_left_alone_and_no_bank_is_none(whole: Path, model: Path, tmp_path: Path) -> None:
    before = tree(whole)
    report = svdbank.repair(whole)
    assert report.sound and not report.damage and tree(whole) == before
    with pytest.raises(BankNotFoundError):
        svdbank.repair(tmp_path)
    unfinished = Path(shutil.copytree(whole, tmp_path / "unfinished"))
    (unfinished / MANIFEST).unlink()
    for index in unfinished.glob("index-*.json"):
        index.unlink()
    with pytest.raises(BankNotFoundError, match="not finished"):
        svdbank.repair(unfinished, model=model)


def test_a_dry_run_says_what_and_how_long_and_changes_nothing(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bank = Path(shutil.copytree(whole, tmp_path / "bank"))
    (path,) = bank.glob(KINDS["left"])
    path.unlink()
    before = tree(bank)
    report = svdbank.repair(bank, dry_run=True)
    assert report.dry_run and not report.sound and report.solved == 1 and report.kept == 2 and report.seconds > 0
    assert run(["repair", str(bank), "--dry-run"]) == 4
    assert "would solve 1 weights again" in capsys.readouterr().out
    (bank / MANIFEST).unlink()
    assert svdbank.repair(bank, dry_run=True).anew
    assert tree(bank) == {name: data for name, data in before.items() if name != MANIFEST}


def test_another_model_is_refused_before_anything_is_replaced(whole: Path, model: Path, minilm: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    bank = Path(shutil.copytree(whole, tmp_path / "bank"))
    (path,) = bank.glob(KINDS["left"])
    _flip(path)
    before = tree(bank)
    other = Path(shutil.copytree(model, tmp_path / "other"))
    tensors = load_file(model / "model.safetensors")
    save_file({name: value + 1e-3 for name, value in tensors.items()}, other / "model.safetensors")
    with pytest.raises(WrongBaseError, match="other bytes"):
        svdbank.repair(bank, model=other)
    with pytest.raises(OptionError, match="does not know the path"):
        svdbank.repair(bank)
    assert {name: data for name, data in tree(bank).items() if not name.startswith(".")} == before
    assert repaired(bank, model).solved == 1


def test_sound_bases_of_a_shared_shard_stay_to_the_bit(
    minilm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """And the one that is solved again comes back to the bit too, on the kind of device that built it."""
    monkeypatch.setattr("svdbank.bank.layout.SINGLE_SHARD_WEIGHTS", 1)
    model = write_small_checkpoint(tmp_path / "model", minilm, layers=5)
    bank = svdbank.build(model, tmp_path / "bank", rank=4, device=device)
    (family,) = bank.index.families
    assert family.spec.weights_per_shard == 5
    before = tree(bank.path)
    (shard,) = bank.path.glob("*/left/c/0/0/0")
    data = bytearray(shard.read_bytes())
    length = family.files["left"][0].chunk_bytes
    data[2 * length + 7] ^= 1
    shard.write_bytes(data)
    read: list[str] = []
    real = Mender._read

    def counted(self: Mender, spec: WeightSpec, record: Any) -> Any:
        read.append(spec.name)
        return real(self, spec, record)

    monkeypatch.setattr(Mender, "_read", counted)
    report = repaired(bank.path, model)
    assert report.solved == 1 and read == [bank.names[2]] and report.kept == 4 and tree(bank.path) == before


def test_a_device_that_is_not_here_is_refused_before_a_byte_is_read(
    whole: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bank = Path(shutil.copytree(whole, tmp_path / "bank"))
    (path,) = bank.glob(KINDS["left"])
    _flip(path)
    harmed = tree(bank)
    for name, text in (("cuda:1", "torch sees no CUDA device"), ("tpu", "'tpu'"), ("cuda:0,cuda:1", "no device is called")):
        assert run(["repair", str(bank), "--source", str(model), "--device", name]) == 2
        seen = capsys.readouterr()
        assert text in seen.err and "verify" not in seen.err and tree(bank) == harmed
    assert run(["repair", str(bank), "--source", str(model), "--device", "cpu", "-q"]) == 0 and tree(bank) == tree(whole)


def test_where_bytes_differ_it_is_said_and_sound_weights_stay(
    whole: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signs of another machine: the same subspace, other bytes, a new index and manifest; a slim adapter refuses by name."""
    bank = Path(shutil.copytree(whole, tmp_path / "bank"))
    svdbank.init(bank, output=tmp_path / "law", rank=2)
    svdbank.export(tmp_path / "law", to="slim", output=tmp_path / "slim", bank=bank)
    (path,) = bank.glob(KINDS["left"])
    path.unlink()
    real = solving.minor_basis

    def elsewhere(matrix: torch.Tensor, rank: int, **options: Any) -> Any:
        basis = real(matrix, rank, **options)
        for vectors in (basis.minor.left, basis.minor.right):
            vectors.neg_()
        return basis

    monkeypatch.setattr(solving, "minor_basis", elsewhere)
    opened = svdbank.open(bank)
    names = opened.names
    during = {name: opened[name].left(4) for name in (names[0], names[2])}
    report = repaired(bank, model)
    assert report.changed == (names[1],) and report.kept == 2
    again = svdbank.open(bank)
    assert again.manifest.digest != opened.manifest.digest and again.base_digest() == opened.base_digest()
    assert all(torch.equal(again[name].left(4), vectors) for name, vectors in during.items())
    assert all(torch.equal(opened[name].left(4), vectors) for name, vectors in during.items())
    with pytest.raises(svdbank.BankError, match="not those that the adapter was made with"):
        svdbank.export(tmp_path / "slim", output=tmp_path / "back", bank=bank)


def test_a_repair_that_is_killed_at_any_operation_is_done_by_the_next(whole: Path, model: Path, memory_disk: Path) -> None:
    """And whatever was sound can be read at every moment."""

    def harmed(place: Path) -> Path:
        bank = Path(shutil.copytree(whole, place))
        for kind in ("left", "certificate"):
            (path,) = bank.glob(KINDS[kind])
            _flip(path)
        return bank

    counted = FaultyDisk(memory_disk)
    first = harmed(memory_disk / "counted")
    with disk.observe(counted):
        svdbank.repair(first, model=model)
    expected = tree(whole)
    for stop_at in range(0, len(counted.operations), 7):
        bank = harmed(memory_disk / "bank")
        with disk.observe(FaultyDisk(memory_disk, stop_at=stop_at)), pytest.raises(Crash):
            svdbank.repair(bank, model=model)
        opened = svdbank.open(bank)
        assert all(opened[name].left(4) is not None for name in (opened.names[0], opened.names[2]))
        assert svdbank.repair(bank, model=model).sound
        assert tree(bank) == expected, counted.operations[stop_at]
        shutil.rmtree(bank)
