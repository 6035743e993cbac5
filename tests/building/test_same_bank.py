"""Whoever builds makes one bank: byte for byte where threads are the same, else the same index but for what roundings decide."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import save_file

import svdbank
from svdbank.bank.layout import FileRecord, Index
from svdbank.bank.reading import Bank
from tests.building.small import tree

RANK = 5


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weight that is solved with several threads, and so many small ones that they share their files."""
    folder = tmp_path_factory.mktemp("mixed") / "model"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {"model.layers.0.self_attn.q_proj.weight": torch.randn(1030, 1030, generator=generator)}
    for layer in range(140):
        tensors[f"model.layers.{layer}.self_attn.k_proj.weight"] = torch.randn(16, 24, generator=generator)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


def built(model: Path, bank: Path, **options: Any) -> Bank:
    return svdbank.build(model, bank, rank=RANK, **options)


def without_roundings(index: Index) -> dict[str, Any]:
    """What of an index says nothing of the last bits: all but certificates, hashes of files and checksums."""

    def plain(record: FileRecord) -> tuple[int, int, int]:
        return record.size, record.chunk_bytes, len(record.chunks)

    found = {}
    for family in index.families:
        weights = [msgspec.structs.replace(weight, certificate=None) for weight in family.weights]  # type: ignore[arg-type]
        files = {array: [plain(one) for one in records] for array, records in family.files.items()}
        found[family.spec.name] = (family.spec, weights, files, {name: plain(one) for name, one in family.metadata.items()})
    return found | {"aliases": index.aliases}


def test_one_process_workers_and_shares_make_the_same_bytes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SVDBANK_THREADS", "4")
    reports: list[Any] = []
    alone = built(model, tmp_path / "alone", threads=1, jobs=1, on_report=reports.append)
    built(model, tmp_path / "workers", workers=2, threads=1, on_report=reports.append)
    built(model, tmp_path / "share", shard="2/3", threads=1, on_report=reports.append)
    expected = tree(tmp_path / "alone")
    assert tree(tmp_path / "workers") == expected and tree(tmp_path / "share") == expected
    assert [report.solved for report in reports] == [141] * 3

    other = built(model, tmp_path / "threads", workers=2, threads=2)
    assert without_roundings(other.index) == without_roundings(alone.index)
    names = list(alone)
    for ours, theirs in zip(other.left(names, RANK).values(), alone.left(names, RANK).values(), strict=True):
        # Both are stored in float32: what of one lies outside the other is what that rounds.
        outside = ours.double() - theirs.double() @ (theirs.double().mT @ ours.double())
        assert float(outside.norm()) < 1e-5
