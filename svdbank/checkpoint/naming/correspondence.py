"""Which parameters of the loaded model the tensors of a checkpoint become: the table of ``architectures.py`` applied to names."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from svdbank.checkpoint.configuration import ModelFacts
from svdbank.checkpoint.dtypes import FLOATING
from svdbank.checkpoint.naming.architectures import ARCHITECTURES, UNKNOWN, Architecture, Blocks, Experts, Stack
from svdbank.core.specs import TensorSource

#: Slices a stacked tensor may have; the largest models have some hundreds of experts a layer.
MAX_EXPERTS = 1 << 14
#: And all stacked tensors of a checkpoint together: each slice is a weight to plan, and a few bytes of a file could claim many.
MAX_SLICES = 1 << 18

_EXPERT = re.compile(r"(.*\bexperts)\.([0-9]{1,9})\.([^.]+)\.weight")
#: Classes that hang a head on the bare model, which they keep under ``base_model_prefix``.
_WITH_HEAD = re.compile(r"For[A-Z]|LMHead|DoubleHeads|WithProjection|WithLMHead")
_HEADS = re.compile(
    r"(lm_head|embed_out|proj_out|cls|classifier|score|qa_outputs|generator_lm_head|vocab_projector|predictions)\."
)


@dataclass(frozen=True)
class Parameter:
    """A parameter of the loaded model, or slice ``expert`` of one, and the tensors it is made of.

    Several ``sources`` have their rows under each other. ``transposed``: what is stored is (in, out).
    """

    name: str
    sources: tuple[TensorSource, ...]
    expert: int | None = None
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape as stored, all sources together."""
        first = self.sources[0].shape
        return first if len(self.sources) == 1 else (sum(source.shape[0] for source in self.sources), *first[1:])


@dataclass(frozen=True)
class Correspondence:
    """``parameters`` in the order of the tensors; ``names`` of tensors in the loaded model; ``incomplete`` tensors with a reason."""

    parameters: list[Parameter]
    names: dict[str, str]
    incomplete: dict[str, str]


def is_listed(about: ModelFacts) -> bool:
    """True for a model type of the table."""
    return about.model_type in ARCHITECTURES


def architecture_of(about: ModelFacts) -> Architecture:
    """The model's row of the table."""
    return ARCHITECTURES.get(about.model_type, UNKNOWN)


