"""Checkpoints of a large model's shapes, cut to a few layers: synthetic weights, made on the device, in files that transformers loads."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.solver_cases import llm_like

VOCABULARY = 256


@dataclass(frozen=True)
class Llama:
    """The widths of a Llama."""

    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int

    def linears(self) -> dict[str, tuple[int, int]]:
        """(out, in) of the seven linears of a layer."""
        narrow = self.hidden // self.heads * self.key_value_heads
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (narrow, self.hidden),
            "self_attn.v_proj": (narrow, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }

    def nbytes(self, layers: int) -> int:
        """Bytes of the linears in bfloat16."""
        return 2 * layers * sum(out * into for out, into in self.linears().values())

    def config(self, layers: int) -> dict[str, Any]:
        """What stands in ``config.json``."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads,
            "hidden_act": "silu",
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "vocab_size": VOCABULARY,
            "torch_dtype": "bfloat16",
        }


EIGHT_BILLION = Llama(hidden=4096, intermediate=14336, heads=32, key_value_heads=8)
TINY = Llama(hidden=256, intermediate=896, heads=8, key_value_heads=2)


def write(folder: Path, model: Llama, layers: int, device: torch.device, *, files: int = 4) -> None:
    """Write a checkpoint of bfloat16 safetensors in ``files`` shards with their index; the spectrum is that of ``llm_like``."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(model.config(layers), indent=1))
    files = min(files, layers)
    index: dict[str, str] = {}
    for file in range(files):
        name = f"model-{file + 1:05}-of-{files:05}.safetensors"
        tensors: dict[str, Tensor] = {}
        if file == 0:
            tensors["model.embed_tokens.weight"] = llm_like(VOCABULARY, model.hidden, device=device).cpu()
            tensors["model.norm.weight"] = torch.ones(model.hidden, dtype=torch.bfloat16)
        for layer in range(layers * file // files, layers * (file + 1) // files):
            for at, (linear, shape) in enumerate(model.linears().items()):
                tensors[f"model.layers.{layer}.{linear}.weight"] = llm_like(*shape, 7 * layer + at, device).cpu()
            for norm in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"model.layers.{layer}.{norm}.weight"] = torch.ones(model.hidden, dtype=torch.bfloat16)
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, name)
    content = {"metadata": {"total_size": model.nbytes(layers)}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=1))


@contextmanager
def scratch(place: Path | None, needed: int) -> Iterator[Path]:
    """A folder that goes again: in ``place``, or in memory (``/dev/shm``) where ``needed`` bytes have room there, else on disk."""
    if place is None:
        memory = Path("/dev/shm")
        roomy = memory.is_dir() and os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > needed
        place = memory if roomy else Path(tempfile.gettempdir())
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="svdbank-bench-", dir=place) as folder:
        yield Path(folder)
