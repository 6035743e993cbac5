"""A small model of any type in Transformers' tables, with seeded weights, as it is saved and loaded again."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.architectures.feeding import loss_of
from tests.architectures.mending import mended
from tests.architectures.shrinking import shrunk


def tables() -> dict[str, str]:
    """Model type → class, of every causal and image-text type that the installed Transformers has.

    A type that is in both tables is made of the class that takes images.
    """
    from transformers.models.auto import modeling_auto

    return {**modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}


def model_types() -> list[str]:
    """The names of every type, sorted."""
    return sorted(tables())


def model_class(model_type: str) -> Any:
    import transformers

    return getattr(transformers, tables()[model_type])


#: Errors that are read, one after another, before a model counts as one that cannot be made.
_ATTEMPTS = 8


class CannotBeMadeError(Exception):
    """No small model of the type: what it said last, with the class of the error."""


def small_model(model_type: str, seed: int = 0) -> nn.Module:
    """A model of that type in float32, in evaluation mode; no parameter is constant, all are finite."""
    model = _made(model_type, seed)
    fill(model, seed)
    return model


def _made(model_type: str, seed: int) -> nn.Module:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    of_type, kind = CONFIG_MAPPING[model_type], model_class(model_type)
    given: dict[str, Any] = {}  # what the class has to be told before it has defaults
    for _ in range(_ATTEMPTS):
        try:
            defaults = of_type(**given).to_dict()
            break
        except Exception as error:
            given = given or {name: {} for name in of_type.sub_configs}
            if not mended(given, error):
                raise CannotBeMadeError(_said(error)) from error
    errors = []
    for each_kind, wider in ((1, 1), (2, 1), (1, 4)):
        fields = shrunk(defaults, each_kind=each_kind, wider=wider)
        first: nn.Module | None = None
        for _ in range(_ATTEMPTS):
            torch.manual_seed(seed)
            try:
                model = kind._from_config(_config_for(kind, of_type(**copy.deepcopy(fields))), dtype=torch.float32).eval()
                first = first or model
                loss_of(model)
                return model
            except Exception as error:
                last = error
                if not mended(fields, error):
                    break
        if first is not None:
            return first  # it takes no text, or wants more than words
        errors.append(last)
    raise CannotBeMadeError(_said(errors[0])) from errors[0]


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _config_for(kind: Any, config: Any) -> Any:
    """The configuration, or that part of it which the class takes."""
    wanted = kind.config_class
    if wanted is None or isinstance(config, wanted):
        return config
    return next((part for part in _parts(config) if isinstance(part, wanted)), config)


def _parts(config: Any) -> Iterator[Any]:
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if part is not None:
            yield part
            yield from _parts(part)


@torch.no_grad()
def fill(model: nn.Module, seed: int) -> None:
    """Small random values where a parameter is constant or not finite: zeros hide what is lost, ones what is taken for something else."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if not parameter.is_floating_point():
            continue
        if not parameter.isfinite().all():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
        elif parameter.numel() and parameter.min() == parameter.max():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)


def saved(model: nn.Module, folder: Path) -> tuple[nn.Module, tuple[str, ...]]:
    """The model as its folder gives it back, and the parameters that are then not what they were, to the bit.

    The folder is what users have: one shard of safetensors and a config.json, under the names that Transformers stores.
    """
    anything: Any = model
    anything.save_pretrained(folder)
    loaded: nn.Module = type(anything).from_pretrained(folder).eval()
    return loaded, tuple(different(dict(model.named_parameters()), dict(loaded.named_parameters())))


def different(these: dict[str, torch.Tensor], those: dict[str, torch.Tensor]) -> Iterator[str]:
    """Names that only one of both has, and those whose values, shapes or dtypes differ."""
    for name in sorted(these.keys() | those.keys()):
        one, other = these.get(name), those.get(name)
        if one is None or other is None:
            yield f"{name}: only {'before' if other is None else 'after'}"
        elif one.dtype != other.dtype or one.shape != other.shape:
            yield f"{name}: {one.dtype} {tuple(one.shape)}, {other.dtype} {tuple(other.shape)} after"
        elif not torch.equal(one.detach().contiguous().view(torch.uint8), other.detach().contiguous().view(torch.uint8)):
            yield f"{name}: {float((one - other).abs().max()):.2g} apart"
