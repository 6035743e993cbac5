"""How adapters lie to each other, and on which directions of the bank they write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from svdbank.adapter.components import InBank
from svdbank.composition.relations import Pair
from svdbank.reporting.document import Figure, Section, Table, brief, counted, visible
from svdbank.reporting.drawing import ColourScale, heat_map, span_chart
from svdbank.reporting.families import layer_key
from svdbank.reporting.measuring import MeasuredAdapter, ReadAdapter


def angles_and_conflict(read: Sequence[ReadAdapter], pairs: Sequence[Pair]) -> Section:
    layers = list(dict.fromkeys(relation.where for pair in pairs for relation in pair.layers))
    layers = ["all", *sorted(layers, key=layer_key)]
    names = [f"{visible(pair.one)} · {visible(pair.other)}" for pair in pairs]
    found = {
        name: {"all": pair.all} | {relation.where: relation for relation in pair.layers}
        for name, pair in zip(names, pairs, strict=True)
    }
    figures = []
    for title, explained, field, diverging in (
        ("Cosine by layer", "Above 0 they pull together, below 0 against each other.", "cosine", True),
        ("Conflict by layer", "What cancels in the sum: coefficients of opposite sign.", "conflict", False),
    ):
        cells: list[list[float | None]] = [
            [getattr(found[name][layer], field) if layer in found[name] else None for layer in layers] for name in names
        ]
        top = max((abs(value) for row in cells for value in row if value is not None), default=0.0) or 1e-6
        scale = ColourScale(-top if diverging else 0.0, top, field + " of ΔW", diverging)
        drawn = heat_map([brief(name, 24) for name in names], layers, cells, scale, across="layer", apart=True)
        table = Table(
            ("layer", *names),
            [(layer, *(_signed(row[place], diverging) for row in cells)) for place, layer in enumerate(layers)],
        )
        figures.append(Figure(title, explained, drawn, table))
    rows = [
        (
            f"{pair.one} · {pair.other}",
            _signed(pair.all.cosine, True),
            f"{pair.all.agreement:.3f}",
            f"{pair.all.conflict:.3f}",
            f"{pair.all.overlap:.0%}",
            f"{pair.all.weights:,}",
            pair.verdict,
        )
        for pair in pairs
    ]
    header = ("pair", "cosine", "agreement", "conflict", "overlap", "weights", "in words")
    says = ["cosine = agreement − conflict; overlap is how much of two adapters lies in output directions of each other."]
    return Section("Angles and conflict", says, figures=figures, tables=[("Pairs", Table(header, rows))])


def _signed(value: float | None, signed: bool) -> str:
    if value is None:
        return "–"
    shown = round(value, 3) + 0.0  # never −0
    return f"{shown:+.3f}" if signed else f"{shown:.3f}"


def bands_in_use(measured: Sequence[MeasuredAdapter]) -> Section:
    """Which directions of the bank each adapter writes on, and in how many weights."""
    spans: list[list[tuple[int, int, float]]] = []
    names: list[str] = []
    own: list[str] = []
    rows: list[tuple[str, ...]] = []
    for found in measured:
        counts: dict[int, int] = {}
        weights = [weight for weight in found.read.adapter.weights.values() if weight.in_bank]
        for weight in weights:
            used = {index for c in weight.components.values() if isinstance(c, InBank) for index in c.indices}
            for index in used:
                counts[index] = counts.get(index, 0) + 1
        free = len(found.read.adapter.weights) - len(weights)
        if free:
            own.append(f"{found.name} has factors of its own in {counted(free, 'weight')}")
        if not counts:
            continue
        runs = _runs(counts)
        names.append(found.name)
        spans.append([(a, b, n / len(weights)) for a, b, n in runs])
        rows += [(found.name, f"{a}–{b}", str(b - a), f"{n} of {len(weights)}") for a, b, n in runs]
    says = ["Index 0 is the most minor direction. Adapters on bands that do not overlap have outputs orthogonal to each other."]
    says += [f"{text}: no band." for text in own]
    if not spans:
        return Section("Bands in use", says)
    drawn = span_chart([brief(name, 18) for name in names], spans, x="minor index")
    figure = Figure(
        "Directions that each adapter writes on",
        "The stronger the colour, the more of its weights.",
        drawn,
        Table(("adapter", "band", "directions", "weights"), rows),
    )
    return Section("Bands in use", says, figures=[figure])


def _runs(counts: Mapping[int, int]) -> list[tuple[int, int, int]]:
    """Half-open runs of neighbouring indices with the same count."""
    runs: list[tuple[int, int, int]] = []
    for index in sorted(counts):
        if runs and runs[-1][1] == index and runs[-1][2] == counts[index]:
            runs[-1] = (runs[-1][0], index + 1, counts[index])
        else:
            runs.append((index, index + 1, counts[index]))
    return runs
