"""How much adapters change: norms by layer and role, and how far each weight moved."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from svdbank.composition.angles import layer_of
from svdbank.reporting.document import Figure, Section, Table, brief, sci, shortened, visible
from svdbank.reporting.drawing import SERIES, ColourScale, Line, heat_map, line_chart
from svdbank.reporting.families import layer_key
from svdbank.reporting.measuring import DRAWN, MeasuredAdapter, role_of


def norms_by_layer(measured: Sequence[MeasuredAdapter]) -> Section:
    shown = measured[:DRAWN]
    layers = sorted({layer for found in shown for layer in found.norms}, key=layer_key)
    numbered = [layer for layer in layers if layer.isdigit()]
    figures = []
    table = Table(
        ("layer", *(visible(found.name) for found in shown)),
        [
            (
                "outside" if layer == "-" else layer,
                *(f"{found.norms[layer]:.4g}" if layer in found.norms else "–" for found in shown),
            )
            for layer in layers
        ],
    )
    if numbered:
        lines = [
            Line(
                brief(found.name, 18),
                [(int(layer), found.norms[layer]) for layer in numbered if layer in found.norms],
                number % SERIES,
            )
            for number, found in enumerate(shown)
        ]
        drawn = line_chart(lines, x="layer", y="‖ΔW‖", whole_x=True, legend=len(shown) > 1)
        figures.append(Figure("‖ΔW‖ by layer", "Frobenius norm of all changes in a layer.", drawn, table))
    by_role = _byrole_of(shown)
    return Section("Norms by layer", figures=[*figures, *by_role], tables=[] if figures else [("‖ΔW‖", table)])


def _byrole_of(measured: Sequence[MeasuredAdapter]) -> list[Figure]:
    roles: dict[str, list[float]] = {}
    for place, found in enumerate(measured):
        for drift in found.drifts:
            squares = roles.setdefault(role_of(drift.key), [0.0] * len(measured))
            squares[place] += drift.norm**2
    cells: list[list[float | None]] = [[math.sqrt(value) for value in values] for values in roles.values()]
    top = max((value for row in cells for value in row if value is not None), default=0.0)
    if not top or len(roles) < 2:
        return []
    names = [visible(found.name) for found in measured]
    drawn = heat_map(
        [brief(role, 20) for role in roles],
        [brief(name, 14 if len(names) < 5 else 5) for name in names],
        cells,
        ColourScale(0.0, top, "‖ΔW‖"),
        across="adapter",
    )
    table = Table(
        ("role", *names), [(role, *(f"{v:.4g}" for v in row if v is not None)) for role, row in zip(roles, cells, strict=True)]
    )
    return [Figure("‖ΔW‖ by role", "Which kinds of modules changed most.", drawn, table)]


def drift_of_weights(measured: Sequence[MeasuredAdapter]) -> Section:
    figures, tables = [], []
    related = any(drift.share is not None for found in measured for drift in found.drifts)
    what = "σ₁(ΔW) / σ_max(W)" if related else "σ₁(ΔW)"
    for found in measured[:DRAWN]:
        values = {drift.key: drift.share if related else drift.largest for drift in found.drifts}
        figures += _drift_map(found, values, what)
        ordered = sorted(found.drifts, key=lambda drift: -(drift.share if drift.share is not None else drift.largest))
        table = Table(
            ("weight", "‖ΔW‖", "σ₁(ΔW)", "of σ_max", "rank", "bands"),
            [
                (
                    drift.key,
                    f"{drift.norm:.4g}",
                    f"{drift.largest:.4g}",
                    "–" if drift.share is None else f"{100 * drift.share:.3g} %",
                    str(drift.rank),
                    drift.bands,
                )
                for drift in ordered
            ],
        )
        tables.append((f"{found.name}: drift of each weight", shortened(table, 150 if len(measured) < 4 else 60)))
    says = [
        "How far each weight moved: the largest singular value of its change"
        + (", as a share of the weight's own largest one." if related else ". With --bank it is related to the weight's own.")
    ]
    return Section("Drift of each weight", says, figures=figures, tables=tables)


def _drift_map(found: MeasuredAdapter, values: Mapping[str, float | None], what: str) -> list[Figure]:
    """The largest drift by role and layer."""
    layers = sorted({layer_of(key) for key in values} - {"-"}, key=layer_key)
    roles = list(dict.fromkeys(role_of(key) for key in values if layer_of(key) != "-"))
    if len(layers) < 2 or not roles:
        return []
    cells: list[list[float | None]] = [[None] * len(layers) for _ in roles]
    for key, value in values.items():
        if value is not None and layer_of(key) != "-":
            row, column = roles.index(role_of(key)), layers.index(layer_of(key))
            cells[row][column] = max(cells[row][column] or 0.0, value)
    top = max((value for row in cells for value in row if value is not None), default=0.0)
    if not top:
        return []
    drawn = heat_map([brief(role, 20) for role in roles], layers, cells, ColourScale(0.0, top, what), across="layer")
    table = Table(("layer", *roles), [(layer, *(sci(row[place]) for row in cells)) for place, layer in enumerate(layers)])
    return [Figure(f"Drift of {visible(found.name)}", f"{what}; of several experts the largest.", drawn, table)]
