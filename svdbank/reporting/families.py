"""Short names of a bank's families, and of weights in layers and roles."""

from __future__ import annotations

import re
from collections.abc import Sequence

from svdbank.bank.layout import FamilyIndex
from svdbank.core.specs import FamilySpec

#: Families that get a figure, or a row in one.
FIGURES = 16

_SHAPE = re.compile(r"-\d+x\d+$")


def family_labels(families: Sequence[FamilySpec]) -> dict[str, str]:
    """``q_proj 576×576`` for each family by name: as many parts of its path as tell it from the others, and the shape where it has to."""
    paths = {spec.name: _SHAPE.sub("", spec.name).split(".") for spec in families}
    shapes = {spec.name: f"{spec.out_features}×{spec.in_features}" for spec in families}
    labels = {}
    for spec in families:
        own = paths[spec.name]
        same = [paths[other.name] for other in families if other.name != spec.name]
        parts = next((n for n in range(1, len(own) + 1) if own[-n:] not in [path[-n:] for path in same]), len(own))
        alone = own not in same
        labels[spec.name] = ".".join(own[-parts:]) + ("" if alone else f" {shapes[spec.name]}")
    return labels


def shape_of(spec: FamilySpec) -> str:
    """out × in."""
    return f"{spec.out_features}×{spec.in_features}"


def layer_key(layer: str) -> tuple[int, int]:
    """Sorts layers by number, what is outside them last."""
    return (0, int(layer)) if layer.isdigit() else (1, 0)


def largest_families(families: Sequence[FamilyIndex]) -> list[FamilyIndex]:
    """Those with the most weights, in the bank's order."""
    if len(families) <= FIGURES:
        return list(families)
    chosen = {family.spec.name for family in sorted(families, key=lambda f: len(f.weights), reverse=True)[:FIGURES]}
    return [family for family in families if family.spec.name in chosen]
