"""A loss of a small model on random words: text where that is enough, and what else its ``forward`` says that it needs."""

from __future__ import annotations

import inspect
import re
import traceback
from typing import Any

import torch
from torch import Tensor, nn

from tests.architectures.shrinking import IMAGE, POSITIONS, VOCABULARY

_ATTEMPTS = 6


class NotFedError(Exception):
    """No inputs were found that the model takes: what it said to the last ones, and what those were."""


def loss_of(model: nn.Module, seed: int = 0) -> Tensor:
    """A loss on random token ids, which the model computes itself where it can, else the mean square of its first output."""
    errors: list[Exception] = []
    for length in (12, POSITIONS):
        given = _start(model, length, seed)
        for _ in range(_ATTEMPTS):
            try:
                return _loss(model(**given))
            except Exception as error:
                errors.append(error)
                if not _extend(given, model, error, length, seed):
                    break
    said = dict.fromkeys(f"{type(error).__name__}: {' '.join(str(error).split())}" for error in (errors[0], errors[-1]))
    raise NotFedError(f"{'; then '.join(said)} (given {', '.join(given)})") from errors[0]


def _extend(given: dict[str, Any], model: nn.Module, error: Exception, length: int, seed: int) -> bool:
    """What the error speaks of is added, or given another form; False where nothing is left to try."""
    pixels = given.get("pixel_values")
    if pixels is not None and pixels.ndim == 4 and "expected 5, got 4" in str(error):
        given["pixel_values"] = pixels[:, None]  # (images, frames, channels, height, width)
        return True
    rows = re.search(r"shape '\[-1, (\d+), \d+\]' is invalid", str(error))
    if rows and len(given["input_ids"]) == 2:
        given["input_ids"] = given["input_ids"].repeat(int(rows[1]), 1)  # one row a codebook
        given.pop("labels", None)
        return True
    more = {name: value for name in _named(model, error) if (value := _input(name, model, length, seed)) is not None}
    more = {name: value for name, value in more.items() if name not in given}
    given |= more
    return bool(more) or ("labels" in given and given.pop("labels") is not None)


def _start(model: nn.Module, length: int, seed: int) -> dict[str, Any]:
    names = _parameters(model)
    wanted = [name for name in ("input_ids", "labels") if name in names]
    wanted += [name for name, parameter in names.items() if parameter.default is inspect.Parameter.empty and name not in wanted]
    main = getattr(_base(model), "main_input_name", "input_ids")
    if main in names and main not in wanted and "input_ids" not in names:
        wanted.append(main)
    given = {name: value for name in wanted if (value := _input(name, model, length, seed)) is not None}
    free = any(own.kind == own.VAR_KEYWORD for own in inspect.signature(_base(model).forward).parameters.values())
    return given | ({"use_cache": False} if "use_cache" in names or free else {})


def _base(model: nn.Module) -> Any:
    anything: Any = model
    return anything.get_base_model() if hasattr(anything, "get_base_model") else anything


def _parameters(model: nn.Module) -> dict[str, inspect.Parameter]:
    found = inspect.signature(_base(model).forward).parameters
    return {name: own for name, own in found.items() if own.kind not in (own.VAR_KEYWORD, own.VAR_POSITIONAL)}


def _named(model: nn.Module, error: Exception) -> list[str]:
    """Inputs that the error names, or else those that are None and are read in the line where it failed."""
    names = _parameters(model)
    found = [name for name in names if re.search(rf"\b{name}\b", str(error))]
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        if found or "/transformers/models/" not in frame.f_code.co_filename:
            continue
        lines, start = inspect.getsourcelines(frame.f_code)
        words = re.findall(r"\w+", lines[line - start])
        found = [name for name in names if name in words or (f"{name}s" in words and frame.f_locals.get(name) is None)]
    return found


def _input(name: str, model: nn.Module, length: int, seed: int) -> Any:
    """A value for an input of this name; None where the name says nothing."""
    generator, config = torch.Generator().manual_seed(seed), _base(model).config
    ids = torch.randint(3, VOCABULARY // 2, (2, length), generator=generator)
    if name == "labels" or name.endswith("input_ids"):
        return ids
    if name == "state":
        return torch.randn(2, getattr(config, "max_state_dim", 32), generator=generator)
    if name in ("actions", "noise"):
        return torch.randn(2, getattr(config, "chunk_size", 8), getattr(config, "max_action_dim", 32), generator=generator)
    if name.endswith("attention_mask"):
        return torch.ones_like(ids)
    if name == "bbox":
        return torch.zeros(2, length, 4, dtype=torch.long)
    vision = _vision(config)
    side, channels = vision.get("image_size", IMAGE), vision.get("num_channels", vision.get("in_channels", 3))
    height, width = side if isinstance(side, list | tuple) else (side, side)
    if name == "pixel_values":
        return torch.randn(2, channels, height, width, generator=generator)
    if name == "flattened_patches":
        patch = vision.get("patch_size", 4)
        wide = vision.get("patch_embed_hidden_size", patch * patch * channels)
        values = torch.randn(2, 8, 2 + wide, generator=generator)
        values[..., :2] = torch.arange(8)[:, None] % 4
        return values
    return None


def _vision(config: Any) -> dict[str, Any]:
    for name in ("vision_config", "encoder"):
        part = getattr(config, name, None)
        if part is not None:
            return {**config.to_dict(), **part.to_dict()}
    return dict(config.to_dict())


def _loss(output: Any) -> Tensor:
    loss = output.get("loss") if hasattr(output, "get") else None
    if loss is not None:
        return loss.float().mean()
    for value in output.values() if hasattr(output, "values") else output:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.float().square().mean()
    raise NotFedError(f"{type(output).__name__} holds no numbers")
