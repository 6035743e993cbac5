"""Adapter folders on a loaded model, and which of them act."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def with_adapters(model: Any, stacks: Mapping[str, Sequence[str]]) -> Any:
    """The model with every folder loaded once, frozen, under its path as PEFT's name."""
    import torch

    if torch.cuda.is_available() and not getattr(model, "hf_device_map", None):
        model = model.to("cuda")
    if stacks:
        from svdbank.peft import load_adapter

        for folder in dict.fromkeys(folder for stack in stacks.values() for folder in stack):
            model = load_adapter(model, folder, adapter_name=_peft_name(folder), is_trainable=False)
    return model.eval()


@contextlib.contextmanager
def acting(model: Any, folders: Sequence[str]) -> Iterator[None]:
    """The model with exactly these adapters acting."""
    if folders:
        model.base_model.set_adapter([_peft_name(folder) for folder in folders], inference_mode=True)
        yield
    elif hasattr(model, "disable_adapter"):
        with model.disable_adapter():
            yield
    else:
        yield


def _peft_name(folder: str) -> str:
    """A name for PEFT: it becomes a part of module paths, so it holds no dot and no slash."""
    return "a" + hashlib.sha256(folder.encode()).hexdigest()[:16]
