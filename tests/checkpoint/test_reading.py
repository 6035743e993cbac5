"""Reads: the stored bytes, their hash, many threads, and no surprise when the file changes."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
import torch

from svdbank.checkpoint import decomposable, open_checkpoint
from svdbank.checkpoint.files import PIECE, sha256_of
from svdbank.core.errors import CheckpointError
from tests.checkpoint.attacks import tensors_file


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_weight_is_read_in_its_stored_dtype_with_the_hash_of_its_stored_bytes(tmp_path: Path, dtype: torch.dtype) -> None:
    weight = torch.randn(7, 5).to(dtype)
    with open_checkpoint(tensors_file(tmp_path / "x.safetensors", {"z": torch.ones(3), "a.weight": weight})) as checkpoint:
        ((spec,), _) = decomposable(checkpoint)
        matrix, digest = checkpoint.read_hashed(spec)
    assert matrix.dtype is dtype
    assert torch.equal(matrix, weight)
    assert digest == hashlib.sha256(weight.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def test_not_a_number_and_signed_zero_come_through_bit_for_bit(tmp_path: Path) -> None:
    weight = torch.tensor([[float("nan"), -0.0, float("inf"), 1e-45]])
    with open_checkpoint(tensors_file(tmp_path / "x.safetensors", {"a.weight": weight})) as checkpoint:
        read = checkpoint.read(decomposable(checkpoint)[0][0])
    assert torch.equal(read.view(torch.int32), weight.view(torch.int32))


def test_a_weight_larger_than_one_piece_is_whole(tmp_path: Path) -> None:
    weight = torch.arange(PIECE // 4 * 2 + 1234, dtype=torch.float32).reshape(2, -1)
    with open_checkpoint(tensors_file(tmp_path / "x.safetensors", {"a.weight": weight})) as checkpoint:
        matrix, digest = checkpoint.read_hashed(decomposable(checkpoint)[0][0])
    assert torch.equal(matrix, weight)
    assert digest == hashlib.sha256(weight.numpy().tobytes()).hexdigest()


def test_many_threads_read_at_once_what_one_reads(models: dict[str, Path]) -> None:
    with open_checkpoint(models["llama-sharded"]) as checkpoint:
        specs, _ = decomposable(checkpoint)
        alone = [checkpoint.read_hashed(spec)[1] for spec in specs]
    with open_checkpoint(models["llama-sharded"]) as checkpoint, ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            assert [digest for _, digest in pool.map(checkpoint.read_hashed, specs)] == alone


def descriptors() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


def test_each_file_is_opened_once_and_closed_at_the_end(models: dict[str, Path]) -> None:
    before = descriptors()
    with open_checkpoint(models["llama-sharded"]) as checkpoint:
        assert descriptors() == before
        specs, _ = decomposable(checkpoint, ["all-linear", "embed_tokens", "lm_head"])
        for spec in specs * 2:
            checkpoint.read(spec)
        assert len(descriptors() - before) == len({s.file for spec in specs for s in spec.sources})
    assert descriptors() == before
    with pytest.raises(CheckpointError, match="closed"):
        checkpoint.read(specs[0])


@pytest.mark.parametrize("when", ["before the first read", "after the first read"])
@pytest.mark.parametrize("change", ["truncated", "longer", "rewritten", "replaced", "removed"])
def test_a_file_that_changes_after_opening_is_an_error(tmp_path: Path, change: str, when: str) -> None:
    path = tensors_file(tmp_path / "model.safetensors", {"a.weight": torch.ones(4, 4), "b.weight": torch.ones(4, 4)})
    with open_checkpoint(path) as checkpoint:
        specs, _ = decomposable(checkpoint)
        if when == "after the first read":
            checkpoint.read(specs[0])
        data = path.read_bytes()
        time.sleep(0.02)  # coarser than the clock tick that mtime is taken from
        if change == "truncated":
            os.truncate(path, len(data) - 8)
        elif change == "longer":
            path.write_bytes(data + b"x")
        elif change == "rewritten":
            path.write_bytes(data[:-1] + b"x")
        elif change == "replaced":
            (tmp_path / "new").write_bytes(data[:-1] + b"x")
            (tmp_path / "new").replace(path)
        else:
            path.unlink()
        if when == "after the first read" and change in ("replaced", "removed"):
            # The open descriptor still leads to the file whose header was read.
            assert torch.equal(checkpoint.read(specs[1]), torch.ones(4, 4))
        else:
            with pytest.raises(CheckpointError, match=r"changed since|ends at byte|no such file"):
                checkpoint.read(specs[1])


def test_a_spec_of_another_checkpoint_is_refused(models: dict[str, Path]) -> None:
    with open_checkpoint(models["llama-untied"]) as one, open_checkpoint(models["llama-bf16"]) as other:
        specs, _ = decomposable(one)
        with pytest.raises(CheckpointError, match="is not here as it was planned"):
            other.read(specs[0])
        wrong = msgspec.structs.replace(specs[0], out_features=3)
        with pytest.raises(CheckpointError, match="not \\(3, "):
            one.read(wrong)


def test_a_slice_of_the_leading_dimension_is_read_alone_with_the_hash_of_its_bytes(tmp_path: Path) -> None:
    stacked = torch.arange(24.0).reshape(4, 3, 2)
    with open_checkpoint(tensors_file(tmp_path / "x.safetensors", {"z": torch.ones(3), "experts": stacked})) as checkpoint:
        source = checkpoint.tensors["experts"]
        assert torch.equal(checkpoint.read_tensor(source), stacked)
        for expert in range(4):
            digest, out = hashlib.sha256(), torch.empty(3, 2)
            assert checkpoint.read_tensor(source.part(expert), digest, out=out) is out
            assert torch.equal(out, stacked[expert])
            assert digest.hexdigest() == hashlib.sha256(stacked[expert].numpy().tobytes()).hexdigest()
        with pytest.raises(IndexError):
            source.part(4)
        with pytest.raises(CheckpointError, match="is not here as it was planned"):
            checkpoint.read_tensor(msgspec.structs.replace(source.part(1), index=2))


def test_the_cache_key_follows_the_weights_and_the_configuration_has_a_digest_of_its_own(tmp_path: Path) -> None:
    tensors_file(tmp_path / "model.safetensors", {"a.weight": torch.ones(4, 4)})
    config = tmp_path / "config.json"
    config.write_text(
        '{"hidden_size": 4, "_name_or_path": "x", "torch_dtype": "float32", "sub": {"transformers_version": "4"}}'
    )
    first = open_checkpoint(tmp_path)
    (tmp_path / "README.md").write_text("changed")
    config.write_text('{"sub": {"transformers_version": "5"}, "dtype": "bfloat16", "hidden_size": 4}')
    second = open_checkpoint(tmp_path)
    assert (first.cache_key, first.config_digest) == (second.cache_key, second.config_digest)
    config.write_text('{"hidden_size": 8}')
    third = open_checkpoint(tmp_path)
    assert third.cache_key == first.cache_key and third.config_digest != first.config_digest
    time.sleep(0.02)
    tensors_file(tmp_path / "model.safetensors", {"a.weight": torch.zeros(4, 4)})
    assert open_checkpoint(tmp_path).cache_key != first.cache_key


def test_a_single_file_of_any_name_opens_with_the_configuration_beside_it(models: dict[str, Path], tmp_path: Path) -> None:
    weights = models["gpt2"] / "model.safetensors"
    with open_checkpoint(weights) as checkpoint:
        assert checkpoint.config["model_type"] == "gpt2"
        assert {spec.operation for spec in decomposable(checkpoint)[0]} == {"transpose"}
    (tmp_path / "mine.safetensors").write_bytes(weights.read_bytes())
    for place in (tmp_path, tmp_path / "mine.safetensors"):
        with open_checkpoint(place) as checkpoint:
            assert checkpoint.config == {} and [file.name for file in checkpoint.files] == ["mine.safetensors"]
            assert checkpoint.name == place.name


def test_a_file_that_the_user_names_through_a_link_is_read(tmp_path: Path, models: dict[str, Path]) -> None:
    link = tmp_path / "link.safetensors"
    link.symlink_to(models["llama-tied"] / "model.safetensors")
    with open_checkpoint(link) as checkpoint:
        assert checkpoint.files[0].name == "link.safetensors"
        checkpoint.read(decomposable(checkpoint)[0][0])


def test_the_bytes_agree_with_the_reference_reader(minilm: Path) -> None:
    from safetensors import safe_open

    with open_checkpoint(minilm) as checkpoint, safe_open(minilm / "model.safetensors", "pt") as reference:
        assert sorted(checkpoint.tensors) == sorted(reference.keys())
        for spec in decomposable(checkpoint)[0]:
            assert torch.equal(checkpoint.read(spec), reference.get_tensor(spec.name))
        assert (
            sha256_of(minilm / "model.safetensors") == hashlib.sha256((minilm / "model.safetensors").read_bytes()).hexdigest()
        )


def test_opening_and_planning_a_local_model_imports_neither_torch_nor_the_hub_client_nor_transformers(minilm: Path) -> None:
    program = (
        "import sys; from svdbank.checkpoint import *; decomposable(open_checkpoint(sys.argv[1]));"
        "print([m for m in ('torch', 'transformers', 'huggingface_hub', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program, str(minilm)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]" and done.stderr == ""


def test_sixty_thousand_tensors_are_planned_in_seconds(tmp_path: Path) -> None:
    import json

    header: dict[str, object] = {}
    position = 0
    for layer in range(60):
        for expert in range(334):
            for name in ("gate_proj", "up_proj", "down_proj"):
                header[f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight"] = {
                    "dtype": "BF16",
                    "shape": [64, 32],
                    "data_offsets": [position, position + 64 * 32 * 2],
                }
                position += 64 * 32 * 2
    text = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)
    start = time.process_time()
    with open_checkpoint(tmp_path) as checkpoint:
        specs, skips = decomposable(checkpoint)
    assert (len(specs), len(skips)) == (60_120, 0)
    assert time.process_time() - start < 10  # 2.5 s of one core where this was written
    assert len({spec.family for spec in specs}) == 3
