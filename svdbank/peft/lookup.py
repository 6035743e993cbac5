"""Lookup for the weights of a loaded model: which bank weight each module is, whether it is the same weight, and its basis.

Knows tensors and names only; ``svdbank.peft`` does the surgery on the model.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from svdbank.adapter.methods import InitialisationMethod
from svdbank.adapter.starting import Start, check_rank, check_sides, starting_factors
from svdbank.bank.reading import Bank
from svdbank.core.errors import BankError, OptionError, WrongBaseError, abridge
from svdbank.core.probe import differing, is_readable, sample
from svdbank.core.specs import Struct
from svdbank.peft.parts import under_other_paths
from svdbank.peft.targets import Target, as_in, of_module

#: Nothing of a model found may mean that its names are not those of its files.
_NONE_THERE = ", unless its type is loaded under other names than it is stored and not in the table of docs/architectures.md"


class UnverifiedBaseWarning(UserWarning):
    """Some weights could not be read (meta device, quantised, sharded), so only their names and shapes were compared."""


class Attachment(Struct, frozen=True):
    """What attaching found and did.

    Attributes
    ----------
    adapter
        Adapter name in PEFT.
    bank
        Where the bank lies.
    weights
        Names in the bank, in the model's order: one a module, one an expert of fused ones.
    unverified
        Those whose values could not be compared with the bank's probe.
    seconds
        Time by step: ``surgery`` (PEFT replacing modules), ``recognise``, ``read``, ``copy``; with ``bank="auto"`` also
        ``find or decompose``.
    method
        ``mica``, ``milora`` or ``pissa``.
    rounding
        What storing ``W' = W − s B A`` in the base's dtype lost: ``‖fl(W') − W'‖ / ‖W‖`` in the Frobenius norm over up to 64 rows of a
        weight, the largest of all weights; 0 for MiCA, which leaves the base alone.
    floored
        Singular values that were raised to the floor of :data:`svdbank.adapter.methods.SIGMA_FLOOR`, over all weights.
    decomposed
        Weights that ``bank="auto"`` had to decompose; 0 where a bank was there.
    """

    adapter: str
    bank: str
    weights: tuple[str, ...]
    unverified: tuple[str, ...]
    seconds: dict[str, float]
    method: InitialisationMethod = "mica"
    rounding: float = 0.0
    floored: int = 0
    decomposed: int = 0

    @property
    def state(self) -> Literal["verified", "unverified"]:
        """``verified`` when every weight's values were compared with the bank's probe and are equal."""
        return "unverified" if self.unverified else "verified"


@dataclass(frozen=True)
class Lookup:
    """Fresh factors for a list of targets: ``factors[i]`` is A (rank, in) and B (out, rank) of ``targets[i]``, float32, on the CPU."""

    names: tuple[str, ...]
    factors: tuple[tuple[Tensor, Tensor], ...]
    unverified: tuple[str, ...]
    floored: int
    seconds: dict[str, float]


def look_up(bank: Bank, targets: Sequence[Target], *, method: InitialisationMethod = "mica", prefix: str = "") -> Lookup:
    """Find, recognise and read what ``method`` starts ``targets`` from; nothing is read before every check has passed.

    ``prefix`` is the model's ``base_model_prefix``: a name is looked up as it is, else with the prefix added or removed, because a
    checkpoint saved from ``BertModel`` names its weights without the ``bert.`` that ``BertForMaskedLM`` has. What is not found so is looked
    for under other paths: a language model is a part of a multimodal one.

    Raises :class:`BankError` for weights the bank lacks or holds at a lower rank, and for a side that the method needs and the bank
    lacks; :class:`OptionError` for a rank above ``min(out, in)``; :class:`WrongBaseError` where shape or values differ.
    """
    begun = time.perf_counter()
    check_sides(bank, method)
    names = match(bank, targets, prefix=prefix)
    check_shapes(bank, names, targets)
    check_ranks(targets)
    for name, target in zip(names, targets, strict=True):
        check_rank(bank, name, target.rank, method=method)
    unverified = recognise(bank, names, targets)
    recognised = time.perf_counter()
    starts = [Start(name, (0, target.rank), target.scale) for name, target in zip(names, targets, strict=True)]
    factors, floored = starting_factors(bank, starts, method)
    done = time.perf_counter()
    return Lookup(names, factors, unverified, floored, {"recognise": recognised - begun, "read": done - recognised})


def check_ranks(targets: Sequence[Target]) -> None:
    """Raise :class:`OptionError` for matrices with fewer directions than are asked for, with what leaves them out or suits them."""
    small = [target for target in targets if target.rank > min(target.out_features, target.in_features)]
    if not small:
        return
    first = small[0]
    ways = [f"rank {min(min(target.out_features, target.in_features) for target in small)} suits all"]
    if len(small) < len(targets) and (modules := {target.module for target in small if not target.parameter}):
        ways.append(f"exclude_modules={_shortest(modules, targets)} leaves them out")
    if parameters := [target for target in small if target.parameter]:
        most = {target.parameter: min(target.out_features, target.in_features) for target in parameters}
        ways.append(f"rank_pattern={most} gives the parameters what they allow")
    raise OptionError(
        f"rank {first.rank} is outside 1..{min(first.out_features, first.in_features)}, what {first.label} of shape "
        f"({first.out_features}, {first.in_features}) allows" + (f"; so it is of {len(small) - 1} more" if small[1:] else ""),
        hint=", ".join(ways),
    )


def _shortest(modules: set[str], targets: Sequence[Target]) -> list[str]:
    """Names for PEFT that mean ``modules`` and no other target: the last component where that is enough, else the path."""
    others = {target.module.rpartition(".")[2] for target in targets if target.module not in modules}
    ends = {module: module.rpartition(".")[2] for module in modules}
    return sorted({module if end in others else end for module, end in ends.items()})


def match(bank: Bank, targets: Sequence[Target], *, prefix: str = "") -> tuple[str, ...]:
    """Bank names of the targets, in the same order. Raises :class:`BankError` for those the bank lacks."""
    held = modules_of(bank)
    found = [_find(bank, held, target, prefix) for target in targets]
    lacking = [i for i, name in enumerate(found) if name is None]
    for i, name in zip(lacking, under_other_paths(bank, held, [targets[i] for i in lacking]), strict=True):
        found[i] = name
    missing = [target.label for target, name in zip(targets, found, strict=True) if name is None]
    if missing:
        leaves = sorted({label.partition("[")[0].rpartition(".")[2] for label in missing})
        raise BankError(
            f"{bank.place}: the bank holds no basis for {abridge(missing)}",
            hint="svdbank build MODEL "
            + " ".join(f"--targets {leaf}" for leaf in leaves)
            + " adds them to the bank"
            + (_NONE_THERE if len(missing) == len(targets) else ""),
        )
    return tuple(name for name in found if name is not None)


def modules_of(bank: Bank) -> Mapping[str, Sequence[str]]:
    """Module path → names in the bank: one, or those of the experts where the module is a fused parameter."""
    held: dict[str, list[str]] = defaultdict(list)
    for name in bank.names:
        held[bank[name].module].append(name)
    return held


def _find(bank: Bank, held: Mapping[str, Sequence[str]], target: Target, prefix: str) -> str | None:
    candidates = [target.module]
    if prefix:
        candidates += [f"{prefix}.{target.module}", target.module.removeprefix(f"{prefix}.")]
    names = next((held[candidate] for candidate in candidates if candidate in held), ())
    return of_module(bank, names, target)


def check_shapes(bank: Bank, names: Sequence[str], targets: Sequence[Target]) -> None:
    wrong = [
        f"{name}: ({target.out_features}, {target.in_features}) in the model, "
        f"({bank[name].out_features}, {bank[name].in_features}) in the bank"
        for name, target in zip(names, targets, strict=True)
        if (target.out_features, target.in_features) != (bank[name].out_features, bank[name].in_features)
    ]
    if wrong and all(
        target.expert is not None
        and (target.in_features, target.out_features) == (bank[name].out_features, bank[name].in_features)
        for name, target in zip(names, targets, strict=True)
        if (target.out_features, target.in_features) != (bank[name].out_features, bank[name].in_features)
    ):
        raise BankError(
            f"{bank.place}: PEFT takes in and out of these experts the other way round, so their bases do not fit its layers "
            f"(Llama-4's are such); {abridge(wrong)}",
            hint="leave these parameters out of target_parameters: adapters on them are not supported",
        )
    if wrong:
        raise WrongBaseError(f"{bank.place}: this bank describes another model; {abridge(wrong)}", hint=_REBUILD)


def recognise(bank: Bank, names: Sequence[str], targets: Sequence[Target]) -> tuple[str, ...]:
    """Compare the sampled values of every readable weight with the bank's probe; returns the names that cannot be read.

    Raises :class:`WrongBaseError` naming the first weights that differ.
    """
    targets = [as_in(bank, name, target) for name, target in zip(names, targets, strict=True)]
    readable = [i for i, target in enumerate(targets) if is_readable(target)]
    if readable:
        stored = bank.probes([names[i] for i in readable])
        wrong = differing(sample([targets[i] for i in readable]), [stored[names[i]] for i in readable])
        if wrong:
            different = [names[readable[i]] for i in wrong]
            raise WrongBaseError(
                f"{bank.place}: {len(different)} of {len(readable)} weights of this model are not those the bank was built from: "
                f"{abridge(different)}",
                hint=_REBUILD,
            )
    known = set(readable)
    return tuple(name for i, name in enumerate(names) if i not in known)


_REBUILD = "load the model the bank was built from, or run svdbank build for this one"
