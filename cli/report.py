"""``svdbank report``: banks, builds, adapters and evaluations as one HTML file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from svdbank.core.units import size
from svdbank_cli.completion import complete_bank, complete_model, complete_source
from svdbank_cli.options import with_output
from svdbank_cli.output import Output

if TYPE_CHECKING:
    from svdbank.verbs.report import WrittenReport


@click.command("report", short_help="Pictures and tables of banks and adapters, in one HTML file.")
@click.argument("sources", nargs=-1, required=True, metavar="BANK|ADAPTER|STACK|EVAL.json...", shell_complete=complete_source)
@click.option(
    "-o",
    "--output",
    "target",
    metavar="FILE.html",
    default="report.html",
    show_default=True,
    type=click.Path(),
    help="The file.",
)
@click.option(
    "--bank",
    metavar="BANK|MODEL",
    shell_complete=complete_bank,
    help="Bank of the adapters' base: relates how far weights moved to the weights. [default: one that is named, or the cached one]",
)
@click.option(
    "--base",
    metavar="MODEL",
    shell_complete=complete_model,
    help="The adapters' base model: what whole trained modules are counted from.",
)
@click.option("--title", metavar="TEXT", help="Heading of the page.")
@click.option("--force", is_flag=True, help="Replace FILE also where it is no report.")
@with_output
def report_command(
    sources: tuple[str, ...],
    target: str,
    bank: str | None,
    base: str | None,
    title: str | None,
    force: bool,
    output: Output,
) -> None:
    """Write one HTML file with pictures and tables of banks, unfinished builds, adapters, stacks and evaluations, whichever are named.

    Of a bank: the ends of its spectrum, certificates, ranks that the data do not define, bytes by rank, build times. Of adapters: norms,
    angles, bands, training curves, losses, drift. The file loads nothing, runs no script, and can be sent or printed. EVAL.json is what
    svdbank eval --json printed. Needs pip install 'svdbank[report]'.

    \b
    Examples:
      svdbank report HuggingFaceTB/SmolLM2-135M
      svdbank report ./my-model.bank law med domains -o report.html
      svdbank eval HuggingFaceTB/SmolLM2-135M --adapter law=./law --data licences.jsonl --json > eval.json
      svdbank report law eval.json -o law.html
    """
    import svdbank

    with output.progress() as progress:
        report = svdbank.report(sources, target, bank=bank, base=base, title=title, force=force, progress=progress)
    output.data(report, _text)


def _text(report: WrittenReport) -> str:
    parts = (
        (report.banks, "bank"),
        (report.builds, "unfinished build"),
        (report.adapters, "adapter"),
        (report.evaluations, "evaluation"),
    )
    about = ", ".join(f"{len(names)} {word}{'' if len(names) == 1 else 's'}" for names, word in parts if names)
    return f"{about}: {report.figures} figures, {size(report.nbytes)}\n{report.path}"
