"""``svdbank rm``: delete a bank."""

from __future__ import annotations

import click

from svdbank.core.units import size
from svdbank_cli.completion import complete_bank
from svdbank_cli.options import with_output
from svdbank_cli.output import Output


@click.command("rm", short_help="Delete the folder of a BANK, finished or not.")
@click.argument("bank", type=click.Path(), shell_complete=complete_bank)
@with_output
def rm_command(bank: str, output: Output) -> None:
    """Delete the folder of a BANK, finished or not. BANK is its path, as `svdbank ls` shows it; what is no bank is refused.

    \b
    Examples:
      svdbank rm ./my-model.bank
      svdbank ls && svdbank rm ~/.cache/huggingface/assets/svdbank/banks/SmolLM2-135M-3677964bf5ee/r128-both-float32
    """
    import svdbank

    freed = svdbank.rm(bank)
    output.data({"bank": bank, "freed_bytes": freed}, lambda _: f"deleted {bank}, {size(freed)} freed")
