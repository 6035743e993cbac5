"""The ends of a bank's spectrum, by family and layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from svdbank.bank.layout import FamilyIndex
from svdbank.bank.reading import Bank
from svdbank.bank.spectrum import rank_marks
from svdbank.reporting.document import Figure, Section, Table, brief, counted, sci
from svdbank.reporting.drawing import LEVELS, ColourScale, Line, heat_map, line_chart
from svdbank.reporting.families import largest_families, layer_key, shape_of

#: Lines in a figure.
_LINES = 48
#: Shares below this are drawn at it: float64 rounding of a σ that is 0.
_FLOOR = 1e-17


def minor_end(bank: Bank, labels: dict[str, str]) -> Section:
    families = largest_families(bank.index.families)
    curves = {family.spec.name: _curves(bank, family, principal=False) for family in families}
    lowest = min((y for lines in curves.values() for line in lines for _, y in line.points), default=_FLOOR)
    highest = max((y for lines in curves.values() for line in lines for _, y in line.points), default=1.0)
    limits = (10 ** math.floor(math.log10(lowest)), max(1.0, highest * 1.3))
    figures = [
        Figure(
            labels[family.spec.name],
            _says_of(family, curves[family.spec.name]),
            line_chart(
                curves[family.spec.name],
                x="i-th smallest",
                y="σᵢ / σ_max",
                log_x=True,
                log_y=True,
                limits=limits,
                legend=False,
            ),
            _curve_table(curves[family.spec.name]),
        )
        for family in families
    ]
    says = [
        "The smallest singular values of each weight, as shares of its largest; the axes are the same in all figures. The lower and the "
        "steeper a line begins, the less the base uses those directions: that is where MiCA and MiLoRA write."
    ]
    if (left := len(bank.index.families) - len(families)) > 0:
        says.append(f"Drawn are the {len(families)} families with the most weights; {left} more are in svdbank info --csv.")
    return Section(
        "The minor end of the spectrum",
        says,
        figures=[*figures, *_condition_map(bank, families, labels)],
        legend=[("first layer", "l0"), ("middle", f"l{LEVELS // 2}"), ("last layer", f"l{LEVELS - 1}")],
    )


def principal_end(bank: Bank, labels: dict[str, str]) -> Section:
    families = largest_families([family for family in bank.index.families if family.spec.principal])
    figures = []
    for family in families:
        lines = _curves(bank, family, principal=True)
        drawn = line_chart(lines, x="i-th largest", y="σᵢ / σ_max", log_x=True, log_y=True, legend=False)
        figures.append(Figure(f"{labels[family.spec.name]}, the largest", _says_of(family, lines), drawn, _curve_table(lines)))
    return Section(
        "The principal end",
        ["The largest singular values, which PiSSA starts from, as shares of the largest."],
        figures=figures,
    )


def _curves(bank: Bank, family: FamilyIndex, *, principal: bool) -> list[Line]:
    """A line a layer, the median over its weights (experts); of very many layers, how they are spread."""
    spec = family.spec
    ranks = rank_marks(spec.principal if principal else spec.rank)
    sigma = bank.coordinate(spec.name, "principal_sigma" if principal else "sigma")
    layers: dict[str, list[list[float]]] = {}
    for row, weight in enumerate(family.weights):
        largest = weight.certificate.sigma_max or 1.0
        shares = [max(sigma[row, mark - 1] / largest, _FLOOR) for mark in ranks]
        layers.setdefault("–" if weight.layer is None else str(weight.layer), []).append(shares)
    names = sorted(layers, key=layer_key)
    lines = {name: [median(column) for column in zip(*layers[name], strict=True)] for name in names}
    if len(lines) > _LINES:
        columns = [sorted(column) for column in zip(*lines.values(), strict=True)]
        lines = {
            f"{share:.0%} of layers are below": [column[round(share * (len(column) - 1))] for column in columns]
            for share in (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
        }
    last = max(len(lines) - 1, 1)
    return [
        Line(f"layer {name}" if name.isdigit() else name, list(zip(ranks, values, strict=True)), tint=place / last)
        for place, (name, values) in enumerate(lines.items())
    ]


def _says_of(family: FamilyIndex, lines: Sequence[Line]) -> str:
    experts = any(weight.expert is not None for weight in family.weights)
    return f"{shape_of(family.spec)}, {counted(len(family.weights), 'weight')}, {counted(len(lines), 'line')}" + (
        ": medians over experts." if experts else "."
    )


def _curve_table(lines: Sequence[Line]) -> Table:
    ranks = [f"{rank:g}" for rank, _ in lines[0].points]
    return Table(("line", *ranks), [(line.name, *(sci(value) for _, value in line.points)) for line in lines])


def _condition_map(bank: Bank, families: Sequence[FamilyIndex], labels: dict[str, str]) -> list[Figure]:
    """The smallest share by family and layer."""
    layers = sorted({str(w.layer) for f in families for w in f.weights if w.layer is not None}, key=layer_key)
    if len(layers) < 2:
        return []
    found: list[list[float | None]] = []
    for family in families:
        by_layer: dict[str, list[float]] = {}
        for weight in family.weights:
            share = weight.certificate.sigma_min / (weight.certificate.sigma_max or 1.0)
            by_layer.setdefault(str(weight.layer), []).append(max(share, _FLOOR))
        found.append([median(by_layer[layer]) if layer in by_layer else None for layer in layers])
    known = [math.log10(value) for row in found for value in row if value is not None]
    scale = ColourScale(min(known), max(known), "log₁₀ of σ_min / σ_max")
    names = [brief(labels[family.spec.name]) for family in families]
    logs = [[None if value is None else math.log10(value) for value in row] for row in found]
    drawn = heat_map(names, layers, logs, scale, across="layer")
    table = Table(
        ("layer", *(labels[family.spec.name] for family in families)),
        [(layer, *(sci(row[place]) for row in found)) for place, layer in enumerate(layers)],
    )
    return [Figure("σ_min / σ_max by family and layer", "Where it is low, the base hardly uses some directions.", drawn, table)]
