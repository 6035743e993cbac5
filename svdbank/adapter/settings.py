"""What an adapter folder's documents say: names of its files, the fields of PEFT's config, and what svdbank notes beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

from svdbank.core.expressions import ends
from svdbank.core.specs import Struct

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
CACHE = "svdbank.json"

#: Coefficients of each named component, for ``scale`` and ``drop``; PEFT does not know it.
COMPONENTS = "components.safetensors"

#: What a slim folder, one without B, has in place of a config; everything but B and the other files as they were.
SLIM, COEFFICIENTS, FILES = "slim.json", "coefficients.safetensors", "files"

#: What ``train`` leaves beside an adapter: its options and its figures.
TRAINING_CONFIG, TRAINING_FIGURES = "training.toml", "training.json"
OURS = frozenset(
    {
        CONFIG,
        WEIGHTS,
        CACHE,
        COMPONENTS,
        SLIM,
        COEFFICIENTS,
        FILES,
        "README.md",
        TRAINING_CONFIG,
        TRAINING_FIGURES,
    }
)


class LoraSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of PEFT's ``LoraConfig`` that decide what an adapter is. Fields of a file not named here are not used."""

    peft_type: Literal["LORA"] = "LORA"
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    r: int
    lora_alpha: int | float
    lora_dropout: float = 0.0
    use_rslora: bool = False
    fan_in_fan_out: bool = False
    bias: str = "none"
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, int | float] = {}
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    target_parameters: list[str] | None = None
    modules_to_save: list[str] | None = None
    use_dora: bool = False
    lora_bias: bool = False
    init_lora_weights: bool | str = True
    inference_mode: bool = True


class AdapterCache(Struct, frozen=True):
    """What svdbank knows about an adapter it wrote. ``band`` is half-open, 0 = the most minor direction of the bank.

    Attributes
    ----------
    band, rank
        Hull of the bands of all weights, and the largest rank. ``band`` is (0, 0) for an adapter that has no place in the bank.
    base, base_digest
        Name of the base, and the digest over the adapter's own weights, so that extending the bank does not change it; empty where unknown.
    weights
        Names in the bank.
    sources
        By the adapter's own name of a weight: its name in the bank, and the sha256 of the base's stored bytes.
    components
        By name, then by weight: the bands, most minor first; none for factors of their own. Where a weight has fewer columns than its
        bands have directions, as after a truncation, the columns of B lie in their span.
    files, settings, digest
        sha256 of the tensor files, of what decides in the config, and of this record (:mod:`svdbank.adapter.checksums`).
    """

    format: Literal[1]
    method: str
    band: tuple[int, int]
    rank: int
    base: str
    base_digest: str
    bank_format: int
    weights: tuple[str, ...]
    sources: dict[str, tuple[str, str]] = msgspec.field(default_factory=dict)
    components: dict[str, dict[str, tuple[tuple[int, int], ...]]] = msgspec.field(default_factory=dict)
    files: dict[str, str] = msgspec.field(default_factory=dict)
    settings: str = ""
    digest: str = ""


def by_pattern(patterns: Mapping[str, float], module: str, default: float) -> float:
    """PEFT's rule (``get_pattern_key``): the first pattern that matches the end of the path, at a dot. OptionError for what is none."""
    return next((value for own, value in patterns.items() if ends(module, own)), default)
