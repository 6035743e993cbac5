"""What an adapter starts from, looked up in a bank: the factors of each method, and whether the bank holds what they need."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from svdbank.adapter.components import Band
from svdbank.adapter.entries import Entry
from svdbank.adapter.methods import RESIDUAL_METHODS, InitialisationMethod, count_floored, initial_factors, mica_factors
from svdbank.bank.reading import Bank
from svdbank.core.errors import BankError, OptionError


@dataclass(frozen=True)
class Start:
    """One weight of a bank, by name, with the band of minor indices (for ``pissa``, counted from the largest) and PEFT's scale s."""

    name: str
    band: Band
    scale: float = 1.0


def starting_factors(
    bank: Bank, starts: Sequence[Start], method: InitialisationMethod
) -> tuple[tuple[tuple[Tensor, Tensor], ...], int]:
    """A (rank, in) and B (out, rank) that ``method`` puts into each, float32, and how many singular values were floored.

    One bulk read of each array for each distinct end of a band.
    """
    pissa = method == "pissa"
    by_stop: dict[int, list[int]] = defaultdict(list)
    for number, start in enumerate(starts):
        by_stop[start.band[1]].append(number)
    factors: dict[int, tuple[Tensor, Tensor]] = {}
    floored = 0
    for stop, numbers in by_stop.items():
        names = list(dict.fromkeys(starts[number].name for number in numbers))
        lefts = (bank.principal_left if pissa else bank.left)(names, stop)
        if method not in RESIDUAL_METHODS:
            for number in numbers:
                name = starts[number].name
                columns = lefts[name][:, _columns(starts[number].band)]
                factors[number] = mica_factors(columns, bank[name].in_features)
            continue
        rights = (bank.principal_right if pissa else bank.right)(names, stop)
        sigmas = (bank.principal_sigma if pissa else bank.sigma)(names, stop)
        for number in numbers:
            name, own = starts[number].name, _columns(starts[number].band)
            sigma, largest = sigmas[name][own], bank[name].certificate.sigma_max
            factors[number] = initial_factors(
                method, lefts[name][:, own], sigma, rights[name][:, own], starts[number].scale, sigma_max=largest
            )
            floored += count_floored(sigma, largest)
    return tuple(factors[number] for number in range(len(starts))), floored


def _columns(band: Band) -> slice:
    """Of the vectors [0, stop) in PEFT's order, whose last column is index 0, the band [start, stop) is the first columns."""
    return slice(0, band[1] - band[0])


def initial_of(
    bank: Bank, entries: Sequence[Entry], names: Mapping[str, str], method: InitialisationMethod
) -> dict[str, tuple[Tensor, Tensor]]:
    """``A₀`` (r, in) and ``B₀`` (out, r) that MiLoRA or PiSSA started each weight of a folder from, float32; ``names`` are the bank's."""
    missing = [entry.key for entry in entries if entry.key not in names]
    if missing:
        raise BankError(f"{bank.place}: the bank holds no basis for {missing[0]}, which {method} starts from")
    starts = [Start(names[entry.key], (0, entry.rank), entry.scale) for entry in entries]
    factors, _ = starting_factors(bank, starts, method)
    return {entry.key: pair for entry, pair in zip(entries, factors, strict=True)}


def check_sides(bank: Bank, method: InitialisationMethod) -> None:
    """Raise :class:`BankError` where the bank stores less than ``method`` needs."""
    if method in RESIDUAL_METHODS and bank.side != "both":
        raise BankError(
            f"{bank.place}: {method} needs left and right vectors, and this bank holds left ones only",
            hint="svdbank build MODEL --side both",
        )
    if method == "pissa" and not bank.manifest.options.principal:
        raise BankError(
            f"{bank.place}: pissa starts from the largest singular values, and this bank holds the smallest only",
            hint="svdbank build MODEL --side both --principal RANK",
        )


def check_rank(bank: Bank, name: str, rank: int, *, method: InitialisationMethod = "mica") -> None:
    """Raise where ``rank`` is above what the weight allows (:class:`OptionError`) or the bank stores (:class:`BankError`)."""
    basis = bank[name]
    full = min(basis.out_features, basis.in_features)
    stored, end, option = basis.rank, "", "--rank"
    if method == "pissa":
        stored, end, option = basis.family.principal, "largest ", "--side both --principal"
    if not 1 <= rank <= full:
        more = f": the bank stores no more of it; svdbank build MODEL {option} {full} stores all" if stored < full else ""
        raise OptionError(
            f"rank {rank} is outside 1..{full}, what {name} of shape ({basis.out_features}, {basis.in_features}) allows",
            hint=f"ask for rank {min(stored, full)} or less, or give this module its own rank{more}",
        )
    if rank > stored:
        raise BankError(
            f"{bank.place}: rank {rank} was asked for, but the bank stores {stored} of the {full} {end}triplets of {name}",
            hint=f"ask for rank {stored} or less, or svdbank build MODEL {option} {rank}",
        )
