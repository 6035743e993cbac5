"""What pyproject.toml asks for can be tried at its floor: tests/versions.py does that."""

from __future__ import annotations

from collections import defaultdict

import pytest
from packaging.requirements import Requirement

from tests.structure.source import ROOT
from tests.versions import floors, requirements


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_every_requirement_has_a_floor(requirement: Requirement) -> None:
    assert len(floors(requirement)) == 1


def test_a_package_has_the_same_floor_wherever_it_is_named() -> None:
    found = defaultdict(set)
    for requirement in requirements():
        found[requirement.name].add(str(requirement.specifier))
    assert {name: bounds for name, bounds in found.items() if len(bounds) > 1} == {}


def test_constraints_allow_what_pyproject_asks_for() -> None:
    pinned = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if not line.startswith("#"):
            name, version = line.split("==")
            pinned[name] = version
    asked = [requirement for requirement in requirements() if requirement.name in pinned]
    assert len(asked) == len(pinned)
    assert all(requirement.specifier.contains(pinned[requirement.name]) for requirement in asked)
