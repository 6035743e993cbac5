"""Bytes of a bank: what lookups read at each rank, and what is stored by family."""

from __future__ import annotations

from svdbank.bank.layout import FamilyIndex, bytes_read
from svdbank.bank.reading import Bank
from svdbank.bank.spectrum import rank_marks
from svdbank.core.units import size
from svdbank.reporting.document import Figure, Section, Table, brief
from svdbank.reporting.drawing import Line, bar_chart, line_chart
from svdbank.reporting.families import largest_families, shape_of


def bytes_by_rank(bank: Bank, labels: dict[str, str]) -> Section:
    options = bank.manifest.options
    ranks = [rank for rank in rank_marks(bank.rank) if rank >= 8 or bank.rank <= 16]
    sides = ["left"] if options.side == "left" else ["left", "both"]
    names = {"left": "MiCA (left)", "both": "MiLoRA (both sides)"}
    totals = {
        side: [sum(bytes_read(family.spec, side, options.dtype, rank) for family in bank.index.families) for rank in ranks]
        for side in sides
    }
    unit, factor = _unit(max(max(values) for values in totals.values()))
    lines = [
        Line(names[side], [(rank, value / factor) for rank, value in zip(ranks, totals[side], strict=True)], number=number)
        for number, side in enumerate(sides)
    ]
    table = Table(
        ("rank", *(names[side] for side in sides)),
        [(str(rank), *(size(totals[side][place]) for side in sides)) for place, rank in enumerate(ranks)],
    )
    by_rank = Figure(
        "Read by a lookup of all weights",
        "By rank; vectors come in chunks of 16 triplets.",
        line_chart(lines, x="rank", y=unit, whole_x=True),
        table,
    )
    families = sorted(bank.index.families, key=_nbytes, reverse=True)
    shown = largest_families(families)
    parts = Figure(
        "Stored by family",
        f"{size(sum(map(_nbytes, families)))} in all.",
        bar_chart(
            [brief(labels[f.spec.name], 20) for f in shown],
            [("bytes", [_nbytes(f) / factor for f in shown])],
            x=unit,
            texts=[size(_nbytes(f)) for f in shown],
        ),
        Table(
            ("family", "weights", "out × in", "rank", "bytes"),
            [
                (labels[f.spec.name], f"{len(f.weights):,}", shape_of(f.spec), str(f.spec.rank), size(_nbytes(f)))
                for f in families
            ],
        ),
    )
    return Section("Bytes by rank", figures=[by_rank, parts])


def _nbytes(family: FamilyIndex) -> int:
    return sum(record.size for records in family.files.values() for record in records)


def _unit(nbytes: float) -> tuple[str, float]:
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= factor:
            return unit, factor
    return "bytes", 1.0
