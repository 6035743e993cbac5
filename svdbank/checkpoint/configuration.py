"""``config.json``: the few keys this package reads, checked by type, and a digest of what defines the model.

Nothing from the file is ever passed on as keyword arguments, and nothing in it can make code run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from svdbank.core.errors import CheckpointError

#: Keys that change without the model changing: where it was saved, by what, and in which dtype it is to be loaded.
VOLATILE = frozenset({"_name_or_path", "_commit_hash", "transformers_version", "torch_dtype", "dtype", "_attn_implementation"})

#: Nested configurations of the language part of multimodal models.
_TEXT_PARTS = ("text_config", "llm_config", "language_config", "decoder")


#: What to do about a configuration that no library writes.
AGAIN = "config.json was edited or damaged: take it from the model's repository again"


@dataclass(frozen=True)
class ModelFacts:
    """What ``config.json`` says about the weights; a key that is absent is None or empty.

    ``parts`` are the model types of nested configurations by their key, e.g. ``{"text_config": "llama"}``.
    """

    model_type: str
    architectures: tuple[str, ...]
    vocab_size: int | None
    tied: bool | None
    quantisation: dict[str, Any] | None
    parts: dict[str, str]


def facts(config: dict[str, Any], where: str = "config.json") -> ModelFacts:
    """Read the allow-listed keys; CheckpointError when one has a type it cannot have."""
    text = text_part(config)
    tied = _typed(config, "tie_word_embeddings", bool, where)
    vocab = _typed(config, "vocab_size", int, where)
    architectures = _typed(config, "architectures", list, where) or []
    if not all(isinstance(name, str) for name in architectures):
        raise CheckpointError(f"{where}: 'architectures' must be a list of strings", hint=AGAIN)
    return ModelFacts(
        model_type=_typed(config, "model_type", str, where) or "",
        architectures=tuple(architectures),
        vocab_size=vocab if vocab is not None else _typed(text, "vocab_size", int, where),
        tied=tied if tied is not None else _typed(text, "tie_word_embeddings", bool, where),
        quantisation=quantisation_of(config, where),
        parts=_part_types(config),
    )


def _part_types(config: Mapping[str, Any]) -> dict[str, str]:
    nested = ((key, value.get("model_type")) for key, value in config.items() if isinstance(value, dict))
    return {key: kind for key, kind in nested if isinstance(kind, str)}


def quantisation_of(config: Mapping[str, Any], where: str = "config.json") -> dict[str, Any] | None:
    """``quantization_config`` of the model or of its language part; None for a model that is not quantised."""
    for part in (config, text_part(config)):
        found: dict[str, Any] | None = _typed(part, "quantization_config", dict, where)
        if found is not None:
            return found
    return None


def text_part(config: Mapping[str, Any]) -> dict[str, Any]:
    """The nested configuration of a multimodal model's language part; empty when there is none."""
    return next((config[key] for key in _TEXT_PARTS if isinstance(config.get(key), dict)), {})


def digest(config: dict[str, Any]) -> str:
    """sha256 hex over canonical JSON of the configuration without its :data:`VOLATILE` keys, at any depth."""
    text = json.dumps(_stable(config), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _stable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _stable(item) for key, item in value.items() if key not in VOLATILE}
    if isinstance(value, list):
        return [_stable(item) for item in value]
    return value


def _typed(config: Mapping[str, Any], key: str, kind: type, where: str) -> Any:
    value = config.get(key)
    if value is None:
        return None
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise CheckpointError(f"{where}: {key!r} must be {kind.__name__}, found {type(value).__name__}", hint=AGAIN)
    return value
