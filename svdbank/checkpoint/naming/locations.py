"""Where in the loaded model the modules of older Transformers are: under other names, or as rows of a parameter that stacks experts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from svdbank.checkpoint.configuration import ModelFacts, facts
from svdbank.checkpoint.naming.correspondence import Naming, architecture_of, expert_of
from svdbank.checkpoint.naming.matrices import KNOWN, in_table, transformers_version


@dataclass(frozen=True)
class Location:
    """A parameter of the loaded model; where it stacks experts, of slice ``expert`` the rows of block ``part`` among ``parts`` alike."""

    name: str
    expert: int | None = None
    part: int = 0
    parts: int = 1


def locations(names: Iterable[str], config: dict[str, Any], where: str) -> tuple[dict[str, Location], str]:
    """Where each of ``names`` is, parameters as a checkpoint or an adapter calls them; its own name where nothing else is known. And
    the prefix that a class with a head puts before the bare model.

    Every name by itself goes through the renames of its model type: those of Transformers where it is installed and the type or version
    is not in the table. Raises :class:`CheckpointError` for a configuration with a key of the wrong type.
    """
    about, version, given = facts(config, where), transformers_version(), list(names)
    if not config or (in_table(about) and (version is None or KNOWN[0] <= version < KNOWN[1])) or version is None:
        return _by_table(given, about)
    from svdbank.checkpoint.naming.tree import ModuleTree, UnknownModelError

    try:
        tree = ModuleTree(config, about)
    except UnknownModelError:
        return _by_table(given, about)
    found = tree.renamed(given)
    return {name: Location(*found[name]) if name in found else Location(name) for name in given}, tree.prefix


def _by_table(names: list[str], about: ModelFacts) -> tuple[dict[str, Location], str]:
    naming = Naming(names, about)
    found = {}
    for name in names:
        loaded = naming.loaded(name)
        expert = expert_of(loaded, naming.rows(loaded))
        if expert is None:
            found[name] = Location(loaded)
        else:
            container, rule, number, part = expert
            found[name] = Location(f"{container}.{rule.parameter}", number, part, len(rule.parts))
    return found, architecture_of(about).prefix
