"""An adapter folder in another form for the unchanged base: plain LoRA, or one rank and one scale for serving."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from svdbank.adapter.card import composed_card
from svdbank.adapter.entries import Entry, by_module, entries_of
from svdbank.adapter.experts import targets_of
from svdbank.adapter.folder import AdapterFolder, Factors, read_folder, write_folder
from svdbank.adapter.methods import restored, restored_alpha
from svdbank.adapter.reading import adapter_of
from svdbank.adapter.settings import AdapterCache, LoraSettings
from svdbank.adapter.whole import WholeTensors
from svdbank.adapter.writing import cache_of, recorded
from svdbank.core.errors import CheckpointError, OptionError

#: Ranks that vLLM accepts as ``--max-lora-rank`` (``MaxLoRARanks`` in vllm/config/lora.py, 0.14); 1 is left out: older ones lack it.
SERVED_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)

#: A and B of each weight, by the adapter's key.
Pairs = Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Converted:
    """A folder to be written: its config, its factors by PEFT's module paths, its record, its whole tensors."""

    settings: LoraSettings
    factors: dict[str, Factors]
    cache: AdapterCache
    whole: WholeTensors

    def write(self, output: Path, *, force: bool) -> None:
        """Write it as a folder that appears whole or not at all."""
        readme = composed_card(self.settings, self.cache, ())
        write_folder(output, self.settings, self.factors, self.cache, whole=self.whole, readme=readme, force=force)


def start_in(initial: str | Path, folder: AdapterFolder) -> dict[str, tuple[Tensor, Tensor]]:
    """A₀ and B₀ of each weight from the fresh folder that training began from. Raises :class:`CheckpointError` for another one."""
    start = {entry.key: (entry.A, entry.B) for entry in entries_of(read_folder(initial))}
    missing = [e.key for e in entries_of(folder) if e.key not in start or start[e.key][0].shape != e.A.shape]
    if missing:
        raise CheckpointError(f"{initial}: not what {folder.path} was trained from: {missing[0]} is missing or of another rank")
    return start


def as_lora(folder: AdapterFolder, start: Pairs | None) -> Converted:
    """A plain LoRA for the unchanged base, tensors kept to the bit. ``start`` is what a residual method began from (A₀, B₀)."""
    settings, factors, base = folder.settings, folder.factors, folder.settings.base_model_name_or_path
    entries = list(entries_of(folder))
    if start is None:
        cache = msgspec.structs.replace(cache_of(adapter_of(folder, method="lora")), method="lora")
    else:
        pairs = {entry.key: restored(entry.A, entry.B, *start[entry.key]) for entry in entries}
        factors, settings = _by_module(entries, pairs), _doubled(settings)
        cache = _outside_the_bank(folder, entries)
        base = folder.cache.base if folder.cache is not None else base
    settings = msgspec.structs.replace(
        settings, init_lora_weights=True, base_model_name_or_path=base or settings.base_model_name_or_path, inference_mode=True
    )
    return Converted(settings, factors, cache, folder.whole)


def for_inference(folder: AdapterFolder, start: Pairs | None) -> Converted:
    """One rank, one α = r, every scale in A: right also in servers that know a single α/r. ``start`` as in :func:`as_lora`.

    Raises :class:`OptionError` for a rank above what vLLM serves, and for whole trained tensors, which it does not take.
    """
    folder.whole.refuse_replacing(folder.path, "servers take factors alone")
    entries = list(entries_of(folder))
    pairs = {entry.key: (entry.A, entry.B) for entry in entries}
    base = folder.settings.base_model_name_or_path
    if start is not None:
        pairs = {entry.key: restored(entry.A, entry.B, *start[entry.key]) for entry in entries}
        base = folder.cache.base if folder.cache is not None else base
    largest = max(B.shape[1] for _, B in pairs.values())
    rank = next((allowed for allowed in SERVED_RANKS if allowed >= largest), None)
    if rank is None:
        raise OptionError(
            f"{folder.path}: rank {largest} is above {SERVED_RANKS[-1]}, the largest that vLLM serves",
            hint="Adapter.truncate(512) is the best approximation of that rank",
        )
    folded = {
        entry.key: _padded((pairs[entry.key][0].double() * entry.scale).float(), pairs[entry.key][1].float(), rank)
        for entry in entries
    }
    settings = msgspec.structs.replace(
        folder.settings,
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        use_rslora=False,
        rank_pattern={},
        alpha_pattern={},
        base_model_name_or_path=base,
        **targets_of(folder.settings, {entry.key: entry.kind for entry in sorted(entries, key=lambda entry: entry.key)}),
        modules_to_save=None,
        init_lora_weights=True,
        inference_mode=True,
    )
    cache = msgspec.structs.replace(_outside_the_bank(folder, entries), rank=rank)
    return Converted(settings, _by_module(entries, folded), cache, folder.whole)


def _padded(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Rows of A and columns of B up to ``rank`` with zeros, which add nothing to B A."""
    return torch.nn.functional.pad(A, (0, 0, 0, rank - A.shape[0])), torch.nn.functional.pad(B, (0, rank - B.shape[1]))


def _by_module(entries: Sequence[Entry], pairs: Pairs) -> dict[str, Factors]:
    return by_module(pairs, {entry.key: entry.kind for entry in entries})


def _doubled(settings: LoraSettings) -> LoraSettings:
    """The same scales at twice the rank."""
    rslora = settings.use_rslora
    return msgspec.structs.replace(
        settings,
        r=2 * settings.r,
        lora_alpha=restored_alpha(settings.lora_alpha, rslora=rslora),
        rank_pattern={key: 2 * rank for key, rank in settings.rank_pattern.items()},
        alpha_pattern={key: restored_alpha(alpha, rslora=rslora) for key, alpha in settings.alpha_pattern.items()},
    )


def _outside_the_bank(folder: AdapterFolder, entries: Sequence[Entry]) -> AdapterCache:
    """The record of factors that have no place in the bank: the base as it was recorded."""
    components = {folder.path.resolve().name: {entry.key: () for entry in entries}}
    rank = max(entry.rank for entry in entries)
    if folder.cache is not None:
        return msgspec.structs.replace(
            folder.cache, method="lora", band=(0, 0), rank=rank, bank_format=1, components=components
        )
    return recorded("lora", folder.settings.base_model_name_or_path or "", {}, components, rank=rank)
