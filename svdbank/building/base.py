"""Is a checkpoint the one that a bank was made from? By the hashes of its weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from svdbank.bank.layout import ShardRecord
from svdbank.bank.reading import Bank
from svdbank.building.fetching import files_of
from svdbank.checkpoint.source import Checkpoint
from svdbank.core.errors import WrongBaseError
from svdbank.core.probe import differing, taken
from svdbank.core.specs import BaseSpec, Progress, ProgressCallback, WeightSpec


def same_bytes(checkpoint: Checkpoint, bank: Bank, weights: Sequence[WeightSpec], progress: ProgressCallback) -> bool:
    """Hash the weights a published bank holds; True when all are what it was built from, to the byte.

    False when all of them, by their probes, hold the same values in another dtype: a base that was saved again. WrongBaseError
    for the first that is neither.
    """
    same = True
    for done, weight in enumerate(weights):
        same &= _same_bytes(checkpoint, bank, weight)
        progress(Progress("check base", done + 1, len(weights), "weights", weight.name))
    return same


def _same_bytes(checkpoint: Checkpoint, bank: Bank, weight: WeightSpec) -> bool:
    basis = bank[weight.name]
    if _is_pinned(checkpoint, weight, bank.manifest.base):
        return True
    matrix, found = checkpoint.read_hashed(weight)
    if found == basis.source_sha256:
        return True
    values = torch.tensor(taken(matrix), dtype=torch.float64).to(matrix.dtype)
    if weight.dtype == basis.dtype or differing([values], [basis.probe()]):
        raise _wrong_base(checkpoint, weight, bank.place)
    return False


def check_recorded(
    checkpoint: Checkpoint, weights: Sequence[WeightSpec], record: ShardRecord, base: BaseSpec, root: Path
) -> None:
    """WrongBaseError unless the weights of a recorded shard are those it was made of; ``base`` is the plan's."""
    for weight, recorded in zip(weights, record.weights, strict=True):
        if not _is_pinned(checkpoint, weight, base) and checkpoint.read_hashed(weight)[1] != recorded.source_sha256:
            raise _wrong_base(checkpoint, weight, root)


def _wrong_base(checkpoint: Checkpoint, weight: WeightSpec, root: Path | str) -> WrongBaseError:
    return WrongBaseError(
        f"{root} was built from another model: {weight.name} of {checkpoint.name} has other bytes",
        hint="give the bank another place with -o, or delete it",
    )


def _is_pinned(checkpoint: Checkpoint, weight: WeightSpec, base: BaseSpec) -> bool:
    """True for what is not on this machine and is, by name and commit, what the bank was made from: not fetched to be hashed."""
    remote = checkpoint.remote
    return (
        remote is not None
        and (checkpoint.name, checkpoint.revision) == (base.name, base.revision)
        and any(name in remote.files for name in files_of(weight))
    )
