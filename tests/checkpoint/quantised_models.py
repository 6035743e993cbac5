"""Quantised checkpoints of trained weights, written by the libraries that write the released ones.

The weights are MiniLM's, put into small Llama and gpt-oss models. FP8 blocks come from transformers' own quantiser, compressed-tensors
and the e2m1 codes of MXFP4 from compressed-tensors'.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

HIDDEN = 384


def llama(minilm: Path, *, dtype: torch.dtype = torch.bfloat16, intermediate: int = 512) -> nn.Module:
    """One layer of Llama with trained weights: queries 384 x 384, keys and values 128 x 384, an MLP of ``intermediate``."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=1000,
        hidden_size=HIDDEN,
        intermediate_size=intermediate,
        num_hidden_layers=1,
        num_attention_heads=6,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        dtype=dtype,
    )
    model = transformers.LlamaForCausalLM(config).to(dtype)
    trained = _trained(minilm)
    layer = model.model.layers[0]
    with torch.no_grad():
        for module, name in (
            (layer.self_attn.q_proj, "0.attention.self.query"),
            (layer.self_attn.k_proj, "0.attention.self.key"),
            (layer.self_attn.v_proj, "0.attention.self.value"),
            (layer.self_attn.o_proj, "0.attention.output.dense"),
            (layer.mlp.gate_proj, "0.intermediate.dense"),
            (layer.mlp.up_proj, "1.intermediate.dense"),
            (layer.mlp.down_proj, "0.output.dense"),
        ):
            rows, columns = module.weight.shape
            module.weight.copy_(trained(name)[:rows, :columns])
    return model


def deepseek(minilm: Path) -> nn.Module:
    """One layer of DeepSeek-V3 with two routed experts; every matrix a piece of a trained one."""
    import transformers

    config = transformers.DeepseekV3Config(
        vocab_size=1000,
        hidden_size=HIDDEN,
        intermediate_size=256,
        moe_intermediate_size=128,
        num_hidden_layers=1,
        first_k_dense_replace=0,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=2,
        num_experts_per_tok=1,
        n_group=1,
        topk_group=1,
        q_lora_rank=128,
        kv_lora_rank=64,
        qk_nope_head_dim=64,
        qk_rope_head_dim=64,
        v_head_dim=64,
        dtype=torch.bfloat16,
    )
    model = transformers.DeepseekV3ForCausalLM(config).to(torch.bfloat16)
    trained = _trained(minilm)("0.intermediate.dense").flatten()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "layers." in name:
                parameter.copy_(trained[: parameter.numel()].reshape(parameter.shape))
    return model


def gpt_oss(minilm: Path, *, experts: int = 2, intermediate: int = 192) -> nn.Module:
    """One layer of gpt-oss whose experts are trained weights, in bfloat16."""
    import transformers

    config = transformers.GptOssConfig(
        vocab_size=1000,
        hidden_size=HIDDEN,
        intermediate_size=intermediate,
        num_hidden_layers=1,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        num_local_experts=experts,
        num_experts_per_tok=1,
        layer_types=["full_attention"],
        dtype=torch.bfloat16,
    )
    model = transformers.GptOssForCausalLM(config).to(torch.bfloat16)
    trained = _trained(minilm)
    own = model.model.layers[0].mlp.experts
    with torch.no_grad():
        for expert in range(experts):
            own.gate_up_proj[expert].copy_(trained(f"{expert}.intermediate.dense")[: 2 * intermediate].mT)
            own.down_proj[expert].copy_(trained(f"{expert}.output.dense")[:, :intermediate].mT)
    return model


def save_fp8(model: nn.Module, folder: Path, *, block: tuple[int, int] = (128, 128), scale_fmt: str = "float") -> Path:
    """As transformers' fine-grained FP8 quantiser saves a model: the linear layers quantised, but not the output head."""
    from transformers import FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    config = FineGrainedFP8Config(weight_block_size=block, scale_fmt=scale_fmt, modules_to_not_convert=["lm_head"])
    quantise = Fp8Quantize(SimpleNamespace(quantization_config=config))
    model.save_pretrained(folder)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        linear = name.endswith(("_proj.weight", "_proj_with_mqa.weight"))
        tensors.update(quantise.convert({name: tensor}) if linear else {name: tensor})
    return _save(folder, tensors, config.to_dict())


