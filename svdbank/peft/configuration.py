"""What a ``LoraConfig`` asks of a bank, and what cannot be asked together."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from svdbank.adapter.methods import METHODS, InitialisationMethod
from svdbank.core.errors import OptionError


def method_of(config: Any) -> InitialisationMethod | None:
    """The method that ``init_lora_weights`` names, in any capitalisation, or None for one that takes nothing from a bank."""
    value = getattr(config, "init_lora_weights", None)
    if not isinstance(value, str) or str(getattr(config.peft_type, "value", config.peft_type)) != "LORA":
        return None
    return next((method for method in METHODS if method == value.lower()), None)


def normalise(config: Any) -> None:
    """Spell the method as PEFT's freeze expects it, and refuse what it cannot be combined with (:class:`OptionError`)."""
    method = method_of(config)
    config.init_lora_weights = method
    if getattr(config, "ensure_weight_tying", False):
        raise OptionError(
            f"ensure_weight_tying cannot be combined with {method}: a tied embedding and head need two different bases",
            hint="target the embedding and the head each by name, without ensure_weight_tying",
        )
    variants = [field.name for field in fields(config) if field.metadata.get("is_lora_variant") and getattr(config, field.name)]
    if variants or getattr(config, "lora_bias", False):
        raise OptionError(
            f"{', '.join(variants) or 'lora_bias'} cannot be combined with init_lora_weights={method!r}: "
            f"it changes what the factors of a layer mean",
            hint="leave one of the two out",
        )
