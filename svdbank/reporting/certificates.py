"""Certificates of a bank against their limits, and the ranks whose subspaces the data do not define."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import median

from svdbank.bank.layout import FamilyIndex
from svdbank.bank.reading import Bank
from svdbank.bank.spectrum import Spectrum, WeightSpectrum
from svdbank.core.basis import ORTHOGONALITY_LIMIT, RESIDUAL_LIMIT, unresolved_ranks
from svdbank.reporting.document import Figure, Section, Table, brief, counted, sci, shortened
from svdbank.reporting.drawing import ColourScale, bar_chart, heat_map
from svdbank.reporting.families import largest_families


def nearness(row: WeightSpectrum) -> float:
    """How near a certificate is to a limit: 1 is at it."""
    return max(row.residual / RESIDUAL_LIMIT, row.orthogonality / ORTHOGONALITY_LIMIT)


def certificates(bank: Bank, rows: Spectrum, labels: dict[str, str]) -> Section:
    worst = sorted(rows, key=nearness, reverse=True)
    families = [family.spec.name for family in largest_families(bank.index.families)]
    figures = []
    for title, limit, field in (
        ("Residual", RESIDUAL_LIMIT, "residual"),
        ("Orthogonality", ORTHOGONALITY_LIMIT, "orthogonality"),
    ):
        by_family: dict[str, list[float]] = {}
        for row in rows:
            by_family.setdefault(row.family, []).append(getattr(row, field))
        figures.append(_against_limit(title, limit, [(labels[name], by_family[name]) for name in families]))
    table = Table(
        ("weight", "residual", "orthogonality", "angle bound", "completeness", "condition", "solved by"),
        [
            (
                row.name,
                sci(row.residual),
                sci(row.orthogonality),
                sci(row.angle_bound),
                row.completeness,
                sci(row.condition),
                row.path,
            )
            for row in worst
        ],
    )
    second = {
        record.name: record.certificate.tried
        for family in bank.index.families
        for record in family.weights
        if record.certificate.tried
    }
    says = [
        "Every basis was measured against its weight in float64 before it was stored: ‖Wv − σu‖ / σ_max (residual) and the largest entry "
        "of UᵀU − 1 (orthogonality). A basis above a limit is never stored. The angle bound limits the sine of the angle to the true "
        "subspace at the stored rank."
    ]
    if second:
        says.append(f"{counted(len(second), 'weight')} needed a second method, first {next(iter(second))}.")
    return Section(
        "Certificates, the worst first",
        says,
        figures=figures,
        tables=[("Certificates", shortened(table, 60, "svdbank info --csv"))],
    )


def _against_limit(title: str, limit: float, families: Sequence[tuple[str, list[float]]]) -> Figure:
    """Digits that lie between the worst of each family and the limit."""
    digits = [max(0.0, math.log10(limit / max(max(values), 1e-30))) for _, values in families]
    shown = [min(value, 8.0) for value in digits]
    drawn = bar_chart(
        [brief(name, 20) for name, _ in families],
        [("digits", shown)],
        x="decimal digits below the limit",
        texts=[sci(max(values)) for _, values in families],
    )
    table = Table(
        ("family", "worst", "median", "limit"),
        [(name, sci(max(values)), sci(median(values)), sci(limit)) for name, values in families],
    )
    return Figure(f"{title} by family", "The worst weight of each: the longer the bar, the safer.", drawn, table)


def undefined_ranks(bank: Bank, rows: Spectrum, labels: dict[str, str]) -> Section:
    title = "Ranks whose boundary the data do not define"
    what = (
        "Where two neighbouring singular values are equal to rounding, any direction between them is as good, and a subspace that ends "
        "there is nobody's in particular."
    )
    found = [row for row in rows if row.unresolved]
    if not found:
        return Section(title, [f"{what} In this bank there is no such rank."])
    ranks: dict[str, list[int]] = {}
    shares: list[tuple[str, Counter[int], FamilyIndex]] = []
    for family in largest_families([f for f in bank.index.families if any(row.family == f.spec.name for row in found)]):
        sigma: list[list[float]] = bank.coordinate(family.spec.name, "sigma").tolist()  # type: ignore[assignment]
        counts: Counter[int] = Counter()
        for weight, values in zip(family.weights, sigma, strict=True):
            own = unresolved_ranks(values, weight.certificate.sigma_next, weight.certificate.sigma_max)
            if own:
                ranks[weight.name] = own
            counts.update(own)
        shares.append((labels[family.spec.name], counts, family))
    highest = max(family.spec.rank for _, _, family in shares)
    width = max(1, math.ceil(highest / 64))
    edges = list(range(1, highest + 1, width))
    cells = [
        [sum(counts[r] for r in range(e, e + width)) / (width * len(f.weights)) if e <= f.spec.rank else None for e in edges]
        for _, counts, f in shares
    ]
    top = max((value for row in cells for value in row if value is not None), default=1.0) or 1.0
    drawn = heat_map(
        [brief(name) for name, _, _ in shares],
        [str(edge) for edge in edges],
        cells,
        ColourScale(0.0, top, "share of the family's weights"),
        across="rank" if width == 1 else f"rank, in steps of {width}",
    )
    by_rank = Table(
        ("family", "rank", "weights"),
        [(name, str(rank), str(count)) for name, counts, _ in shares for rank, count in sorted(counts.items())],
    )
    figure = Figure(
        "Where boundaries are not defined",
        "At a share of 0, every weight has a subspace of its own.",
        drawn,
        shortened(by_rank),
    )
    table = Table(
        ("weight", "ranks", "largest defined"),
        [(row.name, as_ranges(ranks[row.name]), str(row.resolved_rank)) for row in found if row.name in ranks],
    )
    return Section(
        title,
        [
            f"{what} It is so for {counted(len(found), 'weight')} here. Adapters on such a rank work; another "
            "machine may choose other directions."
        ],
        figures=[figure],
        tables=[("Weights with such ranks", shortened(table, 60, "svdbank info --csv"))],
    )


def as_ranges(numbers: Iterable[int]) -> str:
    """``1–3, 7``."""
    spans: list[list[int]] = []
    for number in sorted(numbers):
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in spans)
