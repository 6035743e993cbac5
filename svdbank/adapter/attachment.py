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

from svdbank.adapter.recognition import differing, is_readable, sample
from svdbank.bank.reading import Bank
from svdbank.errors import BankError, OptionError, WrongBaseError
from svdbank.specs import Struct

#: Names spelled out in an error before "and n more".
_NAMED = 3


class UnverifiedBaseWarning(UserWarning):
    """Some weights could not be read (meta device, quantised, sharded), so only their names and shapes were compared."""


@dataclass(frozen=True)
class Target:
    """One module that wants a basis: its path in the model, its weight as it lies in memory, and the rank asked for.

    ``weight`` is (out, in), or (in, out) where ``transposed`` (embeddings, Transformers' ``Conv1D``). The two ``features`` are the
    logical shape, also where the tensor in memory is packed, sharded or absent.
    """

    module: str
    weight: Tensor
    transposed: bool
    out_features: int
    in_features: int
    rank: int


class Attachment(Struct, frozen=True):
    """What attaching found and did.

    Attributes
    ----------
    adapter
        Adapter name in PEFT.
    bank
        Where the bank lies.
    weights
        Names in the bank, one a module, in the model's order.
    unverified
        Those whose values could not be compared with the bank's probe.
    seconds
        Time by step: ``surgery`` (PEFT replacing modules), ``recognise``, ``read``, ``copy``.
    """

    adapter: str
    bank: str
    weights: tuple[str, ...]
    unverified: tuple[str, ...]
    seconds: dict[str, float]

    @property
    def state(self) -> Literal["verified", "unverified"]:
        """``verified`` when every weight's values were compared with the bank's probe and are equal."""
        return "unverified" if self.unverified else "verified"


@dataclass(frozen=True)
class Lookup:
    """Bases for a list of targets: ``left[i]`` is (out, rank) in the bank's dtype, on the CPU, for ``targets[i]``."""

    names: tuple[str, ...]
    left: tuple[Tensor, ...]
    unverified: tuple[str, ...]
    seconds: dict[str, float]


def look_up(bank: Bank, targets: Sequence[Target], *, prefix: str = "") -> Lookup:
    """Find, recognise and read the left bases of ``targets``; nothing is read before every check has passed.

    ``prefix`` is the model's ``base_model_prefix``: a name is looked up as it is, else with the prefix added or removed, because a
    checkpoint saved from ``BertModel`` names its weights without the ``bert.`` that ``BertForMaskedLM`` has.

    Raises :class:`BankError` for weights the bank lacks or holds at a lower rank, :class:`OptionError` for a rank above
    ``min(out, in)``, :class:`WrongBaseError` where shape or values differ.
    """
    begun = time.perf_counter()
    names = match(bank, [target.module for target in targets], prefix=prefix)
    _check_shapes(bank, names, targets)
    _check_ranks(bank, names, targets)
    unverified = recognise(bank, names, targets)
    recognised = time.perf_counter()
    left = read_left(bank, names, [target.rank for target in targets])
    done = time.perf_counter()
    return Lookup(names, left, unverified, {"recognise": recognised - begun, "read": done - recognised})


def match(bank: Bank, modules: Sequence[str], *, prefix: str = "") -> tuple[str, ...]:
    """Bank names for module paths of a model, in the same order. Raises :class:`BankError` for those the bank lacks."""
    by_module = modules_of(bank)
    found = [_find(by_module, module, prefix) for module in modules]
    missing = [module for module, name in zip(modules, found, strict=True) if name is None]
    if missing:
        leaves = sorted({module.rpartition(".")[2] for module in missing})
        raise BankError(
            f"{bank.path}: the bank holds no basis for {_some(missing)}",
            hint="svdbank build MODEL " + " ".join(f"--targets {leaf}" for leaf in leaves) + " adds them to the bank",
        )
    return tuple(name for name in found if name is not None)


def modules_of(bank: Bank) -> Mapping[str, str]:
    """Module path → name in the bank, for all weights of a bank."""
    return {bank[name].module: name for name in bank.names}


def _find(by_module: Mapping[str, str], module: str, prefix: str) -> str | None:
    candidates = [module]
    if prefix:
        candidates += [f"{prefix}.{module}", module.removeprefix(f"{prefix}.")]
    return next((by_module[candidate] for candidate in candidates if candidate in by_module), None)


def _check_shapes(bank: Bank, names: Sequence[str], targets: Sequence[Target]) -> None:
    wrong = [
        f"{name}: ({target.out_features}, {target.in_features}) in the model, "
        f"({bank[name].out_features}, {bank[name].in_features}) in the bank"
        for name, target in zip(names, targets, strict=True)
        if (target.out_features, target.in_features) != (bank[name].out_features, bank[name].in_features)
    ]
    if wrong:
        raise WrongBaseError(f"{bank.path}: this bank describes another model; {_some(wrong)}", hint=_REBUILD)


def _check_ranks(bank: Bank, names: Sequence[str], targets: Sequence[Target]) -> None:
    for name, target in zip(names, targets, strict=True):
        check_rank(bank, name, target.rank)


def check_rank(bank: Bank, name: str, rank: int) -> None:
    """Raise where ``rank`` is above what the weight allows (:class:`OptionError`) or the bank stores (:class:`BankError`)."""
    basis = bank[name]
    full = min(basis.out_features, basis.in_features)
    if not 1 <= rank <= full:
        raise OptionError(
            f"rank {rank} is outside 1..{full}, what {name} of shape ({basis.out_features}, {basis.in_features}) allows",
            hint=f"ask for rank {full} or less, or give this module its own rank",
        )
    if rank > basis.rank:
        raise BankError(
            f"{bank.path}: rank {rank} was asked for, but the bank stores {basis.rank} of the {full} triplets of {name}",
            hint=f"svdbank build MODEL --rank {rank}",
        )


def recognise(bank: Bank, names: Sequence[str], targets: Sequence[Target]) -> tuple[str, ...]:
    """Compare the sampled values of every readable weight with the bank's probe; returns the names that cannot be read.

    Raises :class:`WrongBaseError` naming the first weights that differ.
    """
    readable = [i for i, target in enumerate(targets) if is_readable(target)]
    if readable:
        stored = bank.probes([names[i] for i in readable])
        wrong = differing(sample([targets[i] for i in readable]), [stored[names[i]] for i in readable])
        if wrong:
            different = [names[readable[i]] for i in wrong]
            raise WrongBaseError(
                f"{bank.path}: {len(different)} of {len(readable)} weights of this model are not those the bank was built from: "
                f"{_some(different)}",
                hint=_REBUILD,
            )
    known = set(readable)
    return tuple(name for i, name in enumerate(names) if i not in known)


def read_left(bank: Bank, names: Sequence[str], ranks: Sequence[int]) -> tuple[Tensor, ...]:
    """Left bases (out, rank) in the order of ``names``, with one bulk read for each distinct rank."""
    by_rank: dict[int, list[str]] = defaultdict(list)
    for name, rank in zip(names, ranks, strict=True):
        by_rank[rank].append(name)
    read = {rank: bank.left(list(dict.fromkeys(group)), rank) for rank, group in by_rank.items()}
    return tuple(read[rank][name] for name, rank in zip(names, ranks, strict=True))


_REBUILD = "load the model the bank was built from, or run svdbank build for this one"


def _some(items: Sequence[str]) -> str:
    rest = len(items) - _NAMED
    return ", ".join(items[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")
