"""A model as it was before an adapter, so that a refused one leaves nothing behind."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

#: Where a model keeps what was attached to it: a dict of adapter name → Attachment on the base model.
RECORD = "svdbank_attachments"

#: What PEFT and Transformers note on a base model.
_NOTES = ("peft_config", "_hf_peft_config_loaded")


class ModelState:
    """The module tree, what trains, and what is in training mode. References only, no copies."""

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._children = [(module, dict(module._modules), module.training) for module in root.modules()]
        self._grad = [(parameter, parameter.requires_grad) for parameter in root.parameters()]
        self._notes = {name: root.__dict__[name] for name in _NOTES if name in root.__dict__}

    def restore(self, adapter_name: str) -> None:
        """Take out every layer of ``adapter_name`` and put the rest back as it was."""
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        for layer, _, _ in self._children:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if isinstance(layer, BaseTunerLayer) and adapter_name in layer._all_available_adapter_names():
                    layer.delete_adapter(adapter_name)
                elif isinstance(layer, AuxiliaryTrainingWrapper) and adapter_name in layer._adapters:
                    layer.delete_adapter(adapter_name, None)
        for module, children, training in self._children:
            module._modules.clear()
            module._modules.update(children)
            module.training = training
        self.freeze_as_before()
        for name in _NOTES:
            self._root.__dict__.pop(name, None)
        self._root.__dict__.update(self._notes)
        self._root.__dict__.get(RECORD, {}).pop(adapter_name, None)

    def freeze_as_before(self) -> None:
        """What trains and what does not, as it was."""
        for parameter, grad in self._grad:
            parameter.requires_grad_(grad)


@contextlib.contextmanager
def as_it_was(model: Any, adapter_name: str) -> Iterator[None]:
    """On an error inside, the model as it was: without ``adapter_name`` where that was not there, else with the values it had."""
    root: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model
    configs = getattr(model, "peft_config", None)
    known = dict(configs) if isinstance(configs, dict) else {}
    if adapter_name in known:
        with _values_kept(model, adapter_name):
            yield
        return
    before = ModelState(root)
    active = model.active_adapters if known else None
    try:
        yield
    except BaseException:
        before.restore(adapter_name)
        if isinstance(configs, dict):
            configs.pop(adapter_name, None)
        if active:
            model.base_model.set_adapter(active)
            before.freeze_as_before()
        raise


@contextlib.contextmanager
def _values_kept(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """On an error inside, the parameters of an adapter and their values as they were: PEFT copies into them or puts others in place."""
    mark = f".{adapter_name}."
    kept = [
        (module, own, parameter, parameter.detach().clone(), parameter.requires_grad)
        for path, module in model.named_modules()
        for own, parameter in module._parameters.items()
        if parameter is not None and mark in f"{path}.{own}."
    ]
    try:
        yield
    except BaseException:
        for module, own, parameter, value, grad in kept:
            with torch.no_grad():
                module._parameters[own] = parameter.requires_grad_(grad)
                parameter.copy_(value)
        raise
