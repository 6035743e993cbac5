"""``svdbank plan``: what a build would do and cost."""

from __future__ import annotations

from collections import Counter
from typing import Any

import click

from svdbank_cli.options import build_options, with_output
from svdbank_cli.output import Output, dequantised, duration, size, table

_SHOWN_SKIPS = 3


@click.command("plan")
@click.argument("model")
@build_options
@with_output
def plan_command(model: str, bank: str | None, targets: tuple[str, ...], output: Output, **options: Any) -> None:
    """Show what building a bank of MODEL would do: weights, skips, bytes, memory, time. Reads headers only
    (of a model on the Hub once it is in the Hugging Face cache: it is downloaded first).

    \b
    Examples:
      svdbank plan HuggingFaceTB/SmolLM2-135M
      svdbank plan ./my-model --rank 64 --targets q_proj --targets v_proj
      svdbank plan ./my-model --json
    """
    show_plan(model, bank, targets or ("all-linear",), output, options)


def show_plan(model: str, bank: str | None, targets: tuple[str, ...], output: Output, options: dict[str, Any]) -> None:
    """Print the plan of a build with these options."""
    import svdbank

    with output.progress() as progress:
        report = svdbank.plan(model, bank, targets=targets, progress=progress, **options)
    output.data(report, _text)


def _text(report: Any) -> str:
    rows = [
        (
            f.name,
            f.count,
            f"{f.out_features}x{f.in_features}",
            f"{f.rank}{' (all)' if f.clamped else ''}",
            f.path,
            size(f.nbytes),
        )
        for f in report.families
    ]
    reasons = Counter(skip.reason for skip in report.plan.skips)
    examples: dict[str, list[str]] = {}
    for skip in report.plan.skips:
        examples.setdefault(skip.reason, []).append(skip.name)
    lines = [
        table(("family", "weights", "out x in", "rank", "solver", "size"), rows),
        "",
        f"weights   {sum(f.count for f in report.families)} of {report.model}, {size(report.fetch_bytes)} to read",
        f"bank      {report.output}",
        f"          {size(report.write_bytes)} in {report.files} files; {size(report.free_bytes)} free",
        f"memory    at most {size(report.peak_bytes)} with {report.jobs} at a time",
        f"time      about {duration(report.seconds)} (from one small solve, timed now)",
    ]
    if report.quantised:
        lines.append(f"quantised {dequantised(report.quantised)}")
    for reason, count in reasons.most_common():
        names = ", ".join(examples[reason][:_SHOWN_SKIPS]) + (", …" if count > _SHOWN_SKIPS else "")
        lines.append(f"skipped   {count}: {reason} ({names})")
    if report.write_bytes > report.free_bytes:
        lines.append("warning   the bank does not fit: choose another disk with -o, a smaller --rank, or --side left")
    return "\n".join(lines)
