"""docs/format.md is enough: a reader written from it alone sees what svdbank sees, and refuses what it must."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from safetensors.torch import save_file

import svdbank
from svdbank.bank import layout
from tests.docs.spec_reader import RefusedError, SpecBank, base_digest, crc32c, probe_positions

SCALARS = ("sigma_max", "sigma_min", "sigma_next", "orthogonality", "residual", "angle_bound")


@dataclasses.dataclass(frozen=True)
class Sample:
    """A bank, the checkpoint it was built from, and the files recorded before it was extended."""

    bank: Path
    model: Path
    before: dict[str, dict[str, Any]]


def tensor_bytes(file: Path) -> dict[str, tuple[bytes, tuple[int, ...]]]:
    """The bytes and shapes of a safetensors file, without the library."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    start = 8 + length
    return {
        name: (data[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]], tuple(entry["shape"]))
        for name, entry in header.items()
    }


def _hard_model(folder: Path) -> Path:
    """130 small weights (so many share files), a tall and a wide one, an embedding."""
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    weights = {f"layers.{i}.mlp.experts.{j}.up.weight": draw(24, 20) for i in range(10) for j in range(13)}
    weights |= {"layers.0.tall.weight": draw(70, 18), "layers.0.wide.weight": draw(18, 70), "embed_tokens.weight": draw(50, 12)}
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "toy", "vocab_size": 50}))
    return folder


