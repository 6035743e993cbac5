"""What a PEFT folder holds beside its LoRA factors: whole modules (``modules_to_save``), and kinds of training that are no LoRA."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import safetensors
import torch
from torch import Tensor

from svdbank.adapter.settings import CONFIG, WEIGHTS
from svdbank.core.errors import CheckpointError

_FACTOR = re.compile(r"\.lora_[AB]\.weight$|\.lora_embedding_[AB]$")
_ROOT = "base_model.model."

#: Ends of keys → what was trained; none of it is a sum s·B·A.
_OTHER = {
    r"lora_magnitude_vector(\.weight)?$": "DoRA magnitudes",
    r"lora_B\.bias$": "biases of LoRA's own (lora_bias)",
    r"(token_adapter\.|trainable_tokens_).*": "trained tokens (trainable_token_indices)",
}


class _Beside(msgspec.Struct, frozen=True):
    """Keys of ``adapter_config.json`` with which an adapter is more than factors."""

    trainable_token_indices: object = None
    use_qalora: bool = False
    arrow_config: object = None
    alora_invocation_tokens: object = None
    layer_replication: object = None


_BESIDE = msgspec.json.Decoder(_Beside)


@dataclass(frozen=True)
class SavedModules:
    """``tensors``: whole tensors that replace the model's, by their name in the loaded model."""

    tensors: dict[str, Tensor] = field(default_factory=dict)


def saved_modules(folder: Path) -> SavedModules:
    """Read what lies beside the factors. Raises :class:`CheckpointError` for what is neither a factor nor a whole tensor.

    PEFT saves the layer under an adapted embedding too (``base_layer``); that copy of the base is left alone.
    """
    _refuse_settings(folder)
    tensors: dict[str, Tensor] = {}
    try:
        with safetensors.safe_open(str(folder / WEIGHTS), framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a mapping
                if _FACTOR.search(key) or key.endswith(".base_layer.weight"):
                    continue
                name = key.removeprefix(_ROOT)
                for pattern, what in _OTHER.items():
                    if re.search(pattern, name):
                        raise _refused(folder, what)
                if name == key or "lora_" in name:
                    raise CheckpointError(f"{folder / WEIGHTS}: {key!r} is neither a LoRA factor nor a module of the model")
                tensors[name.replace(".modules_to_save.", ".")] = file.get_tensor(key)
    except safetensors.SafetensorError as cause:
        raise CheckpointError(f"{folder / WEIGHTS}: {cause}") from cause
    for name, values in tensors.items():
        if not values.is_floating_point() or not bool(torch.isfinite(values).all()):
            raise CheckpointError(f"{folder / WEIGHTS}: {name} is no tensor of finite numbers")
    return SavedModules(tensors)


def _refuse_settings(folder: Path) -> None:
    try:
        settings = _BESIDE.decode((folder / CONFIG).read_bytes())
    except msgspec.DecodeError as cause:
        raise CheckpointError(f"{folder / CONFIG}: {cause}") from cause
    for key, what in (
        ("trainable_token_indices", "trained tokens"),
        ("use_qalora", "QALoRA"),
        ("arrow_config", "a mixture of LoRAs (Arrow)"),
        ("alora_invocation_tokens", "an activated LoRA, which acts on some tokens only,"),
        ("layer_replication", "a LoRA over replicated layers"),
    ):
        if getattr(settings, key):
            raise _refused(folder, what)


def _refused(folder: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{folder}: {what} is not a sum ΔW = s·B·A of low rank", hint="merge it into its base with PEFT's merge_and_unload()"
    )
