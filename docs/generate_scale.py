"""Writes the generated part of docs/scale.md: how long banks of large models take on 1 to 1024 workers, simulated from known rates.

python docs/generate_scale.py           writes the part between the marks
python docs/generate_scale.py --check   exits 1 if it is not what would be written (seconds are worked out again, nothing is measured)
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from svdbank.core.units import duration, size

if TYPE_CHECKING:
    from svdbank.building.scaling import Scale
    from svdbank.verbs.plan import PlanReport

TARGET = Path(__file__).with_name("scale.md")
BEGIN, END = "<!-- simulated: begin, written by docs/generate_scale.py -->", "<!-- simulated: end -->"

FOLDER = Path(__file__).parent
MODELS = ("Llama-3.1-8B", "Llama-3.1-70B", "Qwen3-235B-A22B", "DeepSeek-V3", "DeepSeek-V4-Pro")
#: Columns: numbers of workers.
SHOWN = (1, 4, 8, 64, 256, 1024)
#: File of rates and how it is called here; on CPUs a worker is a core.
DEVICES = {"h200.json": "an H200 each", "cpu.json": "a core of a CPU each, two to a machine"}


def section() -> str:
    """What stands between the marks."""
    parts = []
    for file, what in DEVICES.items():
        rates = FOLDER / "rates" / file
        if rates.exists():
            parts.append(of_device(rates, what))
    return "\n\n".join(parts)


def of_device(rates: Path, what: str) -> str:
    """The tables of a device."""
    import svdbank

    rows, details, known = [], [], ""
    for model in MODELS:
        with tempfile.TemporaryDirectory() as place:
            report = svdbank.plan(FOLDER / "configurations" / model, Path(place) / "bank", workers=8, device_rate=rates)
        found = report.schedule
        assert found is not None
        by_count = {scale.workers: scale for scale in found.table}
        rows.append((model, *(_time(by_count[count]) for count in SHOWN)))
        details.append(_detail(model, report))
        known = f"{found.rates}, {'measured' if found.measured else 'a data sheet'} {found.date[:10]}"
    head = f"### {what[0].upper()}{what[1:]}\n\nRates: [{rates.name}](rates/{rates.name}), {known}."
    times = _markdown(("model", *(str(count) for count in SHOWN)), rows)
    columns = (
        "model",
        "weights",
        "bytes of values",
        "bank",
        "files",
        "device-hours, 1 and 64",
        "64 workers read",
        "bound by, 1 and 64",
    )
    return "\n\n".join((head, times, _markdown((*columns, "solves by shape"), details)))


def _time(scale: Scale) -> str:
    return f"{duration(scale.seconds)} ({scale.efficiency:.0%})"


def _detail(model: str, report: PlanReport) -> tuple[str, ...]:
    found = report.schedule
    assert found is not None
    by_count = {scale.workers: scale for scale in found.table}
    one, many = by_count[1], by_count[64]
    counts = {family.name: family.count for family in report.families}
    bases: Counter[str] = Counter()
    for cost in found.solves:
        bases[cost.basis] += counts[cost.family]
    total = sum(bases.values())
    shares = ", ".join(
        f"{bases[basis] / total:.0%} {basis}" for basis in ("measured", "interpolated", "extrapolated") if bases[basis]
    )
    return (
        model,
        f"{total:,}",
        size(report.fetch_bytes),
        size(report.write_bytes),
        f"{report.files:,}",
        f"{one.device_hours:.2g}, {many.device_hours:.2g}",
        f"{size(many.read_rate)}/s",
        f"{one.bound}, {many.bound}",
        shares,
    )


def _markdown(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> int:
    text = TARGET.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    written = f"{before}{BEGIN}\n\n{section()}\n\n{END}{after}"
    if "--check" not in sys.argv[1:]:
        TARGET.write_text(written, encoding="utf-8")
        return 0
    if text != written:
        sys.stderr.write("docs/scale.md is stale: run python docs/generate_scale.py\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
