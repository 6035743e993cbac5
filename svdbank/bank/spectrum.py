"""The spectrum of a bank as a table: a row for each weight, for people who look at spectra. Loads neither torch nor numpy."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from typing import Any, overload

from svdbank.bank.layout import WeightRecord
from svdbank.core.basis import unresolved_ranks
from svdbank.core.errors import missing_extra
from svdbank.core.specs import FamilySpec, Struct


class WeightSpectrum(Struct, frozen=True):
    """What a bank knows of the singular values of one weight. σ are in the weight's own units.

    Attributes
    ----------
    role
        The last part of the module's path, ``q_proj``; ``layer`` and ``expert`` are None where the name has none.
    sigma_max, sigma_min
        The largest and the smallest singular value.
    sigma_rank
        The largest of the minor ones that are stored, σ at ``rank``.
    sigma_next
        The first one that is not stored; None where all are.
    condition
        ``sigma_max / sigma_min``; infinite for a weight that lacks rank.
    gap
        ``(sigma_next − sigma_rank) / sigma_max``: how clearly the stored subspace is cut off. None where there is no boundary.
    resolved_rank
        Largest stored rank whose subspace the data define to 1e-6; 0 where none is.
    unresolved
        How many stored ranks they do not define.
    orthogonality, residual, angle_bound, completeness, path
        Of the certificate, see :class:`svdbank.core.basis.Certificate`.
    """

    name: str
    module: str
    role: str
    layer: int | None
    expert: int | None
    kind: str
    family: str
    out_features: int
    in_features: int
    rank: int
    sigma_max: float
    sigma_min: float
    sigma_rank: float
    sigma_next: float | None
    condition: float
    gap: float | None
    resolved_rank: int
    unresolved: int
    orthogonality: float
    residual: float
    angle_bound: float | None
    completeness: str
    path: str


#: pandas' types of columns in which None stands.
_NULLABLE = {"layer": "Int64", "expert": "Int64", "sigma_next": "float64", "gap": "float64", "angle_bound": "float64"}


class Spectrum(Sequence[WeightSpectrum]):
    """A row for each weight of a bank, in the bank's order; made by :meth:`svdbank.Bank.spectrum`."""

    columns: tuple[str, ...] = WeightSpectrum.__struct_fields__

    def __init__(self, rows: Sequence[WeightSpectrum]) -> None:
        self._rows = tuple(rows)

    @overload
    def __getitem__(self, index: int) -> WeightSpectrum: ...
    @overload
    def __getitem__(self, index: slice) -> Spectrum: ...
    def __getitem__(self, index: int | slice) -> WeightSpectrum | Spectrum:
        return Spectrum(self._rows[index]) if isinstance(index, slice) else self._rows[index]

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[WeightSpectrum]:
        return iter(self._rows)

    def __repr__(self) -> str:
        return f"Spectrum({len(self)} weights: {', '.join(self.columns)})"

    def to_pandas(self) -> Any:
        """A ``pandas.DataFrame``, a row for each weight. Raises :class:`MissingExtraError` without pandas."""
        try:
            import pandas
        except ImportError as cause:
            raise missing_extra("pandas", "data") from cause
        frame = pandas.DataFrame({name: [getattr(row, name) for row in self] for name in self.columns})
        return frame.astype(_NULLABLE)

    def to_csv(self) -> str:
        """Comma-separated text with a header; None is empty, numbers in their shortest exact form."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows([[getattr(row, name) for name in self.columns] for row in self])
        return text.getvalue()


def rank_marks(rank: int) -> tuple[int, ...]:
    """Ranks to show of 1 … ``rank``: one and a half times, or a third more than, the one before (1, 2, 3, 4, 6, 8, 12, …), and the last."""
    steps = (mark for power in range(rank.bit_length()) for mark in (1 << power, 3 << power >> 1))
    return tuple(sorted({mark for mark in steps if mark < rank} | {rank}))


def weight_spectrum(record: WeightRecord, family: FamilySpec, stored: str, sigma: list[float]) -> WeightSpectrum:
    """The row of one weight: ``family`` has its shape, ``stored`` is the family that holds it, ``sigma`` (rank,) ascends."""
    certificate = record.certificate
    last, following, largest = sigma[-1], certificate.sigma_next, certificate.sigma_max
    undefined = set(unresolved_ranks(sigma, following, largest))
    gap = None if following is None else (following - last) / largest if largest > 0 else 0.0
    return WeightSpectrum(
        name=record.name,
        module=record.module,
        role=record.module.rpartition(".")[2],
        layer=record.layer,
        expert=record.expert,
        kind=family.kind,
        family=stored,
        out_features=family.out_features,
        in_features=family.in_features,
        rank=family.rank,
        sigma_max=largest,
        sigma_min=certificate.sigma_min,
        sigma_rank=last,
        sigma_next=following,
        condition=largest / certificate.sigma_min if certificate.sigma_min > 0 else float("inf"),
        gap=gap,
        resolved_rank=next((rank for rank in range(family.rank, 0, -1) if rank not in undefined), 0),
        unresolved=len(undefined),
        orthogonality=certificate.orthogonality,
        residual=certificate.residual,
        angle_bound=certificate.angle_bound,
        completeness=certificate.completeness,
        path=certificate.path,
    )
