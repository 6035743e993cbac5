"""``svdbank stack``: several domains at once, each still to be scaled or taken out."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict, Unpack

import click

from svdbank_cli.completion import complete_adapter
from svdbank_cli.merge import fit_text
from svdbank_cli.options import composed_from, fit_options, with_output
from svdbank_cli.output import Output, table

if TYPE_CHECKING:
    from svdbank.composition.fitting import FitOptions
    from svdbank.verbs.stack import StackReport


class _Options(TypedDict):
    """What goes to ``svdbank.stack`` as it is."""

    scale: dict[str, float]
    drop: tuple[str, ...]
    bank: str | None
    rebase: str | None
    base: str | None
    force: bool


def _scales(context: click.Context, option: click.Parameter, values: tuple[str, ...]) -> dict[str, float]:
    scales: dict[str, float] = {}
    for value in values:
        name, _, number = value.rpartition("=")
        try:
            factor = float(number)
        except ValueError:
            name = ""
        if not name:
            raise click.BadParameter(f"{value!r} is not NAME=NUMBER, e.g. law=0.7")
        if name in scales:
            raise click.BadParameter(f"{name!r} is scaled twice")
        scales[name] = factor
    return scales


@click.command("stack", short_help="Join adapters into their sum; each can be scaled and dropped later.")
@click.argument("adapters", nargs=-1, required=True, metavar="[NAME=]ADAPTER...", shell_complete=complete_adapter)
@click.option("-o", "--output", "adapter", required=True, type=click.Path(), help="Adapter folder to write.")
@click.option("--scale", multiple=True, metavar="NAME=NUMBER", callback=_scales, help="Strength of a domain. Repeatable.")
@click.option("--drop", multiple=True, metavar="NAME", help="Domain to leave out. Repeatable.")
@composed_from
@fit_options
@click.option("--force", is_flag=True, help="Replace an adapter at the output.")
@with_output
def stack_command(
    adapters: tuple[str, ...], adapter: str, fit: FitOptions | None, output: Output, **options: Unpack[_Options]
) -> None:
    """Put adapters of one base together as the sum that PEFT loads, with each one's coefficients kept beside it.

    A folder written by stack is an ADAPTER too: --scale and --drop change it later, without the adapters it was made from. Scales are
    relative to what is in the folder. Domains are called after their folders or repositories, or NAME=ADAPTER.

    \b
    Examples:
      svdbank stack law med code -o domains
      svdbank stack law ./runs/7/adapter code -o domains --scale law=0.7
      svdbank stack domains -o without-med --drop med
      svdbank stack domains -o weaker --scale law=0.5 --scale code=0.8
      svdbank stack law med -o domains --fit law.jsonl --fit med.jsonl --model HuggingFaceTB/SmolLM2-135M
    """
    import svdbank

    with output.progress() as progress:
        report = svdbank.stack(adapters, output=adapter, fit=fit, progress=progress, **options)
    output.notes(report.notes)
    for overlap in report.overlaps:
        output.say(
            f"Note: {overlap.one} and {overlap.other} share directions in {overlap.weights} of {overlap.of} weights; "
            "svdbank compare says whether they fight, train --on-top-of gives a domain its own"
        )
    output.data(report, _text)


def _text(report: StackReport) -> str:
    rows = [
        (
            name,
            f"{domain.scale:.4g}",
            f"{domain.norm:.4g}",
            domain.touched,
            "" if domain.band is None else f"{domain.band[0]}:{domain.band[1]}",
        )
        for name, domain in report.domains.items()
    ]
    parts = [table(("domain", "scale", "‖ΔW‖", "weights", "band"), rows)]
    if report.dropped:
        parts.append(f"left out: {', '.join(report.dropped)}")
    if report.fit is not None:
        parts.append(fit_text(report.fit))
    return "\n".join([*parts, f"{report.touched} weights, rank {report.rank}", report.adapter])