def correspondence(tensors: Mapping[str, TensorSource], about: ModelFacts) -> Correspondence:
    """What each tensor of a checkpoint is part of in the loaded model."""
    naming = Naming(tensors, about)
    parameters: list[Parameter] = []
    incomplete: dict[str, str] = {}
    names: dict[str, str] = {}
    slices = 0
    grouped: dict[tuple[str, Experts], dict[tuple[int, int], TensorSource]] = defaultdict(dict)
    for stored, source in tensors.items():
        name = names[stored] = naming.loaded(stored)
        rows = naming.rows(name)
        if len(source.shape) == 2 and (found := expert_of(name, rows)) is not None:
            container, rule, expert, part = found
            names[stored] = f"{container}.{rule.parameter}"
            grouped[names[stored], rule][expert, part] = source
        elif (stack := _stack_of(name, source, rows)) is not None:
            slices += source.shape[0]
            if slices > MAX_SLICES:
                incomplete[stored] = f"one of more than {MAX_SLICES:,} stacked experts: no model has so many"
                continue
            for expert in range(source.shape[0]):
                parameters.append(Parameter(name, (source.part(expert),), expert, stack.transposed))
        elif (blocks := _blocks_of(name, source, rows)) is not None:
            if source.quantisation is not None:
                incomplete[stored] = f"quantised, and loaded as {len(blocks.modules)} modules: its scales are not taken apart"
                continue
            path = name.removesuffix(f"{blocks.stored}.weight")
            for block, module in enumerate(blocks.modules):
                parameters.append(Parameter(f"{path}{module}.weight", (source.block(block, len(blocks.modules)),)))
        else:
            parameters.append(Parameter(name, (source,), transposed=_is_conv1d(name, source, rows)))
    for (parameter, rule), members in grouped.items():
        if (reason := _incomplete(parameter, rule, members)) is not None:
            incomplete.update((source.name, reason) for source in members.values())
            continue
        for expert in range(len(members) // len(rule.parts)):
            sources = tuple(members[expert, part] for part in range(len(rule.parts)))
            parameters.append(Parameter(parameter, sources, expert))
    return Correspondence(_apart(parameters, incomplete), names, incomplete)


def _apart(parameters: list[Parameter], incomplete: dict[str, str]) -> list[Parameter]:
    """``parameters`` without those that others are loaded as too; their tensors go to ``incomplete``."""
    first: dict[tuple[str, int | None], Parameter] = {}
    for parameter in parameters:
        other = first.setdefault((parameter.name, parameter.expert), parameter)
        if other is not parameter:
            stored = (other.sources[0].name, parameter.sources[0].name)
            incomplete.update(dict.fromkeys(stored, f"loaded as {parameter.name}, and so is {stored[0]}"))
    if not incomplete:
        return parameters
    return [parameter for parameter in parameters if not any(source.name in incomplete for source in parameter.sources)]


class Naming:
    """Names in the loaded model, and the rows of the table that apply to them: the model's own and those of its parts."""

    def __init__(self, tensors: Iterable[str], about: ModelFacts) -> None:
        self._root = architecture_of(about)
        self._parts = [(f"{path}.", ARCHITECTURES.get(about.parts.get(key, ""), UNKNOWN)) for key, path in self._root.parts]
        prefix = f"{self._root.prefix}." if self._root.prefix else ""
        bare = bool(about.architectures) and not _WITH_HEAD.search(about.architectures[0])
        has_prefix = any(_renamed(name, self._root).startswith(prefix) for name in tensors)
        self._added = "" if has_prefix else prefix
        # Paths in the table are those of the model with a head. The bare model has them without the prefix, and so has a
        # checkpoint that does not say which it is.
        self._removed = prefix if bare or (self._added and not about.architectures) else ""

    def loaded(self, stored: str) -> str:
        name = _renamed(stored, self._root)
        if self._added and not _HEADS.match(name):
            name = self._added + name
        for path, row in self._parts:
            if name.startswith(path):
                name = path + _renamed(name.removeprefix(path), row)
        return name.removeprefix(self._removed)

    def rows(self, loaded: str) -> tuple[Architecture, ...]:
        within = self._removed + loaded
        return (self._root, *(row for path, row in self._parts if within.startswith(path)))


def _renamed(name: str, row: Architecture) -> str:
    for pattern, replacement in row.renames:
        name = re.sub(pattern, replacement, name, count=1)
    return name


def expert_of(name: str, rows: tuple[Architecture, ...]) -> tuple[str, Experts, int, int] | None:
    """(path of the experts, rule, expert, position among the rule's parts) of a matrix that is loaded as part of a larger one."""
    if not any(row.experts for row in rows) or (match := _EXPERT.fullmatch(name)) is None:
        return None
    container, expert, part = match.groups()
    for rule in _rules(row.experts for row in rows):
        if part in rule.parts:
            return container, rule, int(expert), rule.parts.index(part)
    return None


def _rules(tables: Iterable[tuple[Experts, ...]]) -> Iterator[Experts]:
    for table in tables:
        yield from table


def _stack_of(name: str, source: TensorSource, rows: tuple[Architecture, ...]) -> Stack | None:
    if len(source.shape) != 3 or source.shape[0] > MAX_EXPERTS or 0 in source.shape or source.dtype not in FLOATING:
        return None
    return next((stack for row in rows for stack in row.stacks if name.endswith("." + stack.parameter)), None)


def _blocks_of(name: str, source: TensorSource, rows: tuple[Architecture, ...]) -> Blocks | None:
    if len(source.shape) != 2 or 0 in source.shape or source.dtype not in FLOATING:
        return None
    for row in rows:
        for blocks in row.blocks:
            if name.endswith(f"{blocks.stored}.weight") and source.shape[0] % len(blocks.modules) == 0:
                return blocks
    return None


def _is_conv1d(name: str, source: TensorSource, rows: tuple[Architecture, ...]) -> bool:
    own = name.removesuffix(".weight").rpartition(".")[2]
    return len(source.shape) == 2 and any(own in row.conv1d for row in rows)


def _incomplete(parameter: str, rule: Experts, members: Mapping[tuple[int, int], TensorSource]) -> str | None:
    """Why the matrices of ``parameter`` do not stack, or None: every expert has every part, alike in shape and dtype."""
    experts = max(expert for expert, _ in members) + 1
    if len(members) != experts * len(rule.parts):
        lacking = next((e, p) for e in range(experts) for p in range(len(rule.parts)) if (e, p) not in members)
        return (
            f"loaded as one {parameter} of {experts} experts, and {rule.parts[lacking[1]]} of expert {lacking[0]} is not here"
        )
    for part in range(len(rule.parts)):
        if len({(members[expert, part].shape, members[expert, part].dtype) for expert in range(experts)}) != 1:
            return f"loaded as one {parameter}, and its experts differ in shape or dtype"
    if len({(members[0, part].shape[1], members[0, part].dtype) for part in range(len(rule.parts))}) != 1:
        return f"loaded as one {parameter}, and {' and '.join(rule.parts)} differ in columns or dtype"
    return None