def save_fp8_edges(model: nn.Module, folder: Path) -> Path:
    """The same layout where shapes are no multiples of 128: transformers' quantiser leaves such weights alone, so compressed-tensors'."""
    saved = save_compressed_tensors(model, folder, "block")
    tensors = {
        name.removesuffix("_scale") + "_scale_inv" if name.endswith(".weight_scale") else name: tensor
        for name, tensor in load_file(saved / "model.safetensors").items()
    }
    return _save(folder, tensors, {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]})


def save_compressed_tensors(model: nn.Module, folder: Path, strategy: str, *, ignore: tuple[str, ...] = ("lm_head",)) -> Path:
    """As LLM Compressor saves a model in FP8 with ``strategy`` tensor, channel or block, by compressed-tensors' own writer."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )

    logging.getLogger("compressed_tensors").setLevel(logging.ERROR)
    weights = QuantizationArgs(
        num_bits=8, type="float", strategy=strategy, block_structure=[128, 128] if strategy == "block" else None
    )
    activations = QuantizationArgs(num_bits=8, type="float", strategy="token", dynamic=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=activations)
    apply_quantization_config(model, QuantizationConfig(config_groups={"group_0": scheme}, ignore=list(ignore)))
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            module.weight_scale.data = _scales(module.weight.data, weights).to(module.weight_scale.dtype)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    return folder


def save_mxfp4(model: nn.Module, folder: Path) -> Path:
    """As gpt-oss is released: experts as ``_blocks`` and ``_scales``, everything else in bfloat16."""
    from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weights = QuantizationArgs(num_bits=4, type="float", strategy="group", group_size=32)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    model.save_pretrained(folder)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[name] = tensor
            continue
        stored = tensor.mT.contiguous()  # (experts, out, in), as the blocks lie
        packed, scales = [], []
        for matrix in stored:
            scale = _scales(matrix, weights)
            compressed = MXFP4PackedCompressor.compress({"weight": matrix, "weight_scale": scale}, scheme)
            packed.append(compressed["weight_packed"])
            scales.append(compressed["weight_scale"])
        experts, rows, columns = stored.shape
        tensors[f"{name}_blocks"] = torch.stack(packed).reshape(experts, rows, columns // 32, 16)
        tensors[f"{name}_scales"] = torch.stack(scales)
    unquantised = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    return _save(folder, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": unquantised})


def _scales(weight: torch.Tensor, weights: Any) -> torch.Tensor:
    """The scales that compressed-tensors computes from the least and largest value of each block."""
    from compressed_tensors.quantization.utils import calculate_qparams

    values = weight
    if weights.strategy == "tensor":
        low, high = values.amin().reshape(1), values.amax().reshape(1)
    elif weights.strategy == "channel":
        low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    elif weights.strategy == "group":
        grouped = values.unflatten(1, (-1, weights.group_size))
        low, high = grouped.amin(-1), grouped.amax(-1)
    else:
        height, width = weights.block_structure
        rows, columns = values.shape
        padded = nn.functional.pad(values, (0, -columns % width, 0, -rows % height))
        tiles = padded.unflatten(1, (-1, width)).unflatten(0, (-1, height))
        low, high = tiles.amin((1, 3)), tiles.amax((1, 3))
    scale: torch.Tensor = calculate_qparams(low, high, weights)[0]
    return scale


def _trained(minilm: Path) -> Callable[[str], torch.Tensor]:
    def weight(name: str) -> torch.Tensor:
        with safe_open(minilm / "model.safetensors", framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(f"encoder.layer.{name}.weight")
        return tensor

    return weight


def _save(folder: Path, tensors: dict[str, torch.Tensor], quantisation: dict[str, Any]) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantisation}))
    return folder
