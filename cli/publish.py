"""``svdbank publish``: close a build that several workers did."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from svdbank.core.units import size
from svdbank_cli.completion import complete_bank
from svdbank_cli.options import with_output
from svdbank_cli.output import Output

if TYPE_CHECKING:
    from svdbank.verbs.publish import PublishReport


@click.command("publish", short_help="Close a build of several workers, once all is recorded.")
@click.argument("bank", shell_complete=complete_bank)
@with_output
def publish_command(bank: str, output: Output) -> None:
    """Publish the build in the folder BANK, where all of it is recorded.

    svdbank build does so by itself, whichever of its workers finds all records there. Where something is missing the command says
    what and ends with exit code 3; svdbank info BANK --missing lists it.

    \b
    Examples:
      svdbank publish ./my-model.bank
      svdbank publish ./my-model.bank --json
    """
    import svdbank

    reports: list[PublishReport] = []
    with output.progress() as progress:
        svdbank.publish(bank, progress=progress, on_report=reports.append)
    output.data(reports[0], _text)


def _text(report: PublishReport) -> str:
    what = f"published {report.published} weights" if report.published else "published already: nothing to do"
    return f"{what}\n{report.weights} weights, {size(report.nbytes)} of vectors in {report.bank}"
