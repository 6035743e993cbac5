"""``svdbank ls``: the banks in the cache."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from svdbank.core.units import size
from svdbank_cli.options import with_output
from svdbank_cli.output import Output, table

if TYPE_CHECKING:
    from svdbank.verbs.ls import BankSummary


@click.command("ls", short_help="List the banks in the cache.")
@with_output
def ls_command(output: Output) -> None:
    """List the banks in the cache (SVDBANK_HOME, else Hugging Face's assets cache): what they hold, how large they are, and when they were
    last opened or built. Of a bank that lies elsewhere, it shows what is kept of it on this disk, and of which address.

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
    rows = [(b.model, b.weights, f"{b.rank}", b.side, b.dtype, size(b.size), _used(b), b.path) for b in banks]
    return table(("model", "weights", "rank", "side", "dtype", "on disk", "used", "path"), rows)


def _used(bank: BankSummary) -> str:
    days = int((time.time() - bank.last_used) // 86400)
    when = "today" if days < 1 else f"{days} day{'s' if days > 1 else ''} ago"
    if bank.parts_of is not None:
        return f"{when}, parts of {bank.parts_of}" + (f", pulled {bank.brought}" if bank.brought else "")
    return when if bank.complete or not bank.weights else f"unfinished, {when}"
