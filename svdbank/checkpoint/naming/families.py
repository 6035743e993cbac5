"""Naming the families of a checkpoint: weights of one role and shape, stacked in one array of the bank."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Sequence

from svdbank.core.specs import WeightSpec

#: Longest slug: it becomes a folder's name.
MAX_SLUG = 120

_NUMBER = re.compile(r"[0-9]{1,9}")
_OUTSIDE = re.compile(r"[^a-z0-9._-]+")
_DIGITS = re.compile(r"([0-9]+)")


def numbers_of(module: str) -> tuple[str, int | None, int | None]:
    """(role, layer, expert): the module path without its numeric components, and what the numbers say.

    The number after ``expert`` or ``experts`` is the expert, the first other one the layer.
    """
    role: list[str] = []
    layer = expert = None
    for part in module.split("."):
        if not _NUMBER.fullmatch(part):
            role.append(part)
        elif role and role[-1] in ("expert", "experts"):
            expert = int(part)
        elif layer is None:
            layer = int(part)
    return ".".join(role), layer, expert


def natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key under which ``layers.10`` follows ``layers.9``."""
    return tuple((1, int(part), part) if part.isdecimal() else (0, 0, part) for part in _DIGITS.split(name))


def with_families(specs: Sequence[WeightSpec]) -> list[WeightSpec]:
    """``specs`` with family, layer and expert filled in, sorted by (family, layer, expert, natural name order).

    Give it every candidate of a checkpoint, not only those selected: a family's name must not depend on what else is targeted.
    """
    keys: dict[str, tuple[object, ...]] = {}
    sharing: dict[str, set[tuple[object, ...]]] = defaultdict(set)
    numbers = {spec.name: numbers_of(spec.module) for spec in specs}
    for spec in specs:
        key: tuple[object, ...] = (
            numbers[spec.name][0],
            spec.out_features,
            spec.in_features,
            spec.kind,
            spec.operation,
            spec.dtype,
        )
        keys[spec.name] = key
    slugs = {key: _slug(key) for key in set(keys.values())}
    for key, slug in slugs.items():
        sharing[slug].add(key)
    named = []
    for spec in specs:
        key = keys[spec.name]
        slug = slugs[key]
        _, layer, expert = numbers[spec.name]
        if spec.expert is not None:
            expert = spec.expert
        family = slug if len(sharing[slug]) == 1 else f"{slug}-{_short_hash(key)}"
        named.append(_replace(spec, family, layer, expert))

    def order(spec: WeightSpec) -> tuple[object, ...]:
        layer = -1 if spec.layer is None else spec.layer
        return spec.family, layer, -1 if spec.expert is None else spec.expert, natural(spec.name)

    return sorted(named, key=order)


def _slug(key: tuple[object, ...]) -> str:
    role, out_features, in_features = str(key[0]), key[1], key[2]
    shape = f"-{out_features}x{in_features}"
    text = _OUTSIDE.sub("-", role.lower()).strip("._-") or "weight"
    if len(text) + len(shape) > MAX_SLUG:
        text = f"{text[: MAX_SLUG - len(shape) - 9]}-{_short_hash(key)}"
    return text + shape


def _short_hash(key: tuple[object, ...]) -> str:
    return hashlib.sha256(repr(key).encode()).hexdigest()[:8]


def _replace(spec: WeightSpec, family: str, layer: int | None, expert: int | None) -> WeightSpec:
    return WeightSpec(
        name=spec.name,
        module=spec.module,
        kind=spec.kind,
        family=family,
        out_features=spec.out_features,
        in_features=spec.in_features,
        dtype=spec.dtype,
        sources=spec.sources,
        operation=spec.operation,
        layer=layer,
        expert=expert,
    )
