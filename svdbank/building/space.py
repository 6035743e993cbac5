"""Bytes and files of a bank on the disk, before it is there."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np

from svdbank.bank.layout import STORED, rank_extent, vector_arrays
from svdbank.building.fetching import gigabytes
from svdbank.core import disk
from svdbank.core.errors import OptionError
from svdbank.core.specs import BuildOptions, FamilySpec, Plan

#: Large files that the Hub takes in one commit.
HUB_FILES = 25_000

#: Written beside the vectors: index, metadata, coordinate arrays. Generous; for the check of free space.
_OVERHEAD_PER_WEIGHT = 64 << 10


def family_bytes(family: FamilySpec, options: BuildOptions) -> int:
    """Bytes of a family's data files, the padding of the rank axis included."""
    itemsize = np.dtype(STORED[options.dtype][0]).itemsize
    each = sum(rank_extent(rank) * length * itemsize for rank, length in vector_arrays(family, options.side).values())
    return len(family.weights) * each


def bank_bytes(root: Path, plan: Plan) -> int:
    """Bytes that a build will still add below ``root``: what the plan comes to without what is there."""
    needed = sum(family_bytes(family, plan.options) + _OVERHEAD_PER_WEIGHT * len(family.weights) for family in plan.families)
    present = 0
    for family in plan.families:
        for file in (root / family.name).rglob("*"):
            # What a build under way writes and renames may be gone by now.
            with contextlib.suppress(FileNotFoundError):
                present += file.stat().st_size if file.is_file() else 0
    return needed - present


def file_count(plan: Plan) -> int:
    """Files that a build writes: data, then metadata and coordinate arrays of each family, then manifest, index, plan, root metadata."""
    arrays = {family.name: len(vector_arrays(family, plan.options.side)) for family in plan.families}
    return sum(arrays[shard.family] for shard in plan.shards) + sum(n + 23 for n in arrays.values()) + 4


def refuse_many_files(count: int, what: str) -> None:
    """OptionError for more files than the Hub takes in one commit: such a bank could not be shared."""
    if count > HUB_FILES:
        raise OptionError(
            f"{what} would be {count:,} files; the Hub takes {HUB_FILES:,} in one commit",
            hint="fewer --targets, or --side left",
        )


def refuse_full_disk(root: Path, plan: Plan) -> None:
    """OptionError where what is still to be written does not fit."""
    needed = bank_bytes(root, plan)
    if needed > (free := disk.free_bytes(root)):
        raise OptionError(
            f"{root}: the bank needs {gigabytes(needed)} more, {gigabytes(free)} are free",
            hint="choose another disk (-o, or SVDBANK_HOME for the cache), a smaller --rank, --side left, or --dtype float16",
        )
