"""What an adapter adds to each weight of a model, and which weights those are in the base and in a bank."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

from svdbank.adapter.bands import projected, share_in
from svdbank.adapter.components import Component, InBank, Kind, combined, squared_norm
from svdbank.adapter.documents import BaseIdentity
from svdbank.adapter.naming import bank_names
from svdbank.adapter.spectra import truncated
from svdbank.bank.reading import Bank
from svdbank.core.errors import BankError, OptionError, WrongBaseError


@dataclass(frozen=True)
class BaseWeight:
    """A weight of the base: its name in the bank, and the sha256 of its stored bytes."""

    name: str
    sha256: str


@dataclass(frozen=True, eq=False)
class AdaptedWeight:
    """What an adapter adds to one weight (out, in): its components by name.

    ``source`` identifies the base's weight where that is known. ``experts`` is how many experts the parameter has of which this is one.
    """

    out_features: int
    in_features: int
    components: Mapping[str, Component]
    kind: Kind = "linear"
    source: BaseWeight | None = None
    experts: int = 0

    def total(self) -> Component:
        """The sum of the components, as one: what PEFT sees. Made once, and the same to the bit in whatever order they came."""
        return self._total

    @cached_property
    def _total(self) -> Component:
        return combined([(1.0, self.components[name]) for name in sorted(self.components)])

    @cached_property
    def squared_norm(self) -> float:
        """``‖ΔW‖²`` (Frobenius) in float64. Made once."""
        return squared_norm(self._total)

    def delta(self) -> Tensor:
        """``ΔW`` (out, in), float32, from a product in float64."""
        A, B = self.total().factors
        return (B.double() @ A.double()).float()

    def truncated(self, rank: int) -> AdaptedWeight:
        """The best approximation of ``ΔW`` of that rank, its components made one where something is cut."""
        total = self.total()
        if total.max_rank <= rank:
            return self
        return replace(self, components={"+".join(self.components): truncated(total, rank)})

    @property
    def in_bank(self) -> bool:
        """True when every component stands on directions of a bank."""
        return all(isinstance(component, InBank) for component in self.components.values())


def names_in(bank: Bank, weights: Mapping[str, AdaptedWeight]) -> dict[str, str]:
    """Name in the bank of each weight that the bank holds, by key."""
    recorded = {key: weight.source.name for key, weight in weights.items() if weight.source is not None}
    return bank_names(bank, list(weights), recorded)


def directions(bank: Bank, weights: Mapping[str, AdaptedWeight]) -> dict[str, Tensor]:
    """All left vectors (R, out) that a bank stores of each weight, most minor first."""
    names = names_in(bank, weights)
    missing = [key for key in weights if key not in names]
    if missing:
        raise BankError(
            f"{bank.place}: the bank lacks {len(missing)} weights of the adapter, first {missing[0]}",
            hint="svdbank build MODEL --targets … adds them",
        )
    for key, weight in weights.items():
        basis = bank[names[key]]
        if (basis.out_features, basis.in_features) != (weight.out_features, weight.in_features):
            raise WrongBaseError(f"{bank.place}: {names[key]} has another shape than {key} of the adapter")
    rows = bank.rows("left", names.values())
    return {key: rows[name] for key, name in names.items()}


def shares_in(bank: Bank, weights: Mapping[str, AdaptedWeight]) -> dict[str, float]:
    """Share of ``‖ΔW‖²`` of each weight that lies in the directions which a bank stores; 1 where ``ΔW`` is zero."""
    return {key: share_in(left, weights[key].total()) for key, left in directions(bank, weights).items()}


def rebased(
    bank: Bank, weights: Mapping[str, AdaptedWeight], minimum_share: float, *, force: bool
) -> tuple[dict[str, AdaptedWeight], BaseIdentity, str]:
    """The weights on the directions of another bank, its base, and a note of the least share kept.

    Raises :class:`OptionError` where a weight keeps less than ``minimum_share``, unless ``force``.
    """
    names = names_in(bank, weights)
    lefts = directions(bank, weights)
    shares = {key: share_in(left, weights[key].total()) for key, left in lefts.items()}
    worst = min(shares, key=shares.__getitem__)
    if shares[worst] < minimum_share and not force:
        raise OptionError(
            f"{bank.place}: its directions hold {shares[worst]:.6f} of what it does to {worst}, below {minimum_share:.6f}",
            hint="build that bank with a larger --rank, or force it and lose the rest",
        )
    moved = {
        key: replace(
            weight,
            components={name: projected(c, lefts[key], minimum_share) for name, c in weight.components.items()},
            source=BaseWeight(names[key], bank[names[key]].source_sha256),
        )
        for key, weight in weights.items()
    }
    base = BaseIdentity(
        bank.manifest.base.name, bank.manifest.base.revision, bank.base_digest(names.values()), tuple(names.values())
    )
    return (
        moved,
        base,
        f"carried over to {bank.place.rstrip('/').rpartition('/')[2]}: the least share kept is {shares[worst]:.6f}, of {worst}",
    )


def united(
    adapters: Sequence[Mapping[str, AdaptedWeight]],
    components_of: Callable[[str, Mapping[int, AdaptedWeight]], Mapping[str, Component]],
) -> dict[str, AdaptedWeight]:
    """The weights of all adapters. ``components_of`` gives a weight's components from its name and what each adapter, by number, does
    to it. Raises :class:`WrongBaseError` as :func:`check_bases` does."""
    check_bases(adapters)
    weights = {}
    for key in dict.fromkeys(key for adapter in adapters for key in adapter):
        parts = {number: adapter[key] for number, adapter in enumerate(adapters) if key in adapter}
        first = next(iter(parts.values()))
        source = next((weight.source for weight in parts.values() if weight.source), None)
        weights[key] = replace(first, components=components_of(key, parts), source=source)
    return weights


def check_bases(
    adapters: Sequence[Mapping[str, AdaptedWeight]],
    names: Sequence[str] = (),
    *,
    hint: str = "adapter.rebase(bank) carries one over",
) -> None:
    """Raise :class:`WrongBaseError` where one weight has two shapes or two hashes; it says in which adapters where ``names`` has theirs."""
    for (i, first), (j, second) in itertools.combinations(enumerate(adapters), 2):
        one, other = (names[i], names[j]) if names else ("one adapter", "another")
        for key, mine in first.items():
            theirs = second.get(key)
            if theirs is None:
                continue
            if (mine.out_features, mine.in_features) != (theirs.out_features, theirs.in_features):
                raise WrongBaseError(
                    f"{key} is ({mine.out_features}, {mine.in_features}) in {one} and ({theirs.out_features}, {theirs.in_features}) "
                    f"in {other}: they belong to different models"
                )
            if mine.source and theirs.source and mine.source.sha256 != theirs.source.sha256:
                raise WrongBaseError(
                    f"{f'{one} and {other}' if names else 'these adapters'} were made on different bases: {key} had other bytes",
                    hint=hint,
                )
