"""``svdbank extract``: the best LoRA of what a fine-tuning changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from svdbank_cli.completion import complete_bank, complete_model
from svdbank_cli.options import with_output
from svdbank_cli.output import Output, grouped, table

if TYPE_CHECKING:
    from svdbank.fusion.extract_report import ExtractedWeight, ExtractReport


@click.command("extract", short_help="Write the best LoRA of the difference of two checkpoints.")
@click.argument("base", shell_complete=complete_model)
@click.argument("finetuned", shell_complete=complete_model)
@click.option("-o", "--output", "adapter", type=click.Path(), required=True, help="Adapter folder to write.")
@click.option("-r", "--rank", type=click.IntRange(min=1), default=16, show_default=True, help="Rank of the adapter.")
@click.option("--targets", multiple=True, metavar="PATTERN", help="Modules, as PEFT names them. [default: all-linear]")
@click.option(
    "--bank",
    metavar="BANK",
    shell_complete=complete_bank,
    help="Bank of BASE, for the share in its minor directions. [default: a cached one]",
)
@click.option("--task-type", metavar="TYPE", help="PEFT task type, e.g. CAUSAL_LM.")
@click.option("--per-weight", is_flag=True, help="A line for each weight instead of one for each role.")
@click.option("--force", is_flag=True, help="Replace an adapter that is there.")
@with_output
def extract_command(
    base: str,
    finetuned: str,
    adapter: str,
    rank: int,
    targets: tuple[str, ...],
    bank: str | None,
    task_type: str | None,
    per_weight: bool,
    force: bool,
    output: Output,
) -> None:
    """Write the best LoRA of rank r of the difference between FINETUNED and BASE, weight by weight.

    "kept" is the share of the squared norm of the difference that the adapter holds: no matrix of that rank holds more. "minor" is the
    share of the difference in the minor directions that a bank of BASE stores. Weights that are equal are left out.

    \b
    Examples:
      svdbank extract HuggingFaceTB/SmolLM2-135M HuggingFaceTB/SmolLM2-135M-Instruct -r 16 -o ./instruct
      svdbank extract ./base ./finetuned -r 64 --targets q_proj --targets v_proj -o ./adapter --json
    """
    import svdbank

    opened = None if bank is None else svdbank.open(bank)
    with output.progress() as progress:
        report = svdbank.extract(
            base,
            finetuned,
            output=adapter,
            rank=rank,
            targets=targets or ("all-linear",),
            bank=opened,
            task_type=task_type,
            force=force,
            progress=progress,
        )
    if report.outside:
        output.say(
            f"Note: {len(report.outside)} more tensors differ and are not in the adapter (not targeted, or no matrices): "
            f"{_first(report.outside)}"
        )
    if report.settings:
        output.say(f"Note: config.json differs too, which no adapter holds: {_first(report.settings)}")
    output.data(report, lambda value: _text(value, per_weight))


def _first(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:3])}{', …' if len(names) > 3 else ''}"


def _text(report: ExtractReport, per_weight: bool) -> str:
    groups = grouped(report.weights, per_weight=per_weight)
    minor = report.minor is not None
    header = ("weights", "number", "rank", "‖D‖/‖W‖", "kept", *(("minor", "minor of kept") if minor else ()))
    rows = [_row(name, members, minor) for name, members in groups.items()]
    lines = [
        table(header, rows),
        "",
        f"kept {report.kept:.2%} of the difference in {len(report.weights)} weights; {len(report.equal)} are equal and left out",
    ]
    if minor:
        lines.append(
            f"{report.minor:.2%} of it, and {report.minor_kept:.2%} of what is kept, lies in the {report.bank_rank} minor directions "
            f"of {report.bank}"
        )
    return "\n".join([*lines, f"adapter of rank {report.rank} in {report.adapter}"])


def _row(name: str, weights: list[ExtractedWeight], minor: bool) -> tuple[object, ...]:
    relative = sum(w.relative for w in weights) / len(weights)
    return (name, len(weights), max(w.rank for w in weights), f"{relative:.2e}", *_shares(weights, minor))


def _shares(weights: list[ExtractedWeight], minor: bool) -> tuple[str, ...]:
    """Shares of the energy of a group; a weight that the bank lacks counts as none."""
    energy = sum(w.norm**2 for w in weights)
    kept = sum(w.kept * w.norm**2 for w in weights)
    shares = [kept / energy]
    if minor:
        shares.append(sum((w.minor or 0.0) * w.norm**2 for w in weights) / energy)
        shares.append(sum((w.minor_kept or 0.0) * w.kept * w.norm**2 for w in weights) / kept)
    return tuple(f"{share:.2%}" for share in shares)
