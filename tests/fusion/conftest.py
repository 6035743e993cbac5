"""Small real models, PEFT adapters on them, and what PEFT itself makes of the two."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.checkpoint.small_models import configurations
from tests.peft.models import quiet


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> Iterator[None]:
    with quiet():
        yield


def small_model(name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> nn.Module:
    """A small model of a real class, as the tests of architectures build it."""
    cls, config = configurations()[name]
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(seed)
    return cls(config).to(dtype).eval()


def saved(model: nn.Module, folder: Path, *, shard: str = "1GB") -> Path:
    """The model in a folder with the files that stand beside real ones."""
    model.save_pretrained(folder, max_shard_size=shard)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}\n')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "LICENSE").write_text("terms")
    return folder


def adapter(model: nn.Module, folder: Path, *, size: float = 0.02, seed: int = 1, **config: Any) -> Any:
    """A PEFT model around ``model`` whose adapter is not zero anywhere, saved to ``folder`` as PEFT saves it."""
    import peft

    options = {"r": 4, "lora_alpha": 8, **config}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**options)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * (size if "lora_" in name else 0.1))
    wrapped.save_pretrained(folder)
    return wrapped


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, whatever the number of files."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def logits(model: nn.Module) -> Tensor:
    """Of twelve fixed tokens, float32."""
    tokens = torch.arange(12)[None] * 7 % 90
    with torch.no_grad():
        result: Tensor = model(input_ids=tokens).logits.float()
    return result


def reloaded(folder: Path, **options: Any) -> nn.Module:
    """The folder as plain Transformers loads it, with no weight missing or left over."""
    import transformers

    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, info = getattr(transformers, architecture).from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    loaded: nn.Module = model.eval()
    return loaded


def headers_of(folder: Path) -> dict[str, bytes]:
    """The bytes of each weight file before its tensors."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        data = file.read_bytes()
        found[file.name] = data[: 8 + int.from_bytes(data[:8], "little")]
    return found
