"""What the PEFT tests share that is no fixture: looking into PEFT's layers, training a few steps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from svdbank.bank.reading import Bank


def smollm2_cache() -> Path:
    """Where the SmolLM2 folder stays between sessions, whatever SVDBANK_HOME is for this one."""
    from huggingface_hub.constants import HF_ASSETS_CACHE

    return Path(HF_ASSETS_CACHE) / "svdbank" / "models"


def decompositions() -> list[tuple[Any, str]]:
    """Every function by which a basis could be computed; PEFT binds ``svd_lowrank`` by name."""
    from peft.tuners.lora import layer

    return [
        (torch.linalg, "svd"),
        (torch.linalg, "svdvals"),
        (torch.linalg, "eigh"),
        (torch.linalg, "eig"),
        (torch, "svd"),
        (torch, "svd_lowrank"),
        (torch, "pca_lowrank"),
        (layer, "svd_lowrank"),
        (numpy.linalg, "svd"),
        (numpy.linalg, "eigh"),
    ]


@contextlib.contextmanager
def without_svd() -> Iterator[list[str]]:
    """Every decomposition that torch and numpy offer raises; yields the list of those that were called, also if swallowed."""
    called: list[str] = []

    def refuse(name: str) -> Callable[..., Any]:
        def raiser(*args: Any, **kwargs: Any) -> Any:
            called.append(name)
            raise AssertionError(f"{name} was called")

        return raiser

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in decompositions():
            patch.setattr(owner, name, refuse(f"{owner.__name__}.{name}"))
        yield called
    assert called == []


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without Transformers' bars and its remark about a head it has to initialise."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()


def mica(rank: int = 8, **options: Any) -> Any:
    from peft import LoraConfig

    chosen = {"init_lora_weights": "mica", "target_modules": "all-linear", "lora_alpha": rank, **options}
    return LoraConfig(r=rank, **chosen)


def lora_layers(model: nn.Module, adapter: str = "default") -> dict[str, Any]:
    """PEFT's layers of an adapter by module path in the base model."""
    from peft.tuners.lora import LoraLayer

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return {
        name.replace(".base_layer", ""): module
        for name, module in base.named_modules()
        if isinstance(module, LoraLayer) and (adapter in module.lora_A or adapter in module.lora_embedding_A)
    }


def factors(layer: Any, adapter: str = "default") -> tuple[nn.Parameter, nn.Parameter]:
    """A (r, in) and B (out, r)."""
    if adapter in layer.lora_embedding_A:
        return layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight


def same(one: Tensor, other: Tensor) -> bool:
    """Equal to the bit, wherever the two lie."""
    return torch.equal(one.detach().cpu(), other.detach().cpu())


def place(model: nn.Module) -> torch.device:
    """Where a model computes."""
    return next(model.parameters()).device


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def only_a_trains(model: nn.Module, adapter: str = "default") -> bool:
    names = trainable(model)
    return bool(names) and all(f".lora_A.{adapter}." in n or n.endswith(f".lora_embedding_A.{adapter}") for n in names)


def train(model: nn.Module, windows: Tensor, *, steps: int, rate: float = 1e-3, batch: int = 1) -> list[float]:
    """AdamW over the windows in order, as a Trainer would without its scheduler; returns the loss of each step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.01)
    model.train()
    losses = []
    for step in range(steps):
        window = windows[[(step * batch + i) % len(windows) for i in range(batch)]].to(place(model))
        loss = model(input_ids=window, labels=window).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def sine(one: Tensor, other: Tensor) -> float:
    """Sine of the largest angle between two column spaces of equal rank."""
    a, _ = torch.linalg.qr(one.detach().cpu().double())
    b, _ = torch.linalg.qr(other.detach().cpu().double())
    return float(torch.linalg.matrix_norm(b - a @ (a.T @ b), 2))


def float32_angle(bank: Bank, name: str, rank: int) -> float:
    """How far an SVD in float32, as PEFT runs it, may turn the minor subspace of ``rank``: backward error over gap (Wedin).

    LAPACK's backward error is a modest multiple of ε·σ_max; 32 covers the sizes here. The bank itself is computed in float64.
    """
    upper, lower = bank.sigma([name], rank + 1)[name][:2].tolist()
    return 32 * torch.finfo(torch.float32).eps * bank[name].certificate.sigma_max / (upper - lower)
