"""``svdbank prune``: delete cached banks that nobody uses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from svdbank.core.units import size
from svdbank_cli.options import with_output
from svdbank_cli.output import Output
from svdbank_cli.parameters import AgeType

if TYPE_CHECKING:
    from svdbank.verbs.prune import PruneReport


@click.command("prune", short_help="Delete cached banks that were not used for long.")
@click.option("--older-than", type=AgeType(), required=True, help="Longest time without use, e.g. 30d, 12h, 8w.")
@click.option("--dry-run", is_flag=True, help="Say what would be deleted; delete nothing.")
@with_output
def prune_command(older_than: float, dry_run: bool, output: Output) -> None:
    """Delete the banks in the cache that were not opened or built for longer than --older-than. Banks elsewhere are left alone.

    \b
    Examples:
      svdbank prune --older-than 30d --dry-run
      svdbank prune --older-than 8w
    """
    import svdbank

    output.data(svdbank.prune(older_than, dry_run=dry_run), _text)


def _text(report: PruneReport) -> str:
    verb = "would delete" if report.dry_run else "deleted"
    lines = [f"{verb}  {bank.path}  {size(bank.size)}" for bank in report.removed]
    lines += [f"in use, kept  {path}" for path in report.busy]
    return "\n".join(
        [*lines, f"{verb} {len(report.removed)} banks, {size(report.freed)}; kept {report.kept + len(report.busy)}"]
    )
