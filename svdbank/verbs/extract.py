"""``extract``: the best LoRA of rank r of what a fine-tuning changed, one weight at a time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from svdbank.adapter.documents import BaseIdentity
from svdbank.adapter.folder import check_apart, check_output
from svdbank.adapter.model import Adapter
from svdbank.adapter.settings import LoraSettings
from svdbank.adapter.writing import write_adapter
from svdbank.bank.reading import Bank
from svdbank.cache import open as open_cached
from svdbank.cache import opened
from svdbank.checkpoint.naming.targets import ALL_LINEAR
from svdbank.checkpoint.source import open_checkpoint
from svdbank.core.errors import BankError, OptionError, abridge
from svdbank.core.folders import output_folder
from svdbank.core.specs import ProgressCallback
from svdbank.fusion.difference import adapted_weights, differences, differing_tensors
from svdbank.fusion.extract_report import ExtractReport, report_of
from svdbank.fusion.pairing import differing_settings, pair_weights


def extract(
    base: str | os.PathLike[str],
    finetuned: str | os.PathLike[str],
    *,
    output: str | Path,
    rank: int = 16,
    targets: str | Sequence[str] = (ALL_LINEAR,),
    bank: Bank | str | os.PathLike[str] | None = None,
    task_type: str | None = None,
    force: bool = False,
    progress: ProgressCallback | None = None,
) -> ExtractReport:
    """Write the best rank-``rank`` LoRA of the difference between two checkpoints as a PEFT folder.

    Parameters
    ----------
    base, finetuned
        Folders, files or ``org/name[@revision]`` of models with the same weights.
    rank
        Of every weight; less where its difference has less.
    targets
        Which weights, in PEFT's language.
    bank
        A bank of the base, to say how much of the change lies in its minor directions: a bank, its folder, or a model whose bank is in
        the cache; by default the cached one if there is one.

    Weights are read one pair at a time. Raises :class:`OptionError` where the models do not have the same weights and shapes, or do not
    differ; :class:`NotFiniteError` for a weight with NaN or infinity.
    """
    if rank < 1:
        raise OptionError(f"a rank is at least 1, not {rank}")
    target = output_folder(output)
    check_output(target, force=force)
    check_apart(target, [base, finetuned])
    with open_checkpoint(base) as one, open_checkpoint(finetuned) as other:
        pairs = pair_weights(one, other, [targets] if isinstance(targets, str) else list(targets))
        held = opened(bank) if bank is not None else _cached(base)
        found = differences(one, other, pairs, rank=rank, bank=held, progress=progress)
        weights = adapted_weights(found, "extracted")
        outside = differing_tensors(one, other, [spec for spec, _ in pairs])
        if not weights:
            raise OptionError(
                f"{one.name} and {other.name}: the {len(pairs)} weights compared are the same to the bit",
                hint=f"what differs is {abridge(outside)}: name modules with --targets" if outside else "check the paths",
            )
        settings = LoraSettings(r=rank, lora_alpha=rank, task_type=task_type)
        identity = BaseIdentity(str(base) if one.revision is None else one.name, one.revision)
        path = write_adapter(Adapter(weights, identity, "lora", settings), output, force=force)
        configured = differing_settings(one.config, other.config)
        return report_of(found, outside, configured, adapter=path, base=one, finetuned=other, rank=rank, bank=held)


def _cached(base: str | os.PathLike[str]) -> Bank | None:
    with contextlib.suppress(BankError):
        return open_cached(base)
    return None
