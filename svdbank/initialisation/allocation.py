"""How much of a bank an adapter takes: ranks under a budget of trainable parameters, and bands that others leave free."""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from svdbank.adapter.components import Band, bands_of, indices_of
from svdbank.adapter.methods import RESIDUAL_METHODS, InitialisationMethod
from svdbank.adapter.model import Adapter
from svdbank.adapter.reading import read_adapter
from svdbank.adapter.starting import check_rank
from svdbank.adapter.weights import names_in
from svdbank.bank.reading import Bank
from svdbank.core.errors import BankError, OptionError
from svdbank.initialisation.configuration import ranks_by_pattern

#: Rank where none is asked for.
RANK = 16


def allocate(
    bank: Bank,
    names: Sequence[str],
    method: InitialisationMethod,
    *,
    rank: int | None = None,
    pattern: Mapping[str, int] | None = None,
    params: int | None = None,
    band: Band | str | None = None,
    beside: Sequence[str | Path | Adapter] = (),
) -> dict[str, Band]:
    """The half-open band of minor indices of each weight; for ``pissa`` [0, rank) counts from the largest.

    ``rank`` (16 by default) and its ``pattern`` by module, or a budget of ``params``; at ``band``, or next to the adapters ``beside``.
    Raises :class:`OptionError` for options that contradict each other, :class:`BankError` for more than the bank stores.
    """
    if params is not None and (rank is not None or pattern):
        raise OptionError("params chooses the ranks; a rank or a rank pattern beside it cannot be meant", hint="leave one out")
    automatic = band == "auto" or (band is None and bool(beside))
    if method in RESIDUAL_METHODS and (automatic or band is not None):
        raise OptionError(
            f"{method} trains both factors and keeps to no band; bands are MiCA's", hint="leave --band and --beside out"
        )
    fixed = None if automatic or band is None else _parsed(band)
    if fixed is not None and beside:
        raise OptionError("a band given and adapters to stay beside contradict each other", hint="--band auto")
    if fixed is not None and rank is not None and rank != fixed[1] - fixed[0]:
        raise OptionError(f"rank {rank} and band {fixed[0]}:{fixed[1]} contradict each other", hint="leave --rank out")
    others = adapters_of(beside, bank)
    if params is not None:
        starts = dict.fromkeys(names, fixed[0]) if fixed is not None else {}
        if automatic:
            starts = {name: start for name, (start, _) in next_bands(bank, dict.fromkeys(names, 1), others).items()}
        ranks = ranks_within(bank, names, params, method, starts)
    else:
        common = RANK if rank is None else rank
        ranks = ranks_by_pattern(bank, names, fixed[1] - fixed[0] if fixed is not None else common, pattern or {})
    start = fixed[0] if fixed is not None else 0
    for name, own in ranks.items():
        check_rank(bank, name, start + own, method=method)
    if automatic:
        return next_bands(bank, ranks, others)
    return {name: (start, start + own) for name, own in ranks.items()}


def adapters_of(beside: Sequence[str | Path | Adapter], bank: Bank) -> list[Adapter]:
    """Folders read."""
    return [other if isinstance(other, Adapter) else read_adapter(other, bank=bank) for other in beside]


def stops(
    bank: Bank, names: Sequence[str], rank: int | None, band: Band | str | None, beside: Sequence[Adapter]
) -> dict[str, int]:
    """How many minor directions each weight has to have, at the common rank: the end of its band, also next to those ``beside``."""
    if band is not None and band != "auto":
        return dict.fromkeys(names, _parsed(band)[1])
    common, taken = RANK if rank is None else rank, _taken(bank, beside)
    return {name: first_free(bands_of(taken.get(name, ())), common) + common for name in names}


def _parsed(band: Band | str) -> Band:
    if isinstance(band, str):
        match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", band)
        if match is None:
            raise OptionError(f"{band!r} is no band", hint="--band 16:32 for minor directions 16 to 31, or --band auto")
        band = (int(match[1]), int(match[2]))
    if not 0 <= band[0] < band[1]:
        raise OptionError(f"band {band[0]}:{band[1]} is empty", hint="--band 16:32 for minor directions 16 to 31")
    return band


