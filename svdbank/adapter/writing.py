"""An :class:`~svdbank.adapter.model.Adapter` as a PEFT folder that any PEFT loads, with its parts kept beside their sum."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import msgspec

from svdbank.adapter.card import composed_card
from svdbank.adapter.checksums import tensor_file
from svdbank.adapter.components import Band, InBank
from svdbank.adapter.entries import by_module
from svdbank.adapter.experts import pattern_name, targets_of
from svdbank.adapter.folder import Factors, write_folder
from svdbank.adapter.model import Adapter
from svdbank.adapter.parts import parts_of
from svdbank.adapter.settings import COMPONENTS, AdapterCache, LoraSettings
from svdbank.adapter.spectra import compact
from svdbank.adapter.weights import AdaptedWeight
from svdbank.bank.index import base_digest
from svdbank.core.errors import OptionError
from svdbank.core.folders import output_folder


def write_adapter(adapter: Adapter, output: str | Path, *, trainable: bool = False, force: bool = False) -> Path:
    """Write an adapter folder, whole or not at all; :func:`svdbank.adapter.reading.read_adapter` reads the same adapter back.

    ``adapter_model.safetensors`` holds the sum of the components with every scale in A and α = r, so that loaders which know one α/r
    are right. Several components are kept in ``components.safetensors``, which PEFT ignores. With ``trainable`` the config says
    ``mica``, so that PEFT freezes B (and runs its SVDs unless it loads with ``low_cpu_mem_usage``); otherwise ``true``, with which it
    loads anywhere.

    Raises :class:`OptionError` for an adapter that touches no weight, ``trainable`` with factors outside the bank, or an output in use.
    """
    path = output_folder(output)
    if not adapter.weights:
        raise OptionError("this adapter touches no weight")
    if trainable and not all(weight.in_bank for weight in adapter.weights.values()):
        raise OptionError("B can stay frozen only where it stands on the bank's directions", hint="write it without trainable")
    factors, ranks = peft_factors(adapter.weights)
    settings = peft_settings(adapter, ranks, init="mica" if trainable else True)
    if trainable and settings.target_parameters:  # PEFT has no MiCA for parameters
        settings = msgspec.structs.replace(settings, init_lora_weights=True, inference_mode=False)
    cache = cache_of(adapter)
    extra = {} if len(adapter.names) < 2 else {COMPONENTS: tensor_file(parts_of(adapter))}
    readme = composed_card(settings, cache, adapter.names)
    write_folder(path, settings, factors, cache, whole=adapter.whole, readme=readme, extra=extra, force=force)
    return path


def peft_factors(weights: Mapping[str, AdaptedWeight]) -> tuple[dict[str, Factors], dict[str, int]]:
    """Factors by PEFT's module path, experts stacked; and the rank of each module or parameter as PEFT's patterns name it."""
    pairs = {key: compact(weight.total()) for key, weight in weights.items()}
    kinds = {key: weight.kind for key, weight in weights.items()}
    counts = {key.rpartition(".")[0]: weight.experts for key, weight in weights.items() if weight.kind == "expert"}
    factors = by_module(pairs, kinds, counts)
    ranks: dict[str, int] = {}
    for key, (A, _) in pairs.items():
        name = pattern_name(key, kinds[key])
        # PEFT keeps all experts of a parameter at one rank, the largest.
        ranks[name] = max(ranks.get(name, 0), A.shape[0])
    return factors, ranks


def peft_settings(adapter: Adapter, ranks: Mapping[str, int], *, init: bool | str) -> LoraSettings:
    """The config for factors whose scale is 1: α = r everywhere, other ranks by pattern."""
    common = Counter(ranks.values()).most_common(1)[0][0]
    other = {module: rank for module, rank in ranks.items() if rank != common}
    return msgspec.structs.replace(
        adapter.settings,
        base_model_name_or_path=adapter.base.name,
        revision=adapter.base.revision,
        r=common,
        lora_alpha=common,
        use_rslora=False,
        **targets_of(adapter.settings, {key: weight.kind for key, weight in adapter.weights.items()}),
        modules_to_save=sorted({name.rpartition(".")[0] for name in adapter.whole.replacing}) or None,
        rank_pattern=other,
        alpha_pattern=dict(other),
        init_lora_weights=init,
        inference_mode=True,
    )


def cache_of(adapter: Adapter) -> AdapterCache:
    """What ``svdbank.json`` says of an adapter."""
    components: dict[str, dict[str, tuple[Band, ...]]] = {name: {} for name in adapter.names}
    for key, weight in adapter.weights.items():
        for name, component in weight.components.items():
            components[name][key] = component.bands if isinstance(component, InBank) else ()
    sources = {key: weight.source for key, weight in adapter.weights.items() if weight.source is not None}
    return recorded(
        adapter.method if adapter.method not in ("milora", "pissa") else "lora",
        adapter.base.name or "",
        {key: (source.name, source.sha256) for key, source in sources.items()},
        components,
        rank=adapter.rank,
        known=len(sources) == len(adapter.weights),
    )


def recorded(
    method: str,
    base: str,
    sources: Mapping[str, tuple[str, str]],
    components: Mapping[str, Mapping[str, tuple[Band, ...]]],
    *,
    rank: int,
    band: Band | None = None,
    known: bool = True,
    bank_format: int = 1,
) -> AdapterCache:
    """``svdbank.json`` of an adapter on the weights of ``sources``: by the adapter's key, name in the bank and sha256.

    ``components`` are the bands of each, by name and key; ``band`` is their hull where nothing else is said. Where ``sources`` are not
    all that it touches (``known`` is False), it names no weights and no digest of theirs.
    """
    used = [edge for weights in components.values() for bands in weights.values() for own in bands for edge in own]
    hull = (min(used), max(used)) if used else (0, 0)
    return AdapterCache(
        format=1,
        method=method,
        band=hull if band is None else band,
        rank=rank,
        base=base,
        base_digest=base_digest(dict(sources.values()) if known else {}),
        bank_format=bank_format,
        weights=tuple(name for name, _ in sources.values()) if known else (),
        sources=dict(sources),
        components={name: dict(weights) for name, weights in components.items()},
    )
