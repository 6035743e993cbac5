"""A small model of every row of the table, made by transformers' auto classes from a few numbers."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

TEXT = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {**TEXT, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
DEEPSEEK = {
    **MOE,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 1,
}
LINEAR_ATTENTION = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
LLAMA4 = {**MOE, "intermediate_size": 24, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 2}
ENCODER = {
    k: v for k, v in TEXT.items() if k not in ("num_key_value_heads", "head_dim", "pad_token_id", "max_position_embeddings")
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
    "projection_dim": 24,
}
SEQ2SEQ = {
    "vocab_size": 120,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 32,
    "num_mel_bins": 8,
    "max_source_positions": 16,
    "max_target_positions": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
#: The older decoders have names of their own for their sizes.
OLD = {"vocab_size": 120, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "rotary_dim": 4}
MPT = {"vocab_size": 120, "d_model": 32, "n_heads": 4, "n_layers": 2}
MROPE = {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2], "rope_type": "default"}}
QWEN_VISION = {
    "depth": 1,
    "embed_dim": 32,
    "hidden_size": 32,
    "num_heads": 4,
    "intermediate_size": 48,
    "patch_size": 14,
    "out_hidden_size": 32,
    "deepstack_visual_indexes": [0],
}

CLIP = {"text_config": {**ENCODER, "projection_size": 32, "projection_dim": 24}, "vision_config": VISION}

OWN: dict[str, dict[str, Any]] = {
    "opt": {**TEXT, "ffn_dim": 48, "word_embed_proj_dim": 32},
    **dict.fromkeys(("gptj", "codegen", "gpt_bigcode", "gpt2", "openai-gpt", "mpt"), OLD),
    "mpt": MPT,
    **{key: {**ENCODER, "n_layer": 2, "n_head": 4} for key in ("bloom", "falcon")},
    "gpt_neo": {**ENCODER, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "mixtral": {**MOE, "head_dim": None},
    "phimoe": {k: v for k, v in MOE.items() if k != "head_dim"},
    "minimax": {**MOE, "layer_types": ["full_attention", "linear_attention"]},
    "qwen2_moe": {**MOE, "shared_expert_intermediate_size": 24},
    "qwen3_next": {**MOE, **LINEAR_ATTENTION, "shared_expert_intermediate_size": 24},
    "jamba": {
        **MOE,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
    },
    "lfm2_moe": {**MOE, "num_dense_layers": 1, "layer_types": ["full_attention", "conv"]},
    "granitemoeshared": {**MOE, "shared_intermediate_size": 24},
    "ernie4_5_moe": {**MOE, "moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 0, "moe_layer_end_index": 1},
    "hunyuan_v1_moe": {**MOE, "moe_topk": 2},
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "dots1", "glm4_moe"), DEEPSEEK),
    "llama4_text": LLAMA4,
    "modernbert": {**ENCODER, "pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2},
    "distilbert": {"vocab_size": 120, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
    **{key: {**ENCODER, "embedding_size": 16} for key in ("electra", "albert")},
    "siglip": CLIP,
    "clip": CLIP,
    "mistral3": {"text_config": {**TEXT, "model_type": "mistral"}, "vision_config": {**VISION, "model_type": "pixtral"}},
    "internvl": {
        "text_config": {**TEXT, "model_type": "qwen2"},
        "vision_config": {**VISION, "model_type": "internvl_vision", "image_size": [28, 28], "patch_size": [14, 14]},
    },
    **{key: {"text_config": {**TEXT, **MROPE}, "vision_config": QWEN_VISION} for key in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")},
    "mllama": {
        "text_config": {**TEXT, "cross_attention_layers": [1]},
        "vision_config": {
            **VISION,
            "num_hidden_layers": 1,
            "num_global_layers": 1,
            "attention_heads": 4,
            "vision_output_dim": 64,
            "intermediate_layers_indices": [0],
        },
    },
    "llama4": {
        "text_config": LLAMA4,
        "vision_config": {**VISION, "vision_output_dim": 48, "projector_input_dim": 32, "projector_output_dim": 48},
    },
}
#: Language model and tower of the types that are LLaVA with other parts.
LLAVAS = {
    "llava": ("llama", "clip_vision_model"),
    "llava_next": ("llama", "clip_vision_model"),
    "llava_onevision": ("qwen2", "siglip_vision_model"),
    "vipllava": ("llama", "clip_vision_model"),
    "paligemma": ("gemma", "siglip_vision_model"),
    "gemma3": ("gemma3_text", "siglip_vision_model"),
    "aya_vision": ("cohere2", "siglip_vision_model"),
}
ENCODERS = "bert ernie roberta camembert xlm-roberta electra albert distilbert mpnet modernbert nomic_bert"
VISION_ONLY = "vit deit dinov2 siglip_vision_model clip_vision_model siglip clip"
IMAGE_TEXT = f"{' '.join(LLAVAS)} mistral3 internvl qwen2_vl qwen2_5_vl qwen3_vl mllama llama4"


def model_of(model_type: str) -> nn.Module:
    """A model of that type with seeded weights."""
    t = transformers
    if model_type in ENCODERS.split():
        auto, options = t.AutoModelForMaskedLM, OWN.get(model_type, ENCODER)
    elif model_type in VISION_ONLY.split():
        auto, options = t.AutoModel, OWN.get(model_type, VISION)
    elif model_type in LLAVAS:
        text, tower = LLAVAS[model_type]
        auto = t.AutoModelForImageTextToText
        options = {"text_config": {**TEXT, "model_type": text}, "vision_config": {**VISION, "model_type": tower}}
    elif model_type in IMAGE_TEXT.split():
        auto, options = t.AutoModelForImageTextToText, OWN[model_type]
    elif model_type == "whisper":
        auto, options = t.AutoModelForSpeechSeq2Seq, SEQ2SEQ
    elif model_type in ("t5", "mt5", "bart", "mbart"):
        auto, options = t.AutoModelForSeq2SeqLM, SEQ2SEQ
    else:
        auto, options = t.AutoModelForCausalLM, OWN.get(model_type, MOE)
    torch.manual_seed(0)
    model: nn.Module = auto.from_config(t.AutoConfig.for_model(model_type, **options))
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model.eval()
