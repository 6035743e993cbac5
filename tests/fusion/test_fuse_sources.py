"""``fuse`` from quantised checkpoints and from the Hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import svdbank
from svdbank.checkpoint import open_checkpoint
from svdbank.core.errors import CheckpointError
from tests.checkpoint import quantised_models as quantised
from tests.checkpoint.hub_server import LocalHub
from tests.fusion.conftest import adapter, logits, reloaded, saved, small_model, tensors_of

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def _fp8(minilm: Path, folder: Path) -> tuple[nn.Module, dict[str, object]]:
    quantised.save_fp8(quantised.llama(minilm), folder)
    return quantised.llama(minilm), {"target_modules": "all-linear"}


def _mxfp4(minilm: Path, folder: Path) -> tuple[nn.Module, dict[str, object]]:
    quantised.save_mxfp4(quantised.gpt_oss(minilm), folder)
    return quantised.gpt_oss(minilm), {"target_modules": ["q_proj"], "target_parameters": EXPERTS}


@pytest.mark.parametrize("make", [_fp8, _mxfp4])
def test_codes_and_scales_become_values_and_the_checkpoint_loads_as_bfloat16(make, minilm: Path, tmp_path: Path) -> None:
    model, config = make(minilm, tmp_path / "base")
    adapter(model, tmp_path / "adapter", size=0.05, **config)
    report = svdbank.fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / "fused")
    assert report.dequantised
    assert any("codes and scales" in note for note in report.notes)
    assert "quantization_config" not in json.loads((tmp_path / "fused" / "config.json").read_text())
    with open_checkpoint(tmp_path / "base") as base:
        values = {name: base.read_tensor(source) for name, source in base.tensors.items()}
    fused = tensors_of(tmp_path / "fused")
    assert {name: tensor.shape for name, tensor in fused.items()} == {name: tensor.shape for name, tensor in values.items()}
    # The same through PEFT on a model that holds the values.
    plain = type(model)(model.config).to(torch.bfloat16)
    plain.load_state_dict(values)
    import peft

    expected = peft.PeftModel.from_pretrained(plain.float(), tmp_path / "adapter").merge_and_unload().state_dict()
    for name, tensor in fused.items():
        assert tensor.dtype == torch.bfloat16
        # PEFT's sum is another order of the same float32 sum: where that is a tie, one step of bfloat16.
        assert torch.allclose(tensor.float(), expected[name].bfloat16().float(), rtol=2.0**-7, atol=1e-6), name
    assert reloaded(tmp_path / "fused", dtype="auto").dtype == torch.bfloat16


def test_a_model_and_an_adapter_on_the_hub_are_fused_with_the_tokenizer(tmp_path: Path) -> None:
    base = saved(small_model("llama-untied"), tmp_path / "base", shard="200KB")
    with_adapter = adapter(small_model("llama-untied"), tmp_path / "adapter", target_modules=["q_proj"])
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING", "SVDBANK_"))}
    with LocalHub() as hub:
        hub.commit("org/model", {path.name: path.read_bytes() for path in base.iterdir()})
        files = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
        commit = hub.commit("user/lora", {**files, "checkpoint-10/optimizer.bin": b"not wanted"})
        done = subprocess.run(
            [
                *(sys.executable, "-m", "svdbank_cli.main", "fuse", "org/model", "user/lora@main"),
                *("-o", str(tmp_path / "fused"), "--json"),
            ],
            env={**environment, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")},
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["base"].startswith("org/model@")
    assert report["adapter"] == f"user/lora@{commit}"
    assert not list((tmp_path / "home").rglob("optimizer.bin"))
    assert {weight["name"] for weight in report["weights"]} == {
        f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(3)
    }
    assert {path.name for path in (tmp_path / "fused").iterdir()} == {path.name for path in base.iterdir()}
    # three layers of float32
    assert float((logits(reloaded(tmp_path / "fused")) - logits(with_adapter)).abs().max()) < 2e-5


def test_an_adapter_on_the_hub_that_is_wrong_or_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = saved(small_model("llama-untied"), tmp_path / "base")
    adapter(small_model("llama-untied"), tmp_path / "adapter", target_modules=["q_proj"])
    files = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    pickled = {name: data for name, data in files.items() if name != "adapter_model.safetensors"} | {"adapter_model.bin": b"x"}
    with LocalHub() as hub:
        for name, content in {"lora": files, "pickled": pickled, "model": {"config.json": b"{}"}}.items():
            hub.commit(f"user/{name}", content)
        hub.point(monkeypatch, tmp_path / "cache")
        for name, why in {
            "user/pickled": "pickle",
            "hf://user/model": "no adapter",
            "user/none": "neither a path here nor a repository",
            "user/lora@nowhere": "no such revision",
        }.items():
            with pytest.raises(CheckpointError, match=why) as caught:
                svdbank.fuse(base, name, tmp_path / "fused")
            assert caught.value.hint
    assert not (tmp_path / "fused").exists()
