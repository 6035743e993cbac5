"""What a folder's record claims about its factors, held against the tensors and, where there is one, the bank."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from torch import Tensor

from svdbank.adapter.bands import free, recover
from svdbank.adapter.components import Band, Component, Free, InBank, bands_of, indices_of, off_orthonormal
from svdbank.adapter.entries import Entry
from svdbank.adapter.folder import AdapterFolder
from svdbank.adapter.settings import CACHE
from svdbank.bank.reading import Bank
from svdbank.core.errors import CheckpointError

#: ‖BᵀB − I‖ up to which columns that a cache calls bank directions can be that without a bank at hand: bfloat16 rounds by 2⁻⁹.
_ORTHONORMAL = 2.0**-6

#: Directions of one weight, those of all components counted: a hundred thousand domains of rank 16.
_MOST = 1 << 21

#: The same for float32 columns, of which norms and inner products may be taken from coefficients alone: a few thousand entries
#: rounded by 6e-8 give about 1e-7.
FLOAT32_ORTHONORMAL = 1e-6


def placed(
    entries: Sequence[Entry], folder: AdapterFolder, bank: Bank | None, names: Mapping[str, str]
) -> tuple[dict[str, Component], list[str]]:
    """The component of each weight, in the bank where its tensors are, and a note where the record says otherwise."""
    claims = {entry.key: _claim(folder, entry) for entry in entries}
    found: dict[str, Component]
    if bank is None:
        found = {entry.key: _believed(entry, claims[entry.key]) for entry in entries}
        refuted = [
            e.key for e in entries if claims[e.key] and isinstance(found[e.key], Free) and not _in_span(e, claims[e.key])
        ]
        return found, _contradicted(
            folder, refuted if folder.cache is not None else [], "are not orthonormal, as directions of a bank are"
        )
    found = {entry.key: free(entry.A, entry.B, entry.scale) for entry in entries if entry.key not in names}
    lefts = _left_rows(bank, entries, names, claims)
    for entry in entries:
        if entry.key in lefts:
            found[entry.key] = recover(entry.A, entry.B, entry.scale, lefts[entry.key], claim=claims[entry.key])
    # Not where it was expected: now all that the bank stores is searched.
    elsewhere = [
        entry
        for entry in entries
        if isinstance(found[entry.key], Free) and len(lefts.get(entry.key, ())) < _stored(bank, names, entry)
    ]
    for key, left in _left_rows(bank, elsewhere, names, {}).items():
        entry = next(entry for entry in elsewhere if entry.key == key)
        found[key] = recover(entry.A, entry.B, entry.scale, left)
    refuted = [key for key, claim in claims.items() if key in names and claim and not _within(found[key], claim)]
    return {entry.key: found[entry.key] for entry in entries}, _contradicted(
        folder,
        refuted if folder.cache is not None else [],
        f"lie elsewhere in {bank.place.rstrip('/').rpartition('/')[2]}, or outside",
    )


def _stored(bank: Bank, names: Mapping[str, str], entry: Entry) -> int:
    return bank[names[entry.key]].rank if entry.key in names else 0


def _within(component: Component, claim: Sequence[Band]) -> bool:
    return isinstance(component, InBank) and set(component.indices) <= set(indices_of(claim))


def _contradicted(folder: AdapterFolder, keys: Sequence[str], how: str) -> list[str]:
    if not keys:
        return []
    return [
        f"{folder.path.name}: svdbank.json contradicts the tensors of {len(keys)} weights, first {keys[0]}: they {how}; "
        "the tensors are believed"
    ]


def _claim(folder: AdapterFolder, entry: Entry) -> tuple[Band, ...]:
    """The bands that the cache names for a weight, all components together; those of an ordinary MiCA adapter where there is no cache."""
    cache = folder.cache
    if cache is None:
        return ((0, entry.rank),)
    if not cache.components:
        return (cache.band,) if cache.band[1] - cache.band[0] == entry.rank else ()
    parts = [bands[entry.key] for bands in cache.components.values() if entry.key in bands]
    limit = min(entry.B.shape[0], entry.A.shape[1])
    bands = [band for part in parts for band in part]
    if any(not 0 <= start < stop <= limit for start, stop in bands) or sum(stop - start for start, stop in bands) > _MOST:
        raise CheckpointError(
            f"{folder.path / CACHE}: claims directions of {entry.key} that a weight of its shape does not have"
        )
    # A sum with free factors in it stands nowhere, whatever its other parts stand on.
    return bands_of(i for bands in parts for i in indices_of(bands)) if all(parts) else ()


def _believed(entry: Entry, claim: tuple[Band, ...]) -> Component:
    """Without a bank: the directions are what the cache says if they are orthonormal at all."""
    indices = indices_of(claim)
    if len(indices) != entry.B.shape[1]:
        return free(entry.A, entry.B, entry.scale)
    B = entry.B.float().flip(1)
    off = off_orthonormal(B)
    if off > _ORTHONORMAL:
        return free(entry.A, entry.B, entry.scale)
    C = (entry.A.flip(0).double() * entry.scale).float()
    return InBank(claim, C, B.contiguous(), orthonormal=off < FLOAT32_ORTHONORMAL)


def _in_span(entry: Entry, claim: tuple[Band, ...]) -> bool:
    """Whether B may be what a truncation leaves: fewer orthonormal columns than directions, in a span that only the bank can place."""
    return entry.B.shape[1] < len(indices_of(claim)) and off_orthonormal(entry.B) <= _ORTHONORMAL


def _left_rows(
    bank: Bank, entries: Sequence[Entry], names: Mapping[str, str], claims: Mapping[str, tuple[Band, ...]]
) -> dict[str, Tensor]:
    """Left vectors (R, out) of each weight, most minor first: as many as the claim needs, one bulk read for each number."""
    wanted: dict[int, list[str]] = defaultdict(list)
    for entry in entries:
        if entry.key in names:
            claim = claims.get(entry.key, ())
            stored = bank[names[entry.key]].rank
            wanted[min(stored, claim[-1][1] if claim else stored)].append(entry.key)
    rows = {}
    for rank, keys in wanted.items():
        read = bank.rows("left", dict.fromkeys(names[key] for key in keys), rank)
        rows.update({key: read[names[key]] for key in keys})
    return rows
