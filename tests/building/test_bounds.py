"""Memory of a build is bounded by its largest decomposed weight, whatever the size of the checkpoint."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from math import prod
from pathlib import Path

import pytest
import torch

import svdbank

#: What the process takes besides weights: interpreter, torch, zarr, BLAS buffers of each thread.
RESIDENT = 600_000_000

# VmHWM and not ru_maxrss: the latter counts what the parent held when it forked.
_BUILD = """
import json, re, sys
import svdbank
options = json.loads(sys.argv[3])
bank = svdbank.build(sys.argv[1], sys.argv[2], **options)
print(len(bank), int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024)
"""


def build(model: Path, bank: Path, **options: object) -> tuple[int, int]:
    """Weights of the bank and the most memory that a build of it took, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", _BUILD, str(model), str(bank), json.dumps(options)], capture_output=True, text=True, check=True
    )
    weights, peak = map(int, done.stdout.split())
    return weights, peak


def write_sparse(path: Path, shapes: dict[str, tuple[int, ...]], real: set[str]) -> None:
    """A bfloat16 safetensors file in which only ``real`` tensors have values; the rest are holes that take no disk."""
    header: dict[str, object] = {}
    position = 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, position + 2 * prod(shape)]}
        position += 2 * prod(shape)
    text = json.dumps(header).encode()
    generator = torch.Generator().manual_seed(0)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        base = file.tell()
        for name, shape in shapes.items():
            if name in real:
                file.seek(base + header[name]["data_offsets"][0])  # type: ignore[index]
                for _ in range(shape[0]):
                    row = torch.randn(shape[1], generator=generator) * 0.02
                    file.write(row.to(torch.bfloat16).view(torch.uint8).numpy().tobytes())
        file.truncate(base + position)


LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}


def write_llama(folder: Path) -> dict[str, tuple[int, ...]]:
    """Llama-3.1-8B's shapes in four files, 16 GB, with values in the first two layers."""
    layer = {
        "input_layernorm": (4096,),
        "self_attn.q_proj": (4096, 4096),
        "self_attn.k_proj": (1024, 4096),
        "self_attn.v_proj": (1024, 4096),
        "self_attn.o_proj": (4096, 4096),
        "post_attention_layernorm": (4096,),
        "mlp.gate_proj": (14336, 4096),
        "mlp.up_proj": (14336, 4096),
        "mlp.down_proj": (4096, 14336),
    }
    files: list[dict[str, tuple[int, ...]]] = [{} for _ in range(4)]
    files[0]["model.embed_tokens.weight"] = files[3]["lm_head.weight"] = (128256, 4096)
    files[3]["model.norm.weight"] = (4096,)
    for number in range(32):
        for name, shape in layer.items():
            files[number // 8][f"model.layers.{number}.{name}.weight"] = shape
    real = {name for name in files[0] if re.match(r"model\.layers\.[01]\..*proj", name)}
    folder.mkdir()
    weight_map = {}
    for number, shapes in enumerate(files):
        file = f"model-{number + 1:05}-of-00004.safetensors"
        write_sparse(folder / file, shapes, real)
        weight_map.update(dict.fromkeys(shapes, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(LLAMA))
    return {name: shape for shapes in files for name, shape in shapes.items()}


@pytest.mark.soak
def test_two_layers_of_an_eight_billion_model_are_solved_within_three_weights_and_600_mb(tmp_path: Path) -> None:
    shapes = write_llama(tmp_path / "model")
    plan = svdbank.plan(tmp_path / "model", tmp_path / "bank")
    assert sum(family.count for family in plan.families) == 7 * 32
    assert sum(2 * prod(shape) for shape in shapes.values()) > 16e9
    assert sum(file.stat().st_blocks * 512 for file in (tmp_path / "model").iterdir()) < 1.1e9, "the rest is holes"
    weights, peak = build(tmp_path / "model", tmp_path / "bank", targets=[r"model\.layers\.[01]\..*_proj"])
    bound = 3 * 4 * 14336 * 4096 + RESIDENT
    print(f"{weights} weights, peak {peak / 1e6:.0f} MB, bound {bound / 1e6:.0f} MB")
    assert weights == 14
    assert peak <= bound
    assert svdbank.verify(tmp_path / "bank").sound


def test_four_hundred_experts_are_solved_within_three_weights_and_600_mb(tmp_path: Path) -> None:
    """Many small weights: 1,200 of 96x64, of which several share a shard of the bank."""
    shapes: dict[str, tuple[int, ...]] = {}
    for expert in range(400):
        for name, shape in (("gate_proj", (96, 64)), ("up_proj", (96, 64)), ("down_proj", (64, 96))):
            shapes[f"model.layers.0.mlp.experts.{expert}.{name}.weight"] = shape
    (tmp_path / "model").mkdir()
    write_sparse(tmp_path / "model" / "model.safetensors", shapes, set(shapes))
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "deepseek_v2_plain"}))
    weights, peak = build(tmp_path / "model", tmp_path / "bank", rank=4)
    print(f"{weights} weights, peak {peak / 1e6:.0f} MB")
    assert weights == 1200
    assert peak <= 3 * 4 * 96 * 64 + RESIDENT
