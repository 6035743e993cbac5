"""What a report says of adapters: their sizes by layer, how they lie to each other, their directions, how far weights moved."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from svdbank.bank.reading import Bank
from svdbank.composition.angles import relate
from svdbank.composition.relations import Pair
from svdbank.core.errors import SvdbankError
from svdbank.reporting.angles import angles_and_conflict, bands_in_use
from svdbank.reporting.document import Chapter, Section, Table, counted, visible
from svdbank.reporting.measuring import DRAWN, MeasuredAdapter, ReadAdapter, measure_adapter
from svdbank.reporting.norms import drift_of_weights, norms_by_layer
from svdbank.reporting.training import training_sections


def adapters_chapter(read: Sequence[ReadAdapter], bank: Bank | None, notes: Sequence[str] = ()) -> Chapter:
    """All sections of adapters that are looked at together; ``bank`` is the bank of their base, where one is at hand."""
    measured = [measure_adapter(one, bank) for one in read]
    pairs, said = _pairs(read)
    sections = [
        _overview(measured, bank, [*notes, *said]),
        norms_by_layer(measured),
        *([angles_and_conflict(read, pairs)] if pairs else []),
        bands_in_use(measured),
        *training_sections([(one.name, one.training) for one in read if one.training is not None]),
        drift_of_weights(measured),
    ]
    title = ", ".join(visible(one.name) for one in read[:4]) + (f" and {len(read) - 4} more" if len(read) > 4 else "")
    return Chapter("adapter" if len(read) == 1 else "adapters", title, _verdict(measured, pairs), sections)


def _pairs(read: Sequence[ReadAdapter]) -> tuple[list[Pair], list[str]]:
    """Relations of all pairs; why there are none where they belong to different bases."""
    if len(read) > DRAWN:
        return [], [f"Angles are measured among at most {DRAWN} adapters; these are {len(read)}."]
    try:
        found = [relate(a.name, a.adapter, b.name, b.adapter) for a, b in itertools.combinations(read, 2)]
    except SvdbankError as error:
        return [], [f"Angles were not measured: {error}."]
    return [pair for pair in found if pair.weights], [pair.verdict for pair in found if not pair.weights]


def _verdict(measured: Sequence[MeasuredAdapter], pairs: Sequence[Pair]) -> str:
    pairs = [pair for pair in pairs if all(pair.all.norms)]
    if pairs:
        return "; ".join(pair.verdict for pair in pairs[:3]) + ("; …" if len(pairs) > 3 else "")
    one = max(measured, key=lambda found: found.norm)
    still = [found.name for found in measured if not found.norm]
    if still:
        return f"{', '.join(still)}: ΔW is zero: not trained yet."
    return f"{one.name} changes {counted(len(one.drifts), 'weight')}, ‖ΔW‖ {one.norm:.3g} in all."


def _overview(measured: Sequence[MeasuredAdapter], bank: Bank | None, notes: Sequence[str]) -> Section:
    rows = []
    for found in measured:
        adapter = found.read.adapter
        inside = sum(weight.in_bank for weight in adapter.weights.values())
        base = adapter.base.name or "–"
        rows.append(
            (
                found.name,
                found.read.stack or "–",
                adapter.method,
                str(adapter.rank),
                f"{len(adapter.weights):,}",
                f"{inside:,}",
                f"{found.norm:.4g}",
                base,
                found.read.place,
            )
        )
    header = ("adapter", "in stack", "method", "rank", "weights", "on bank directions", "‖ΔW‖", "base", "place")
    said = [*notes, *dict.fromkeys(note for found in measured for note in found.notes)]
    if bank is None:
        said.append("No bank of their base is at hand (--bank): drift is not related to the base's weights.")
    names = tuple(name for found in measured for name in (found.name, Path(found.read.place).name))  # not to be capitalised
    starts = (note[:1] if note.startswith(names) else note[:1].upper() for note in said)
    sentences = [f"{start}{note[1:].rstrip('.')}." for start, note in zip(starts, said, strict=True)]
    return Section("Overview", sentences, tables=[("Adapters", Table(header, rows))])
