"""``svdbank plan``: what a build would do and cost."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Unpack

import click

from svdbank.core.units import duration, size
from svdbank_cli.completion import complete_model
from svdbank_cli.options import BuildOptions, build_options, device_option, with_output
from svdbank_cli.output import Output, dequantised, named_by, table

if TYPE_CHECKING:
    from svdbank.building.fetching import FetchPlan
    from svdbank.building.scaling import Schedule
    from svdbank.verbs.plan import PlanReport

_SHOWN_SKIPS = 3


@click.command("plan", short_help="Show what building a bank of MODEL would do.")
@click.argument("model", shell_complete=complete_model)
@build_options
@device_option
@click.option(
    "--workers",
    type=click.IntRange(min=1, max=1024),
    help="Simulate the schedule on N workers, and on 1 to 1024: time, efficiency, bytes a worker, device-hours.",
)
@click.option(
    "--device-rate",
    metavar="FILE",
    type=click.Path(),
    help="Rates of the workers' device, as svdbank env --rates writes them. [default: measured now, which takes a minute]",
)
@with_output
def plan_command(
    model: str,
    bank: str | None,
    targets: tuple[str, ...],
    device: str,
    workers: int | None,
    device_rate: str | None,
    output: Output,
    **options: Unpack[BuildOptions],
) -> None:
    """Show what building a bank of MODEL would do: weights, skips, bytes, memory, time. Reads headers only, on the Hub too:
    no weights are downloaded. MODEL may be a config.json alone, before anything is downloaded. What a bank at the output
    already holds is left out.

    \b
    Examples:
      svdbank plan HuggingFaceTB/SmolLM2-135M
      svdbank plan ./my-model --rank 64 --targets q_proj --targets v_proj
      svdbank plan meta-llama/Llama-3.1-70B --disk-budget 20GB
      svdbank plan ./my-model --device cuda
      svdbank plan ./config.json
      svdbank plan ./config.json --workers 64 --device-rate h200.json
      svdbank plan ./my-model --json
    """
    import svdbank

    targets = targets or ("all-linear",)
    report = svdbank.plan(model, bank, targets=targets, device=device, workers=workers, device_rate=device_rate, **options)
    output.data(report, _text)


def show_plan(
    model: str, bank: str | None, targets: tuple[str, ...], device: str, output: Output, options: BuildOptions
) -> None:
    """Print the plan of a build with these options."""
    import svdbank

    output.data(svdbank.plan(model, bank, targets=targets, device=device, **options), _text)


def _fetch(fetch: FetchPlan) -> str:
    what = {
        "cache": f"{size(fetch.nbytes)} in {fetch.files} files into the Hugging Face cache first, checked by sha256",
        "shards": f"{size(fetch.nbytes)} in {fetch.files} files, the next while one is solved, checked by sha256; "
        + ("kept in the Hugging Face cache" if fetch.keep else f"deleted behind, at most {size(fetch.disk_bytes)} on disk"),
        "ranges": f"{size(fetch.nbytes)} as byte ranges, nothing on disk; the Hub has no hash to check a range by",
    }[fetch.way]
    return f"fetch     {fetch.way}: {what}"


def _text(report: PlanReport) -> str:
    rows = [
        (
            f.name,
            f.count,
            f"{f.out_features}x{f.in_features}",
            f"{f.rank}{' (all)' if f.clamped else ''}",
            f.path if f.batch == 1 else f"{f.path}, {f.batch} at once",
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
        f"weights   {sum(f.count for f in report.families)} of {report.model}, {size(report.fetch_bytes)} to read"
        + (f"; {report.present} are in the bank already" if report.present else ""),
        f"bank      {report.output}",
        f"          {size(report.write_bytes)} in {report.files} files; {size(report.free_bytes)} free",
        f"memory    at most {size(report.peak_bytes)}"
        + (f" with {report.jobs} at a time" if report.device_bytes is None else ""),
        f"time      about {duration(report.seconds)} (from one small {'product' if report.device_bytes is None else 'solve'}, timed now)"
        if report.seconds is not None
        else f"time      about {duration(report.schedule.asked.seconds)} on {report.schedule.asked.workers} workers (simulated, below)"
        if report.schedule is not None
        else f"time      unknown: there is no device of the kind {report.device} here",
    ]
    if report.device_bytes is not None:
        lines.insert(-1, f"device    {report.device}: {size(report.device_bytes)} of its memory a solve, up to three at a time")
    if report.fetch.way != "local":
        lines.insert(-2, _fetch(report.fetch))
    if report.quantised:
        lines.append(f"quantised {dequantised(report.quantised)}")
    lines += [f"names     {line}" for line in named_by(report.decided, report.doubt, report.decided_before)]
    lines += [f"tied      {alias.name} is {alias.of} with the sides exchanged: solved once" for alias in report.plan.aliases]
    for reason, count in reasons.most_common():
        names = ", ".join(examples[reason][:_SHOWN_SKIPS]) + (", …" if count > _SHOWN_SKIPS else "")
        lines.append(f"skipped   {count}: {reason} ({names})")
    if not report.weights_here:
        lines.append("weights   none here, config.json alone: build needs them")
    if report.write_bytes > report.free_bytes:
        lines.append("warning   the bank does not fit: choose another disk with -o, a smaller --rank, or --side left")
    if report.schedule is not None:
        lines += ["", *_schedule(report.schedule)]
    return "\n".join(lines)


def _schedule(found: Schedule) -> list[str]:
    """A simulated schedule, in lines."""
    own = found.asked
    rows = [
        (
            scale.workers,
            duration(scale.seconds),
            f"{scale.efficiency:.0%}",
            size(scale.most_bytes),
            f"{size(scale.read_rate)}/s",
            f"{scale.device_hours:.3g}",
            scale.bound,
        )
        for scale in found.table
    ]
    bases = Counter(cost.basis for cost in found.solves)
    known = ", ".join(f"{bases[basis]} {basis}" for basis in ("measured", "interpolated", "extrapolated") if bases[basis])
    unmeasured = [f"{cost.family} ({cost.basis})" for cost in found.solves if cost.basis != "measured"]
    of_each = f"{found.threads} threads, {found.jobs} small weights at a time, {found.machine} on a machine"
    lines = [
        table(("workers", "time", "efficiency", "read by one", "read by all", "device-hours", "bound by"), rows),
        "",
        f"schedule  simulated; {own.workers} workers ({of_each}): {duration(own.seconds)}, of it start {duration(own.start)},"
        f" work {duration(own.work)}, publish {duration(own.publish)}; bound by {own.bound}",
        "steps     "
        + ", ".join(f"{step} {duration(seconds)}" for step, seconds in found.stages.items() if seconds)
        + " (each alone on the device, of all weights)",
        f"rates     {found.rates}, {'measured' if found.measured else 'by a data sheet, not measured'} {found.date}",
        f"shapes    {known}"
        + (f": {', '.join(unmeasured[:_SHOWN_SKIPS])}" if unmeasured else "")
        + (", …" if len(unmeasured) > _SHOWN_SKIPS else ""),
    ]
    return [*lines, *(f"note      {note}" for note in found.notes)]
