"""Every field of PEFT's ``LoraConfig`` at a value that is not its default, and what PEFT saves besides factors."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

VOCABULARY, HIDDEN = 96, 48


@dataclass(frozen=True)
class Case:
    """One adapter. ``config`` goes to ``LoraConfig``, ``save`` to ``save_pretrained``; ``edit`` is written into the saved config, for
    values that PEFT saves only after work with data or quantisers that a test does not have.

    ``change`` is what the user did to the loaded base before; ``names`` is what a refusal has to name, by default the field.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    model: str = "untied"
    change: Callable[[Any], None] | None = None
    save: Mapping[str, Any] = field(default_factory=dict)
    edit: Mapping[str, Any] = field(default_factory=dict)
    names: str = ""
    seq_cls: bool = False


def small_llama(*, tied: bool = False, layers: int = 2, seed: int = 0, **options: Any) -> Any:
    """A Llama of 2 layers in float32, weights of a size at which every part of it tells."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **options,
    )
    return transformers.LlamaForCausalLM(config).eval()


def _rows(model: Any) -> None:
    """Rows 90 to 95 of embedding and head as the user set them."""
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.weight[90:] = torch.linspace(-0.3, 0.3, 6 * HIDDEN).reshape(6, HIDDEN)


def _head_rows(model: Any) -> None:
    with torch.no_grad():
        model.get_output_embeddings().weight[90:] = torch.linspace(-0.3, 0.3, 6 * HIDDEN).reshape(6, HIDDEN)


def _larger(model: Any) -> None:
    torch.manual_seed(5)
    model.resize_token_embeddings(VOCABULARY + 4)


def _all_linear(**options: Any) -> dict[str, Any]:
    return {"target_modules": "all-linear", **options}


def settings() -> dict[str, dict[str, Case] | str]:
    """By field: adapters by what is set, or why no value of the field can matter to who reads an adapter."""
    from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig

    ends = {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}
    return {
        "task_type": {
            "CAUSAL_LM": Case({"task_type": "CAUSAL_LM"}),
            "SEQ_CLS": Case({"task_type": "SEQ_CLS"}, seq_cls=True, names="score"),
        },
        "peft_type": {"LOHA": Case(edit={"peft_type": "LOHA"})},
        "auto_mapping": {
            "a class": Case(edit={"auto_mapping": {"base_model_class": "LlamaForCausalLM", "parent_library": "x"}})
        },
        "peft_version": "which PEFT wrote it",
        "base_model_name_or_path": {"a name": Case(edit={"base_model_name_or_path": "somebody/model"})},
        "revision": {"a branch": Case(edit={"revision": "main"})},
        "inference_mode": "every saved adapter says true",
        "r": {"3": Case({"r": 3})},
        "target_modules": {
            "names": Case({"target_modules": ["k_proj", "down_proj"]}),
            "a pattern": Case({"target_modules": r".*\.1\.mlp\.(gate|up)_proj"}),
            "all-linear": Case(_all_linear()),
            "embedding and head": Case(ends),
            "embedding and head, tied": Case(ends, model="tied", names="one tensor"),
        },
        "exclude_modules": {"names": Case(_all_linear(exclude_modules=["q_proj"]))},
        "lora_alpha": {"3": Case({"lora_alpha": 3})},
        "lora_dropout": {"0.1": Case({"lora_dropout": 0.1})},
        "fan_in_fan_out": {"true, on Conv1D": Case({"target_modules": ["c_attn"], "fan_in_fan_out": True}, model="gpt2")},
        "bias": {
            "all": Case({"bias": "all"}, model="biased"),
            "lora_only": Case({"bias": "lora_only"}, model="biased"),
            "all, without biases": Case({"bias": "all"}),
        },
        "use_rslora": {"true": Case({"use_rslora": True})},
        "modules_to_save": {
            "lm_head": Case({"modules_to_save": ["lm_head"]}),
            "embed_tokens": Case({"modules_to_save": ["embed_tokens"]}),
            "a norm": Case({"modules_to_save": ["norm"]}),
            "both ends, tied": Case(
                {"modules_to_save": ["embed_tokens", "lm_head"]}, model="tied", names="one tensor|modules_to_save"
            ),
        },
        "init_lora_weights": {
            "false": Case({"init_lora_weights": False}),
            "gaussian": Case({"init_lora_weights": "gaussian"}),
            "orthogonal": Case({"init_lora_weights": "orthogonal"}),
            "mica": Case({"init_lora_weights": "mica"}),
            "eva": Case(edit={"init_lora_weights": "eva"}),
            "pissa": Case({"init_lora_weights": "pissa"}, names="pissa"),
            "pissa_niter_4": Case({"init_lora_weights": "pissa_niter_4"}, names="pissa"),
            "olora": Case({"init_lora_weights": "olora"}, names="olora"),
            "corda": Case(edit={"init_lora_weights": "corda"}, names="corda"),
            "loftq": Case(edit={"init_lora_weights": "loftq"}, names="loftq"),
            "lora_ga": Case(edit={"init_lora_weights": "lora_ga"}, names="lora_ga"),
            "one not known": Case(edit={"init_lora_weights": "a new one"}, names="a new one"),
        },
        "layers_to_transform": {"1": Case({"layers_to_transform": [1]})},
        "layers_pattern": {"layers": Case({"layers_to_transform": [1], "layers_pattern": "layers"})},
        "rank_pattern": {"by name": Case(_all_linear(rank_pattern={"v_proj": 2, r"layers\.1\.mlp\.up_proj": 5}))},
        "alpha_pattern": {"by name": Case(_all_linear(alpha_pattern={"v_proj": 3, "layers.0.self_attn.o_proj": 1}))},
        "megatron_config": {"a parallel model": Case(edit={"megatron_config": {"tensor_model_parallel_size": 2}})},
        "megatron_core": "where Megatron is imported from; nothing without megatron_config",
        "trainable_token_indices": {
            "a list": Case({"trainable_token_indices": [3, 7]}, names="trainable_token_indices|trained tokens"),
            "by module": Case({"trainable_token_indices": {"lm_head": [3, 7]}}, names="trainable_token_indices|trained tokens"),
        },
        "loftq_config": {"4 bits": Case(edit={"loftq_config": {"loftq_bits": 4}})},
        "eva_config": {"rho": Case(edit={"init_lora_weights": "eva", "eva_config": {"rho": 2.0}})},
        "corda_config": {
            "beside corda": Case(edit={"init_lora_weights": "corda", "corda_config": {"cache_file": "x"}}, names="corda")
        },
        "lora_ga_config": {
            "beside lora_ga": Case(edit={"init_lora_weights": "lora_ga", "lora_ga_config": {"scale": "unit"}}, names="lora_ga")
        },
        "use_dora": {"true": Case({"use_dora": True}), "on embeddings": Case(ends | {"use_dora": True})},
        "velora_config": {"groups": Case({"velora_config": VeloraConfig(num_groups=4)})},
        "alora_invocation_tokens": {"two tokens": Case({"alora_invocation_tokens": [5, 6], "task_type": "CAUSAL_LM"})},
        "use_qalora": {"true": Case(edit={"use_qalora": True})},
        "qalora_group_size": "nothing without use_qalora",
        "monteclora_config": {"samples": Case({"monteclora_config": MontecloraConfig(num_samples=4)})},
        "layer_replication": {"two layers twice": Case({"layer_replication": [(0, 2), (0, 2)]})},
        "runtime_config": "never saved",
        "lora_bias": {"true": Case({"lora_bias": True}, model="biased"), "true, no base bias": Case({"lora_bias": True})},
        "target_parameters": {
            "a parameter": Case({"target_modules": ["q_proj"], "target_parameters": ["mlp.up_proj.weight"]}),
        },
        "use_bdlora": {
            "blocks": Case(
                {
                    "use_bdlora": BdLoraConfig(target_modules_bd_a=["o_proj"], target_modules_bd_b=["q_proj"], nblocks=2),
                    "target_modules": ["q_proj", "o_proj"],
                }
            )
        },
        "arrow_config": {"a router": Case(edit={"arrow_config": {"top_k": 2}})},
        "kasa_config": {"true": Case({"kasa_config": KasaConfig()})},
        "ensure_weight_tying": {
            "both ends": Case(
                {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
                model="tied",
                names="ensure_weight_tying",
            ),
            "saved whole": Case(
                {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
                model="tied",
                names="ensure_weight_tying",
            ),
        },
        "a field of a later PEFT": {
            "true": Case(edit={"use_something_new": True}, names="use_something_new"),
            "null": Case(edit={"something_new": None}),
        },
        "beside the factors": {
            "embeddings, unchanged": Case(save={"save_embedding_layers": True}, names="lm_head.weight"),
            "rows set by the user": Case(ends, change=_rows),
            "rows set by the user, head alone": Case({"target_modules": ["q_proj", "lm_head"]}, change=_head_rows),
            "a larger vocabulary": Case(change=_larger, names="embed_tokens|lm_head|vocab"),
        },
    }


def cases() -> dict[str, Case]:
    """``field: value`` → the adapter."""
    return {
        f"{name}: {what}": case for name, own in settings().items() if not isinstance(own, str) for what, case in own.items()
    }


def wrapped(case: Case, base: Any, seed: int, left: Mapping[str, torch.Tensor]) -> Any:
    """``base`` with an adapter that looks trained. ``left`` are vectors of a bank: where they fit, B is made of them to the bit."""
    import peft

    if case.change is not None:
        case.change(base)
    targets = {"target_modules": ["q_proj", "v_proj"]} if case.model != "gpt2" else {}
    model = peft.get_peft_model(base, peft.LoraConfig(**{"r": 4, "lora_alpha": 8, **targets, **case.config})).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or "lora_B" in name:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
            for module, vectors in left.items():
                fits = parameter.ndim == 2 and len(parameter) == len(vectors) and parameter.shape[1] <= vectors.shape[1]
                if name.endswith(f"{module}.lora_B.default.weight") and fits and "init_lora_weights" not in case.config:
                    parameter.copy_(vectors[:, : parameter.shape[1]])
    return model


def save(case: Case, model: Any, folder: Path) -> Path:
    """As PEFT saves it, with what ``case`` says besides."""
    model.save_pretrained(folder, **case.save)
    if case.edit:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | dict(case.edit)))
    return folder


def logits(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Of one row of tokens, in the model's dtype."""
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=tokens).logits
    return found