@pytest.fixture(scope="module", params=[("float32", "both"), ("bfloat16", "both"), ("float16", "left")], ids="-".join)
def sample(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Sample:
    """Banks of every dtype, with shards of several weights (the last one not full), an extension, and the principal end."""
    dtype, side = request.param
    folder = tmp_path_factory.mktemp(dtype)
    model, bank = _hard_model(folder / "model"), folder / "bank"
    with pytest.MonkeyPatch.context() as patch:
        # 50 weights a shard in the family of 130: 50, 50, 30.
        patch.setattr(layout, "SHARD_BYTES", 50 * 32 * 24 * (4 if dtype == "float32" else 2))
        # More than sixteen triplets and no multiple of sixteen; less in the families that allow less.
        svdbank.build(model, bank, rank=19, dtype=dtype, side=side, principal=3)
        before = SpecBank(bank).recorded()
        svdbank.build(model, bank, rank=19, dtype=dtype, side=side, principal=3, targets=["embed_tokens"])
    return Sample(bank, model, before)


@pytest.fixture(scope="module")
def minilm_sample(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Sample:
    """A bank of real weights."""
    bank = tmp_path_factory.mktemp("minilm") / "bank"
    svdbank.build(minilm, bank, rank=40, targets=["query", "intermediate.dense"])
    return Sample(bank, minilm, {})


def test_the_checksum_is_castagnoli() -> None:
    assert crc32c(b"123456789") == 0xE3069283  # the published check value of CRC-32C


def test_the_spec_alone_reads_the_vectors_that_svdbank_reads(sample: Sample) -> None:
    _same_vectors(sample, every=13)


def test_the_spec_alone_reads_a_bank_of_real_weights(minilm_sample: Sample) -> None:
    _same_vectors(minilm_sample, every=6)


def _same_vectors(sample: Sample, *, every: int) -> None:
    ours, spec = svdbank.open(sample.bank), SpecBank(sample.bank)
    assert list(spec.weights) == list(ours)
    for name in [*list(ours)[::every], *list(ours)[-3:]]:
        basis = ours[name]
        for rank in {1, min(16, basis.rank), basis.rank}:
            # PEFT's order is the first rows reversed and transposed.
            assert np.array_equal(spec.vectors(name, "left", rank)[::-1].T, basis.left(rank).float().numpy())
            if ours.side == "both":
                assert np.array_equal(spec.vectors(name, "right", rank)[::-1].T, basis.right(rank).float().numpy())
        family, row = spec.weights[name]
        assert np.array_equal(spec.coordinate(family, "sigma")[row][::-1], basis.sigma(basis.rank).numpy())


def test_the_stored_vectors_are_the_minor_triplets_of_the_weights(sample: Sample) -> None:
    """Checked against the checkpoint's bytes and NumPy's SVD: order, sign, sides, σ, the principal end."""
    spec = SpecBank(sample.bank)
    tensors = tensor_bytes(sample.model / "model.safetensors")
    tolerance = {"float32": 1e-6, "float16": 2e-3, "bfloat16": 2e-2}[spec.options["dtype"]]  # a few units of rounding
    chosen = ["layers.0.tall.weight", "layers.0.wide.weight", "layers.9.mlp.experts.12.up.weight", "embed_tokens.weight"]
    for name in chosen:
        family, row = spec.weights[name]
        data, shape = tensors[name]
        W = np.frombuffer(data, "<f4").reshape(shape).astype(np.float64)
        W = W.T if family["spec"]["kind"] == "embedding" else W
        assert W.shape == (family["spec"]["out_features"], family["spec"]["in_features"])
        U, S, _ = np.linalg.svd(W, full_matrices=False)
        R = family["spec"]["rank"]
        assert min(19, *W.shape) == R
        np.testing.assert_allclose(spec.coordinate(family, "sigma")[row], S[::-1][:R], rtol=1e-10)
        left = spec.vectors(name, "left", R).astype(np.float64)
        largest = np.take_along_axis(left, np.abs(left).argmax(1)[:, None], 1)
        assert (largest > 0).all()
        # One dimension at a time: this sample's singular values are well apart.
        assert np.abs(np.abs((left * U.T[::-1][:R]).sum(1)) - 1).max() < tolerance
        if spec.options["side"] == "both":
            right = spec.vectors(name, "right", R).astype(np.float64)
            assert np.abs(W @ right.T - left.T * S[::-1][:R]).max() < tolerance * S[0]
        np.testing.assert_allclose(spec.coordinate(family, "principal_sigma")[row], S[:3], rtol=1e-10)
        principal = spec.vectors(name, "principal_left", 3).astype(np.float64)
        assert np.abs(np.abs((principal * U.T[:3]).sum(1)) - 1).max() < tolerance


def test_probes_hashes_and_digest_follow_from_the_checkpoints_bytes(sample: Sample) -> None:
    spec = SpecBank(sample.bank)
    tensors = tensor_bytes(sample.model / "model.safetensors")
    hashes = {name: hashlib.sha256(data).hexdigest() for name, (data, _) in tensors.items()}
    assert spec.manifest["base_digest"] == base_digest({name: hashes[name] for name in spec.weights})
    assert svdbank.open(sample.bank).base_digest(list(spec.weights)[:2]) == base_digest(
        {name: hashes[name] for name in list(spec.weights)[:2]}
    )
    for family in spec.families:
        probes, digests = spec.coordinate(family, "probe"), spec.coordinate(family, "source_sha256")
        shape = (family["spec"]["out_features"], family["spec"]["in_features"])
        for row, weight in enumerate(family["weights"]):
            data, stored = tensors[weight["name"]]
            W = np.frombuffer(data, "<f4").reshape(stored).astype(np.float64)
            W = W.T if family["spec"]["kind"] == "embedding" else W
            assert np.array_equal(probes[row], W.ravel()[probe_positions(*shape)])
            assert digests[row].tobytes().hex() == weight["source_sha256"] == hashes[weight["name"]]


def test_coordinates_repeat_the_index(sample: Sample) -> None:
    for family in SpecBank(sample.bank).families:
        weights = family["weights"]
        spec = SpecBank(sample.bank)
        for field in ("layer", "expert"):
            expected = [-1 if weight[field] is None else weight[field] for weight in weights]
            assert spec.coordinate(family, field).tolist() == expected
        for field in SCALARS:
            expected = [np.nan if (v := weight["certificate"][field]) is None else v for weight in weights]
            assert np.array_equal(spec.coordinate(family, field), np.array(expected), equal_nan=True)


def test_an_extension_adds_families_and_rewrites_nothing(sample: Sample) -> None:
    spec = SpecBank(sample.bank)
    assert spec.manifest["plans"] == ["plan.json", "plan-1.json"]
    assert [f["spec"]["name"].endswith("-x1") for f in spec.families] == [False, False, False, True]
    before = sample.before
    after = spec.recorded()
    kept = {name for name in before if not name.startswith("index-")}
    assert len(before) - len(kept) == 1
    assert {name: before[name] for name in kept} == {name: after[name] for name in kept}


def test_shards_hold_the_weights_the_spec_says(sample: Sample) -> None:
    spec = SpecBank(sample.bank)
    family, _ = spec.weights["layers.0.mlp.experts.0.up.weight"]
    assert family["spec"]["weights_per_shard"] == 50
    # 19 triplets take two chunks of sixteen; the last shard holds 30 weights.
    assert [len(record["chunks"]) for record in family["files"]["left"]] == [100, 100, 60]
    assert spec.manifest["nbytes"] == sum(
        record["size"] for family in spec.families for records in family["files"].values() for record in records
    )


def test_every_file_of_the_bank_is_recorded_and_as_recorded(sample: Sample) -> None:
    spec = SpecBank(sample.bank)
    recorded = spec.recorded()
    for name, record in recorded.items():
        spec.checked_file(name, record)
    present = {path.relative_to(sample.bank).as_posix() for path in sample.bank.rglob("*") if path.is_file()}
    assert present - set(recorded) == {"manifest.json", "build.log.jsonl"}


def test_the_file_count_is_what_the_plan_shows(minilm_sample: Sample, minilm: Path, tmp_path: Path) -> None:
    report = svdbank.plan(minilm, tmp_path / "bank", rank=40, targets=["query", "intermediate.dense"])
    assert len(SpecBank(minilm_sample.bank).recorded()) + 1 == report.files


def test_plain_zarr_reads_the_same_values(sample: Sample) -> None:
    ours, spec = svdbank.open(sample.bank), SpecBank(sample.bank)
    group = zarr.open_group(sample.bank, mode="r")
    assert group.attrs["svdbank"] == {"format": 1}
    for family in spec.families:
        slug = family["spec"]["name"]
        assert list(group[slug].attrs["weights"]) == family["spec"]["weights"]
        arrays = dict(group[slug].arrays())
        assert set(arrays) >= {"left", "sigma", "probe", "layer", "expert", "source_sha256", *SCALARS}
        assert ("right" in arrays) == (ours.side == "both")
        for row in {0, len(family["weights"]) // 2, len(family["weights"]) - 1}:
            name = family["spec"]["weights"][row]
            stored = arrays["left"][row]
            if ours.dtype == "bfloat16":
                stored = (stored.astype("<u4") << 16).view("<f4")
            assert np.array_equal(stored[::-1].T, ours[name].left(ours[name].rank).float().numpy())
            assert np.array_equal(arrays["sigma"][row][::-1], ours[name].sigma(ours[name].rank).numpy())


def _drop_manifest(bank: Path) -> None:
    (bank / "manifest.json").unlink()


def _edit_manifest(bank: Path, **fields: object) -> None:
    manifest = json.loads((bank / "manifest.json").read_bytes())
    (bank / "manifest.json").write_text(json.dumps(manifest | fields))


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def _swap(one: Path, other: Path) -> None:
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def _vector_file(bank: Path, shard: int) -> Path:
    return next(bank.glob("*query*")) / "left" / "c" / str(shard) / "0" / "0"


DAMAGE = {
    "no manifest": _drop_manifest,
    "another major version": lambda bank: _edit_manifest(bank, format=2),
    "an unknown field": lambda bank: _edit_manifest(bank, surprise=1),
    "another index": lambda bank: _flip(next(bank.glob("index-*.json")), 100),
    "no index": lambda bank: next(bank.glob("index-*.json")).unlink(),
    "a flipped bit in a chunk": lambda bank: _flip(_vector_file(bank, 0), 5),
    "a flipped bit in a checksum": lambda bank: _flip(_vector_file(bank, 0), 16 * 384 * 4 + 1),
    "a flipped bit in the shard's index": lambda bank: _flip(_vector_file(bank, 0), -10),
    "two siblings swapped": lambda bank: _swap(_vector_file(bank, 0), _vector_file(bank, 1)),
    "a file too short": lambda bank: _vector_file(bank, 0).write_bytes(_vector_file(bank, 0).read_bytes()[:-1]),
    "a lost file": lambda bank: _vector_file(bank, 0).unlink(),
    "other metadata": lambda bank: _flip(_vector_file(bank, 0).parents[3] / "zarr.json", 20),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_both_readers_refuse_what_the_format_says_they_must(minilm_sample: Sample, tmp_path: Path, damage: str) -> None:
    bank = tmp_path / "bank"
    shutil.copytree(minilm_sample.bank, bank)
    DAMAGE[damage](bank)
    name = "encoder.layer.0.attention.self.query.weight"
    with pytest.raises((RefusedError, FileNotFoundError)):
        SpecBank(bank).vectors(name, "left", 1)
    with pytest.raises(svdbank.BankError):
        svdbank.open(bank)[name].left(1)
