"""``svdbank rm``: delete a bank."""

from __future__ import annotations

import click

from svdbank_cli.options import with_output
from svdbank_cli.output import Output, size


@click.command("rm")
@click.argument("bank", type=click.Path())
@with_output
def rm_command(bank: str, output: Output) -> None:
    """Delete the folder of a BANK, finished or not. Refuses a folder that is no bank.

    \b
    Examples:
      svdbank rm ./my-model.bank
    """
    import svdbank

    freed = svdbank.rm(bank)
    output.data({"bank": bank, "freed_bytes": freed}, lambda _: f"deleted {bank}, {size(freed)} freed")
