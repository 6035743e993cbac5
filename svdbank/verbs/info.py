"""``info``: what a bank holds and how exact it is."""

from __future__ import annotations

import os
from collections import Counter

from svdbank import cache
from svdbank.bank.layout import RANK_CHUNK, bytes_read
from svdbank.bank.reading import Bank
from svdbank.building.checking import FamilyInfo, family_info
from svdbank.building.standing import UnfinishedInfo, unfinished_info
from svdbank.core.specs import Struct, quantised_formats


class SizeAtRank(Struct, frozen=True):
    """Bytes of vectors that a lookup of all weights at ``rank`` reads: left ones, and those of both sides (None where one is stored)."""

    rank: int
    left: int
    both: int | None


class BankInfo(Struct, frozen=True):
    """What a bank holds. ``unresolved`` counts (weight, rank) pairs whose subspace the data do not define to 1e-6.

    ``quantised`` counts the weights that the base stores as codes and scales, by format; the bank describes their values. ``tied`` maps
    the weights that share a decomposition, sides exchanged, to the weight that it is stored of: an output head to its embedding.
    ``sizes`` says what lookups of all weights read.
    """

    path: str
    model: str
    revision: str | None
    base_digest: str
    format: int
    rank: int | str
    side: str
    dtype: str
    weights: int
    nbytes: int
    families: tuple[FamilyInfo, ...]
    paths: dict[str, int]
    fallbacks: dict[str, tuple[str, ...]]
    unresolved: int
    quantised: dict[str, int]
    tied: dict[str, str]
    sizes: tuple[SizeAtRank, ...] = ()


def info(source: str | os.PathLike[str]) -> BankInfo | UnfinishedInfo:
    """Describe a bank, or the cached bank of a model, from its index; an unfinished build, or extension, by what stands at its place.

    Errors as :func:`svdbank.open`.
    """
    if (unfinished := unfinished_info(source)) is not None:
        return unfinished
    bank = cache.open(source)
    manifest = bank.manifest
    bank.coordinates([family.spec.name for family in bank.index.families], "sigma")  # at once: they may lie far away
    families = tuple(family_info(bank, family) for family in bank.index.families)
    records = [weight for family in bank.index.families for weight in family.weights]
    return BankInfo(
        path=bank.place,
        model=manifest.base.name,
        revision=manifest.base.revision,
        base_digest=manifest.base_digest,
        format=manifest.format,
        rank=manifest.options.rank,
        side=manifest.options.side,
        dtype=manifest.options.dtype,
        weights=len(bank),
        nbytes=manifest.nbytes,
        families=families,
        paths=dict(Counter(record.certificate.path for record in records)),
        fallbacks={record.name: record.certificate.tried for record in records if record.certificate.tried},
        unresolved=sum(family.unresolved for family in families),
        quantised=quantised_formats(bank[name].dtype for name in bank),
        tied={alias.name: alias.of for alias in bank.index.aliases},
        sizes=sizes_by_rank(bank),
    )


def sizes_by_rank(bank: Bank) -> tuple[SizeAtRank, ...]:
    """What lookups read at the ranks where one more chunk of vectors begins to be read, doubling, and at the largest."""
    options, families = bank.manifest.options, [family.spec for family in bank.index.families]
    ranks = [rank for rank in (RANK_CHUNK << power for power in range(bank.rank.bit_length())) if rank < bank.rank]
    found = []
    for rank in (*ranks, bank.rank):
        left, both = (sum(bytes_read(spec, side, options.dtype, rank) for spec in families) for side in ("left", "both"))
        found.append(SizeAtRank(rank, left, both if options.side == "both" else None))
    return tuple(found)
