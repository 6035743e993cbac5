"""``svdbank ls``: the banks in the cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from svdbank_cli.options import with_output
from svdbank_cli.output import Output, size, table

if TYPE_CHECKING:
    from svdbank.verbs.ls import BankSummary


@click.command("ls", short_help="List the banks in the cache.")
@with_output
def ls_command(output: Output) -> None:
    """List the banks in the cache (SVDBANK_HOME, else Hugging Face's assets cache).

    \b
    Examples:
      svdbank ls
      svdbank ls --json
    """
    import svdbank

    output.data(svdbank.ls(), _text)


def _text(banks: list[BankSummary]) -> str:
    if not banks:
        return "no banks yet: svdbank build MODEL makes one"
    rows = [
        (b.model, b.weights, f"{b.rank}", b.side, b.dtype, size(b.nbytes) if b.complete else "unfinished", b.path)
        for b in banks
    ]
    return table(("model", "weights", "rank", "side", "dtype", "size", "path"), rows)
