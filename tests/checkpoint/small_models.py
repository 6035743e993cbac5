"""Small models of real transformers classes, with their weights saved by ``save_pretrained``."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from torch import nn

LLAMA = {
    "vocab_size": 1200,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def configurations() -> dict[str, tuple[type[nn.Module], object]]:
    """Name → (class, configuration)."""
    t = transformers
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return {
        "llama-untied": (t.LlamaForCausalLM, t.LlamaConfig(**LLAMA, tie_word_embeddings=False)),
        "llama-tied": (t.LlamaForCausalLM, t.LlamaConfig(**LLAMA, tie_word_embeddings=True)),
        "qwen3": (t.Qwen3ForCausalLM, t.Qwen3Config(**LLAMA, head_dim=16, tie_word_embeddings=True)),
        "gemma3": (t.Gemma3ForCausalLM, t.Gemma3TextConfig(**LLAMA, head_dim=16)),
        "phi3": (t.Phi3ForCausalLM, t.Phi3Config(**LLAMA, pad_token_id=0)),
        "mistral": (t.MistralForCausalLM, t.MistralConfig(**LLAMA)),
        "gpt2": (t.GPT2LMHeadModel, t.GPT2Config(vocab_size=1200, n_positions=64, n_embd=48, n_layer=2, n_head=4)),
        "gpt2-base": (t.GPT2Model, t.GPT2Config(vocab_size=1200, n_positions=64, n_embd=48, n_layer=2, n_head=4)),
        "gpt-neox": (t.GPTNeoXForCausalLM, t.GPTNeoXConfig(vocab_size=1200, **small)),
        "opt": (
            t.OPTForCausalLM,
            t.OPTConfig(vocab_size=1200, hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4),
        ),
        "bert": (t.BertModel, t.BertConfig(vocab_size=1200, **small)),
        "bert-masked": (t.BertForMaskedLM, t.BertConfig(vocab_size=1200, **small)),
        "bert-classifier": (t.BertForSequenceClassification, t.BertConfig(vocab_size=1200, num_labels=3, **small)),
        "roberta-masked": (t.RobertaForMaskedLM, t.RobertaConfig(vocab_size=1200, **small)),
        "t5": (
            t.T5ForConditionalGeneration,
            t.T5Config(vocab_size=1200, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4),
        ),
        "vit": (t.ViTForImageClassification, t.ViTConfig(image_size=32, patch_size=8, **small)),
        "siglip": (t.SiglipVisionModel, t.SiglipVisionConfig(image_size=32, patch_size=8, **small)),
    }


def load(name: str) -> nn.Module:
    """The model of that name with seeded weights; the same values each time."""
    kind, configuration = configurations()[name]
    torch.manual_seed(0)
    return kind(configuration).eval()


def build(root: Path) -> dict[str, Path]:
    """Save every model below ``root``, and some again in shards or in bfloat16."""
    folders = {}
    for name in configurations():
        folders[name] = root / name
        load(name).save_pretrained(folders[name])
    folders["llama-sharded"] = root / "llama-sharded"
    load("llama-untied").save_pretrained(folders["llama-sharded"], max_shard_size="200KB")
    folders["llama-bf16"] = root / "llama-bf16"
    load("llama-untied").to(torch.bfloat16).save_pretrained(folders["llama-bf16"])
    return folders
