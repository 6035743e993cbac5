"""A checkpoint with the shapes of Llama-3-8B that takes no disk: its weights are a hole in the file, which reads as zeros."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN, INTERMEDIATE, KEYS, VOCABULARY, LAYERS = 4096, 14336, 1024, 128256, 32
LARGEST = VOCABULARY * HIDDEN

MODULES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}


def write_8b(folder: Path, *, layers: int = LAYERS) -> Path:
    """bfloat16, one file."""
    folder.mkdir(parents=True)
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "lm_head.weight": (VOCABULARY, HIDDEN)}
    shapes |= {f"model.layers.{layer}.{name}.weight": shape for layer in range(layers) for name, shape in MODULES.items()}
    header, offset = {}, 0
    for name, (rows, columns) in shapes.items():
        header[name] = {
            "dtype": "BF16",
            "shape": [rows, columns],
            "data_offsets": [offset, offset := offset + 2 * rows * columns],
        }
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "tie_word_embeddings": False,
        "vocab_size": VOCABULARY,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_8b_adapter(folder: Path, *, rank: int = 16, layers: int = LAYERS, ends: bool = True) -> Path:
    """A LoRA on every linear weight, and with ``ends`` on embedding and head: the largest tensors are changed too."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(layers):
        for name, (rows, columns) in MODULES.items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(rank, columns, generator=generator)
            tensors[f"{key}.lora_B.weight"] = torch.randn(rows, rank, generator=generator)
    if ends:
        tensors["base_model.model.lm_head.lora_A.weight"] = torch.randn(rank, HIDDEN, generator=generator)
        tensors["base_model.model.lm_head.lora_B.weight"] = torch.randn(VOCABULARY, rank, generator=generator)
        tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = torch.randn(rank, VOCABULARY, generator=generator)
        tensors["base_model.model.model.embed_tokens.lora_embedding_B"] = torch.randn(HIDDEN, rank, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": "all-linear"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
