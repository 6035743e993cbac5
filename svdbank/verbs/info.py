"""``info``: what a bank holds and how exact it is."""

from __future__ import annotations

import os
from collections import Counter

from svdbank import cache
from svdbank.building.checking import FamilyInfo, family_info
from svdbank.building.standing import UnfinishedInfo, unfinished_info
from svdbank.core.specs import Struct, quantised_formats


class BankInfo(Struct, frozen=True):
    """What a bank holds. ``unresolved`` counts (weight, rank) pairs whose subspace the data do not define to 1e-6.

    ``quantised`` counts the weights that the base stores as codes and scales, by format; the bank describes their values. ``tied`` maps
    the weights that share a decomposition, sides exchanged, to the weight that it is stored of: an output head to its embedding.
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


def info(source: str | os.PathLike[str]) -> BankInfo | UnfinishedInfo:
    """Describe a bank, or the cached bank of a model, from its index; an unfinished build, or extension, by what stands at its place.

    Errors as :func:`svdbank.open`.
    """
    if (unfinished := unfinished_info(source)) is not None:
        return unfinished
    bank = cache.open(source)
    manifest = bank.manifest
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
    )
