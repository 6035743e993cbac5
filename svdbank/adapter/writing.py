"""An :class:`~svdbank.adapter.model.Adapter` as a PEFT folder that any PEFT loads, with its parts kept beside their sum."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import msgspec
import safetensors.torch
from torch import Tensor

from svdbank.adapter.card import composed_card
from svdbank.adapter.components import InBank, compact, indices_of
from svdbank.adapter.experts import join, wrapper_paths
from svdbank.adapter.folder import Factors, write_folder
from svdbank.adapter.model import AdaptedWeight, Adapter
from svdbank.adapter.settings import COMPONENTS, AdapterCache, LoraSettings
from svdbank.bank.index import base_digest
from svdbank.core.errors import OptionError


def write_adapter(adapter: Adapter, output: str | Path, *, trainable: bool = False, force: bool = False) -> Path:
    """Write an adapter folder, whole or not at all; :func:`svdbank.adapter.reading.read_adapter` reads the same adapter back.

    ``adapter_model.safetensors`` holds the sum of the components with every scale in A and α = r, so that loaders which know one α/r
    are right. Several components are kept in ``components.safetensors``, which PEFT ignores. With ``trainable`` the config says
    ``mica``, so that PEFT freezes B (and runs its SVDs unless it loads with ``low_cpu_mem_usage``); otherwise ``true``, with which it
    loads anywhere.

    Raises :class:`OptionError` for an adapter that touches no weight, ``trainable`` with factors outside the bank, or an output in use.
    """
    path = Path(output).expanduser().resolve()
    if not adapter.weights:
        raise OptionError("this adapter touches no weight")
    if trainable and not all(weight.in_bank for weight in adapter.weights.values()):
        raise OptionError("B can stay frozen only where it stands on the bank's directions", hint="write it without trainable")
    factors, ranks = peft_factors(adapter.weights)
    settings = peft_settings(adapter, ranks, init="mica" if trainable else True)
    cache = cache_of(adapter)
    extra = {} if len(adapter.names) < 2 else {COMPONENTS: safetensors.torch.save(_parts(adapter), metadata={"format": "pt"})}
    readme = composed_card(settings, cache, adapter.names)
    write_folder(path, settings, factors, cache, readme=readme, extra=extra, force=force)
    return path


def peft_factors(weights: Mapping[str, AdaptedWeight]) -> tuple[dict[str, Factors], dict[str, int]]:
    """Factors by PEFT's module path, experts stacked; and the rank of each module or parameter as PEFT's patterns name it."""
    factors: dict[str, Factors] = {}
    ranks: dict[str, int] = {}
    experts: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}
    counts: dict[str, int] = {}
    for key, weight in weights.items():
        A, B = compact(weight.total())
        if weight.kind != "expert":
            factors[key] = Factors(A, B, embedding=weight.kind == "embedding")
            ranks[key] = A.shape[0]
            continue
        parameter, _, number = key.rpartition(".")
        experts.setdefault(parameter, {})[int(number)] = (A, B)
        counts[parameter] = weight.experts
    paths = wrapper_paths(list(experts))
    for parameter, pairs in experts.items():
        A, B = next(iter(pairs.values()))
        nothing = (A.new_zeros(1, A.shape[1]), B.new_zeros(B.shape[0], 1))
        every = [pairs.get(e, nothing) for e in range(max(counts[parameter], max(pairs) + 1))]
        factors[paths[parameter]] = Factors(*join(every))
        ranks[parameter] = factors[paths[parameter]].A.shape[0] // len(every)
    return factors, ranks


def peft_settings(adapter: Adapter, ranks: Mapping[str, int], *, init: bool | str) -> LoraSettings:
    """The config for factors whose scale is 1: α = r everywhere, other ranks by pattern."""
    common = Counter(ranks.values()).most_common(1)[0][0]
    other = {module: rank for module, rank in ranks.items() if rank != common}
    experts = [key for key, weight in adapter.weights.items() if weight.kind == "expert"]
    parameters = sorted({key.rpartition(".")[0] for key in experts})
    return msgspec.structs.replace(
        adapter.settings,
        base_model_name_or_path=adapter.base.name,
        revision=adapter.base.revision,
        r=common,
        lora_alpha=common,
        use_rslora=False,
        target_modules=[key for key, weight in adapter.weights.items() if weight.kind != "expert"],
        target_parameters=parameters or None,
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        modules_to_save=None,
        rank_pattern=other,
        alpha_pattern=dict(other),
        init_lora_weights=init,
        inference_mode=True,
    )


def cache_of(adapter: Adapter) -> AdapterCache:
    """What ``svdbank.json`` says of an adapter."""
    components: dict[str, dict[str, tuple[tuple[int, int], ...]]] = {name: {} for name in adapter.names}
    for key, weight in adapter.weights.items():
        for name, component in weight.components.items():
            components[name][key] = component.bands if isinstance(component, InBank) else ()
    used = [index for weights in components.values() for bands in weights.values() for index in indices_of(bands)]
    sources = {key: weight.source for key, weight in adapter.weights.items() if weight.source is not None}
    known = len(sources) == len(adapter.weights)
    return AdapterCache(
        format=1,
        method=adapter.method if adapter.method not in ("milora", "pissa") else "lora",
        band=(min(used), max(used) + 1) if used else (0, 0),
        rank=adapter.rank,
        base=adapter.base.name or "",
        base_digest=base_digest({source.name: source.sha256 for source in sources.values()} if known else {}),
        bank_format=1,
        weights=tuple(source.name for source in sources.values()) if known else (),
        sources={key: (source.name, source.sha256) for key, source in sources.items()},
        components=components,
    )


def _parts(adapter: Adapter) -> dict[str, Tensor]:
    """Each component's own factors; the directions only where the sum beside them does not hold them as columns."""
    tensors: dict[str, Tensor] = {}
    for key, weight in adapter.weights.items():
        total = weight.total()
        plain = isinstance(total, InBank) and total.max_rank == len(total.indices)
        for name, component in weight.components.items():
            A, B = component.factors
            tensors[f"{name}/{key}/A"] = A.contiguous()
            if not plain:
                tensors[f"{name}/{key}/B"] = B.contiguous()
    return tensors
