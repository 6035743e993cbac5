"""Whether a model forgets at the end of a document when positions begin anew there."""

from __future__ import annotations

from typing import Any

import torch

from svdbank.core.errors import OptionError

#: Largest difference of logits, of the largest one: sums in another order, rounded to the model's dtype.
_SAME = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 5e-2}


def refuse_stateful(model: Any, name: str) -> None:
    """Raise :class:`OptionError` for a model that carries a state from token to token: positions do not reset that.

    Such are those that Transformers calls stateful, and those with convolutions along the text. Needs no weights.
    """
    convolved = any(isinstance(module, torch.nn.Conv1d) and module.kernel_size[0] > 1 for module in model.modules())
    if getattr(model, "_is_stateful", False) or convolved:
        raise _refusal(model, name)


def check_packing(model: Any, name: str) -> None:
    """Raise :class:`OptionError` where two short documents in one row are not to the model what each is alone. Two small forward passes."""
    refuse_stateful(model, name)
    tokens = torch.arange(1, 13, device=model.device)
    cut = 5
    positions = torch.cat([torch.arange(cut), torch.arange(len(tokens) - cut)]).to(model.device)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            alone = torch.cat([_logits(model, tokens[:cut]), _logits(model, tokens[cut:])])
            packed = _logits(model, tokens, position_ids=positions[None])
    except (TypeError, ValueError) as cause:  # no such argument
        raise _refusal(model, name) from cause
    finally:
        model.train(was_training)
    if not float((packed - alone).abs().max()) <= _SAME.get(model.dtype, 5e-2) * float(alone.abs().max()):
        raise _refusal(model, name)


def _logits(model: Any, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=tokens[None], use_cache=False, **options).logits[0].float()
    return found


def _refusal(model: Any, name: str) -> OptionError:
    return OptionError(
        f"{name}: a {model.config.model_type} model carries what it has read past the end of a document, also where positions begin "
        "anew, so documents cannot be kept apart in one block",
        hint="leave --packing out",
    )
