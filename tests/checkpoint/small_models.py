"""Small models of real transformers classes, with their weights saved by ``save_pretrained``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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

#: What turns ``LLAMA`` into a mixture of experts; types read the names they know.
MOE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "intermediate_size": 40}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
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
            t.T5Config(vocab_size=1200, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0),
        ),
        "vit": (t.ViTForImageClassification, t.ViTConfig(image_size=32, patch_size=8, **small)),
        "siglip": (t.SiglipVisionModel, t.SiglipVisionConfig(image_size=32, patch_size=8, **small)),
        "mixtral": (t.MixtralForCausalLM, t.MixtralConfig(**LLAMA | MOE | {"num_hidden_layers": 2})),
        "qwen3-moe": (t.Qwen3MoeForCausalLM, t.Qwen3MoeConfig(**LLAMA | MOE | {"num_hidden_layers": 2, "head_dim": 16})),
        "deepseek-v3": (t.DeepseekV3ForCausalLM, t.DeepseekV3Config(**LLAMA | MOE | DEEPSEEK)),
        "gpt-oss": (t.GptOssForCausalLM, t.GptOssConfig(**LLAMA | MOE | {"num_hidden_layers": 2, "head_dim": 16})),
        "llama4": (t.Llama4ForConditionalGeneration, t.Llama4Config(text_config=LLAMA4_TEXT, vision_config=LLAMA4_VISION)),
        "llava": (t.LlavaForConditionalGeneration, llava({**LLAMA, "model_type": "llama"})),
        "llava-base": (t.LlavaModel, llava({**LLAMA, "model_type": "llama"})),
        "llava-of-experts": (t.LlavaForConditionalGeneration, llava({**LLAMA, **MOE, "model_type": "mixtral"})),
        "gemma3-vision": (
            t.Gemma3ForConditionalGeneration,
            t.Gemma3Config(
                text_config={**LLAMA, "head_dim": 16},
                vision_config={**VISION, "model_type": "siglip_vision_model"},
                mm_tokens_per_image=4,
                image_token_index=1100,
            ),
        ),
        "nomic-bert": (t.NomicBertForMaskedLM, t.NomicBertConfig(vocab_size=1200, **small)),
    }


#: Models whose experts are stacked parameters, and which of these are stored (experts, in, out).
WITH_EXPERTS = ("deepseek-v3", "gpt-oss", "llama4", "llava-of-experts", "mixtral", "qwen3-moe")
STACKED_IN_OUT = ("gpt-oss", "llama4")

DEEPSEEK = {
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
}
LLAMA4_TEXT = {
    **LLAMA,
    **MOE,
    "num_hidden_layers": 2,
    "intermediate_size_mlp": 160,
    "interleave_moe_layer_step": 2,
    "head_dim": 16,
    "pad_token_id": 0,
}
LLAMA4_VISION = {
    **VISION,
    "num_hidden_layers": 1,
    "vision_output_dim": 48,
    "projector_input_dim": 32,
    "projector_output_dim": 48,
}


def llava(text: dict[str, Any]) -> transformers.LlavaConfig:
    """A CLIP tower before a language model."""
    return transformers.LlavaConfig(
        text_config=text, vision_config={**VISION, "model_type": "clip_vision_model"}, image_token_index=1100
    )


def load(name: str) -> nn.Module:
    """The model of that name with seeded weights; the same values each time."""
    kind, configuration = configurations()[name]
    torch.manual_seed(0)
    model = kind(configuration).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():  # some begin at zero, which no trained weight is
            nn.init.normal_(parameter, std=0.02)
    return model


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
