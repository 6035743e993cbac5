"""Which weights of a bank an adapter takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
            f"{bank.path}: {', '.join(map(repr, shown))} matches no weight of this bank, which holds {', '.join(held)}",
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


def too_small(
    bank: Bank, names: Sequence[str], targets: str | Sequence[str], rank: int, pattern: Mapping[str, int]
) -> tuple[str, ...]:
    """Those of ``names`` that ``all-linear`` alone selected and whose matrix has fewer directions than ``rank``: gates of a shared
    expert, routers of few experts. None of those that a target or ``pattern`` names, and none where nothing else would be left.
    """
    wanted = parse_targets(targets)
    small = tuple(
        name
        for name in names
        if not wanted.named(bank[name].module)
        and not by_pattern(pattern, bank[name].module, 0)
        and min(bank[name].out_features, bank[name].in_features) < rank
    )
    return small if len(small) < len(names) else ()


def said_small(bank: Bank, names: Sequence[str], rank: int) -> str:
    """A sentence on weights that are left out because they are :func:`too_small`."""
    ends = sorted({bank[name].module.rpartition(".")[2] for name in names})
    least = min(min(bank[name].out_features, bank[name].in_features) for name in names)
    return (
        f"{len(names)} weights have fewer than {rank} directions and were left out: {', '.join(ends)}; "
        f"a rank pattern takes them in, {ends[0]}={least} say"
    )
