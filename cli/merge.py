"""``svdbank merge``: several adapters become one."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict, Unpack

import click

from svdbank_cli.completion import complete_adapter
from svdbank_cli.options import composed_from, fit_options, with_output
from svdbank_cli.output import Output, table

if TYPE_CHECKING:
    from svdbank.composition.fitting import FitOptions, FitReport
    from svdbank.composition.merging import MergeMethod
    from svdbank.verbs.merge import MergeReport


class _Options(TypedDict):
    """What goes to ``svdbank.merge`` as it is."""

    weights: list[float] | None
    method: MergeMethod
    density: float | None
    seed: int
    rank: int | None
    bank: str | None
    rebase: str | None
    base: str | None
    force: bool


def _weights(context: click.Context, option: click.Parameter, value: str | None) -> list[float] | None:
    if value is None:
        return None
    try:
        return [float(part) for part in value.split(",")]
    except ValueError:
        raise click.BadParameter(f"{value!r} is not numbers with commas between them, e.g. 0.5,0.3") from None


@click.command("merge")
@click.argument("adapters", nargs=-1, required=True, metavar="[NAME=]ADAPTER...", shell_complete=complete_adapter)
@click.option("-o", "--output", "adapter", required=True, type=click.Path(), help="Adapter folder to write.")
@click.option("--weights", metavar="W,W", callback=_weights, help="One for each adapter. [default: 1/m each; 1 with ties]")
@click.option(
    "--method",
    type=click.Choice(["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]),
    default="linear",
    show_default=True,
    help="linear is exact; the others act on coefficients, see docs/composing.md.",
)
@click.option("--density", type=float, metavar="SHARE", help="Coefficients kept by the other methods. [default: 0.5]")
@click.option("--seed", type=int, default=0, show_default=True, help="Of DARE's draws.")
@click.option("--rank", type=int, metavar="K", help="Cut every weight to its best approximation of rank K.")
@composed_from
@fit_options
@click.option("--force", is_flag=True, help="Replace an adapter at the output.")
@with_output
def merge_command(
    adapters: tuple[str, ...], adapter: str, fit: FitOptions | None, output: Output, **options: Unpack[_Options]
) -> None:
    """Merge adapters of one base, folders or org/name[@revision] on the Hub, into one that PEFT loads.

    Adapters that svdbank made stand on the same orthonormal directions, so their weighted sum has their rank and is exact; others
    (plain LoRA, MiLoRA) are put side by side, which is exact too and adds up their ranks unless --rank cuts it.

    \b
    Examples:
      svdbank merge law med -o both
      svdbank merge law med code -o all --weights 0.5,0.3,0.2
      svdbank merge law med -o both --method ties --density 0.3
      svdbank merge law med=user/lora@main -o small --rank 16
      svdbank merge law med -o both --fit law.jsonl --fit med.jsonl --model HuggingFaceTB/SmolLM2-135M
    """
    import svdbank

    with output.progress() as progress:
        report = svdbank.merge(adapters, output=adapter, fit=fit, progress=progress, **options)
    output.notes(report.notes)
    output.data(report, _text)


def _text(report: MergeReport) -> str:
    parts = [table(("adapter", "weight"), [(name, f"{weight:.4g}") for name, weight in report.weights.items()])]
    how = report.method if report.density is None else f"{report.method}, density {report.density:g}"
    if report.seed is not None:
        how += f", seed {report.seed}"
    stands = "on the bank's directions" if report.in_bank else "free factors"
    parts.append(f"{how}: {report.touched} weights, rank {report.rank}, {stands}, ‖ΔW‖ {report.norm:.4g}")
    if report.worst is not None:
        key, share = report.worst
        parts.append(f"cutting the rank lost {report.error:.2e} of ‖ΔW‖, most of {key} ({share:.2e})")
    if report.fit is not None:
        parts.append(fit_text(report.fit))
    return "\n".join([*parts, report.adapter])


def fit_text(fit: FitReport) -> str:
    """What fitting found, in one line."""
    return f"fitted in {len(fit.trials)} trials: mean loss {fit.start:.4f} → {fit.loss:.4f} (base {fit.base:.4f})"
