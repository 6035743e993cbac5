"""Several components of one weight in one orthonormal coordinate system, so that they are matrices that can be held side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from svdbank.adapter.components import Band, Component, Free, InBank, bands_of


@dataclass(frozen=True, eq=False)
class Coordinates:
    """``ΔWᵢ = directions · C[i]``.

    Attributes
    ----------
    C
        (m, n, in), float32 on the bank's directions and float64 otherwise; zero in rows that a component does not reach.
    directions
        (out, n), orthonormal.
    rows
        Number of rows that each component reaches.
    bands
        The bank's bands that the rows stand for; None for directions found by a QR of the factors.
    """

    C: Tensor
    directions: Tensor
    rows: tuple[int, ...]
    bands: tuple[Band, ...] | None
    orthonormal: bool

    def component(self, C: Tensor) -> Component:
        """``directions · C`` as one component, for a C (n, in)."""
        if self.bands is None:
            return Free(C.float(), self.directions.float())
        return InBank(self.bands, C.float(), self.directions, self.orthonormal)


def common_coordinates(components: Sequence[Component], *, exact_norms: bool = False) -> Coordinates:
    """Coordinates on the union of the bands where all stand on the same directions of a bank to the bit; else by QR of the factors.

    With ``exact_norms`` only float32 directions of a bank count, so that norms and angles of the C are those of the ΔW to rounding.
    """
    in_bank = [component for component in components if isinstance(component, InBank)]
    if len(in_bank) == len(components) and not (exact_norms and not all(c.orthonormal for c in in_bank)):
        found = _on_bank(in_bank)
        if found is not None:
            return found
    return _by_qr(components)


def _on_bank(components: Sequence[InBank]) -> Coordinates | None:
    first = components[0]
    orthonormal = all(component.orthonormal for component in components)
    rows = tuple(len(component.C) for component in components)
    if all(component.bands == first.bands for component in components):
        if not all(c.left is first.left or torch.equal(c.left, first.left) for c in components):
            return None
        return Coordinates(torch.stack([c.C for c in components]), first.left, rows, first.bands, orthonormal)
    union = sorted({index for component in components for index in component.indices})
    place = {index: row for row, index in enumerate(union)}
    C = torch.zeros(len(components), len(union), first.C.shape[1])
    left = torch.zeros(first.left.shape[0], len(union))
    known = torch.zeros(len(union), dtype=torch.bool)
    for number, component in enumerate(components):
        own = torch.tensor([place[index] for index in component.indices])
        shared = known[own]
        if shared.any() and not torch.equal(left[:, own[shared]], component.left.float()[:, shared]):
            return None
        C[number, own] = component.C
        left[:, own] = component.left.float()
        known[own] = True
    return Coordinates(C, left, rows, bands_of(union), orthonormal)


def _by_qr(components: Sequence[Component]) -> Coordinates:
    factors = [component.factors for component in components]
    Q, R = torch.linalg.qr(torch.cat([B.double() for _, B in factors], dim=1))
    parts = R.split([B.shape[1] for _, B in factors], dim=1)
    C = torch.stack([part @ A.double() for part, (A, _) in zip(parts, factors, strict=True)])
    return Coordinates(C, Q, tuple(min(B.shape) for _, B in factors), None, True)
