"""Which weights of a bank an adapter takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from svdbank.adapter.settings import by_pattern
from svdbank.bank.reading import Bank
from svdbank.checkpoint.naming.targets import ALL_LINEAR_KINDS, parse_targets
from svdbank.core.errors import OptionError


def selected(bank: Bank, targets: str | Sequence[str], exclude: str | Sequence[str], layers: Sequence[int]) -> tuple[str, ...]:
    """Names of the bank's weights that the options select; an option that matches nothing is an error."""
    wanted = parse_targets(targets)
    chosen = tuple(
        name
        for name in bank.names
        if (wanted.all_linear and bank[name].kind in ALL_LINEAR_KINDS) or wanted.named(bank[name].module)
    )
    modules = [bank[name].module for name in chosen]
    silent = wanted.silent(modules)
    if silent or not chosen:
        held = sorted({bank[name].module.rpartition(".")[2] for name in bank.names})
        shown = silent or ([targets] if isinstance(targets, str) else list(targets))
        raise OptionError(
            f"{bank.place}: {', '.join(map(repr, shown))} matches no weight of this bank, which holds {', '.join(held)}",
            hint="svdbank build MODEL " + " ".join(f"--targets {name}" for name in shown) + " extends the bank",
        )
    if exclude:
        unwanted = parse_targets(exclude)
        out = {name for name in chosen if unwanted.named(bank[name].module)}
        silent = unwanted.silent(modules)
        if unwanted.all_linear or silent or not out:
            shown = silent or ([exclude] if isinstance(exclude, str) else list(exclude))
            raise OptionError(f"{', '.join(map(repr, shown))} leaves nothing out: it matches none of the {len(chosen)} weights")
        chosen = tuple(name for name in chosen if name not in out)
    if layers:
        there = {bank[name].record.layer for name in chosen}
        if missing := [layer for layer in layers if layer not in there]:
            numbers = sorted(layer for layer in there if layer is not None)
            raise OptionError(
                f"no targeted weight is in layer {missing[0]}",
                hint=f"layers {numbers[0]} to {numbers[-1]} have some" if numbers else "none of them is in a numbered layer",
            )
        chosen = tuple(name for name in chosen if bank[name].record.layer in set(layers))
    if not chosen:
        raise OptionError("no weight is left to adapt", hint="leave --exclude or --layers out")
    return chosen


#: Model types whose experts are (experts, in, out) without a word of it (``is_transposed``), so that PEFT exchanges their sides.
_EXCHANGED = frozenset({"llama4", "llama4_text"})


@dataclass(frozen=True)
class Adaptable:
    """Of selected weights those that take an adapter, by name in the bank; those ``left_out``, and in sentences why."""

    names: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def adaptable(
    bank: Bank,
    names: Sequence[str],
    targets: str | Sequence[str],
    model_type: str,
    *,
    stops: Mapping[str, int],
    pattern: Mapping[str, int] = MappingProxyType({}),
) -> Adaptable:
    """``names`` without what cannot be adapted and only ``all-linear`` selected.

    Left out are experts that PEFT takes the other way round, and matrices with fewer directions than ``stops`` says that no ``pattern``
    gives another rank: gates of a shared expert, routers of few experts. Raises :class:`OptionError` for such experts that a target
    names; a rank that is too large for a named weight, or for all, is refused where ranks are looked up.
    """
    exchanged = _exchanged_experts(bank, names, targets, model_type)
    rest = tuple(name for name in names if name not in set(exchanged))
    small = _too_small(bank, rest, targets, stops, pattern)
    notes = []
    if small:
        ends = sorted({bank[name].module.rpartition(".")[2] for name in small})
        least = min(min(bank[name].out_features, bank[name].in_features) for name in small)
        notes.append(
            f"{len(small)} weights have too few directions for the rank (the least {least}) and were left out: {', '.join(ends)}; "
            "a rank pattern takes them in"
        )
    if exchanged:
        notes.append("PEFT takes in and out of these experts the other way round, so they were left out")
    return Adaptable(tuple(name for name in rest if name not in set(small)), (*exchanged, *small), tuple(notes))


def _too_small(
    bank: Bank, names: Sequence[str], targets: str | Sequence[str], stops: Mapping[str, int], pattern: Mapping[str, int]
) -> tuple[str, ...]:
    wanted = parse_targets(targets)
    small = tuple(
        name
        for name in names
        if not wanted.named(bank[name].module)
        and not by_pattern(pattern, bank[name].module, 0)
        and min(bank[name].out_features, bank[name].in_features) < stops.get(name, 0)
    )
    return small if len(small) < len(names) else ()


def _exchanged_experts(bank: Bank, names: Sequence[str], targets: str | Sequence[str], model_type: str) -> tuple[str, ...]:
    found = tuple(name for name in names if model_type in _EXCHANGED and bank[name].stacked)
    wanted = parse_targets(targets)
    named = next((name for name in found if wanted.named(bank[name].module)), None)
    if named is not None:
        raise OptionError(
            f"{named}: PEFT takes in and out of the experts of {model_type} the other way round: adapters on them are not supported",
            hint="leave them out of --targets",
        )
    return found
