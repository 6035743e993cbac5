"""``svdbank pull``: bring a bank, or some ranks of it, to this disk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import click

from svdbank.core.units import size
from svdbank_cli.options import with_output
from svdbank_cli.output import Output

if TYPE_CHECKING:
    from svdbank.verbs.pull import PullReport


@click.command("pull", short_help="Bring a BANK from the Hub or an object store to this disk, whole or some ranks.")
@click.argument("bank")
@click.option(
    "--rank",
    type=click.IntRange(min=1),
    help="Only the ranks up to this one, kept as parts: lookups of them need no connection. [default: the whole bank]",
)
@click.option(
    "--side", type=click.Choice(["both", "left"]), help="With --rank or alone: left singular vectors only, as MiCA needs."
)
@click.option(
    "--into",
    type=click.Path(),
    help="Folder for the whole bank, absent or empty. [default: the cache, where its model's name finds it]",
)
@with_output
def pull_command(bank: str, rank: int | None, side: Literal["both", "left"] | None, into: str | None, output: Output) -> None:
    """Bring a BANK to this disk: hf://org/name[@revision] (or org/name), s3://bucket/path, gs://bucket/path, https://host/path.

    Every byte is held to the digest of the bank's manifest. A whole bank appears in one step; after an interruption the same command goes
    on. With --rank only the chunks of those ranks come, and are kept as parts that the bank's address is served from: what else is asked
    of it later is fetched then, or refused offline. Tokens and credentials are taken as the Hub's client and obstore take them
    (HF_TOKEN, AWS_…, GOOGLE_…), never from the command line. Object stores need: pip install 'svdbank[s3]'.

    \b
    Examples:
      svdbank pull hf://org/SmolLM2-135M-svdbank
      svdbank pull hf://org/SmolLM2-135M-svdbank --rank 16 --side left
      svdbank pull s3://bucket/banks/SmolLM2-135M --into ./smollm2.bank
    """
    import svdbank

    with output.progress() as progress:
        report = svdbank.pull(bank, rank=rank, side=side, into=into, progress=progress)
    output.data(report, _text)


def _text(report: PullReport) -> str:
    lines = [
        f"bank        {report.place}",
        f"describes   {report.model}" + (f"@{report.revision}" if report.revision else ""),
        f"here        {report.weights} weights, rank {report.rank}, side {report.side}: {size(report.size)} in {report.path}",
        f"fetched     {size(report.fetched)} in {report.requests} requests",
    ]
    if report.lacks is not None:
        lines.append(f"not here    {report.lacks}: fetched when asked for, refused offline")
    return "\n".join(lines)