def ranks_within(
    bank: Bank, names: Sequence[str], params: int, method: InitialisationMethod, starts: Mapping[str, int] | None = None
) -> dict[str, int]:
    """A rank for each weight so that at most ``params`` parameters train.

    One level for the whole model: each weight gets the directions with ``σ_k / σ_max`` up to that level (for ``pissa``, from that level
    up), at least one, and the level is the highest that the budget pays for. So rank goes where a weight has many directions that
    the base hardly uses, measured against its own strongest one. MiCA trains ``in`` parameters for each direction, MiLoRA and PiSSA
    ``in + out``. All experts of a parameter have one rank, from their mean.

    ``starts`` are minor indices to begin at. Raises :class:`OptionError` for a budget below one direction for each weight.
    """
    begin = starts or {}
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(bank[name].module, []).append(name)
    levels = _levels(bank, names, method, begin)
    cost = {
        group: sum(bank[m].in_features + (bank[m].out_features if method in RESIDUAL_METHODS else 0) for m in members)
        for group, members in groups.items()
    }
    least = sum(cost.values())
    if least > params:
        raise OptionError(
            f"{params} parameters are too few: one direction for each of {len(names)} weights takes {least}",
            hint="target fewer modules, or raise --params",
        )
    of_group = {group: _mean([levels[member] for member in members]) for group, members in groups.items()}
    taken = dict.fromkeys(groups, 1)
    spent = least
    waiting = [(of_group[group][1], group) for group in groups if len(of_group[group]) > 1]
    heapq.heapify(waiting)
    while waiting:
        _, group = heapq.heappop(waiting)
        if spent + cost[group] > params:
            break
        spent += cost[group]
        taken[group] += 1
        if taken[group] < len(of_group[group]):
            heapq.heappush(waiting, (of_group[group][taken[group]], group))
    return {member: taken[group] for group, members in groups.items() for member in members}


def _levels(
    bank: Bank, names: Sequence[str], method: InitialisationMethod, starts: Mapping[str, int]
) -> dict[str, list[float]]:
    """``σ_k / σ_max`` of each weight in the order in which its directions are taken; negative for ``pissa``, so that it ascends too."""
    levels = {}
    for name in names:
        largest = bank[name].certificate.sigma_max or 1.0
        if method == "pissa":
            levels[name] = (-bank.rows("principal_sigma", [name])[name] / largest).tolist()
        else:
            levels[name] = (bank.rows("sigma", [name])[name] / largest).tolist()[starts.get(name, 0) :]
    return levels


def _mean(rows: Sequence[list[float]]) -> list[float]:
    return [sum(column) / len(rows) for column in zip(*rows, strict=False)]


def next_bands(bank: Bank, ranks: Mapping[str, int], beside: Iterable[Adapter]) -> dict[str, Band]:
    """The lowest band of the asked rank, for each weight of the bank, that no adapter in ``beside`` uses.

    Outputs of adapters in disjoint bands are orthogonal. Components outside the bank take no band. Raises :class:`BankError` where the
    bank stores too few directions for that.
    """
    taken, bands = _taken(bank, beside), {}
    for name, rank in ranks.items():
        start = first_free(bands_of(taken.get(name, ())), rank)
        if start + rank > bank[name].rank:
            full = min(bank[name].out_features, bank[name].in_features)
            more = f", or svdbank build MODEL --rank {start + rank}" if start + rank <= full else f": it has {full} in all"
            raise BankError(
                f"{bank.place}: no free band of rank {rank} is left in {name}: it stores {bank[name].rank} directions, "
                f"{len(taken.get(name, ()))} are taken",
                hint=f"a smaller rank{more}",
            )
        bands[name] = (start, start + rank)
    return bands


def _taken(bank: Bank, adapters: Iterable[Adapter]) -> dict[str, set[int]]:
    """Minor indices that adapters use, by name in the bank."""
    taken: dict[str, set[int]] = {}
    for adapter in adapters:
        for key, name in names_in(bank, adapter.weights).items():
            taken.setdefault(name, set()).update(indices_of(adapter.bands(key)))
    return taken


def first_free(taken: Sequence[Band], rank: int) -> int:
    """The lowest start of ``rank`` indices that meet none of the ``taken`` bands (ascending, disjoint)."""
    start = 0
    for begin, end in taken:
        if start + rank <= begin:
            break
        start = max(start, end)
    return start
