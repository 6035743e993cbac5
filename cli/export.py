"""``svdbank export``: an adapter in another form."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import click

from svdbank.core.units import size
from svdbank_cli.completion import complete_adapter, complete_bank
from svdbank_cli.options import with_output
from svdbank_cli.output import Output

if TYPE_CHECKING:
    from svdbank.verbs.export import ExportReport


@click.command("export")
@click.argument("adapter", type=click.Path(), shell_complete=complete_adapter)
@click.option(
    "--to",
    type=click.Choice(["peft", "lora", "slim"]),
    default="peft",
    show_default=True,
    help="peft: a slim adapter's PEFT folder; lora: plain LoRA for the unchanged base; slim: coefficients only, B by reference.",
)
@click.option("-o", "--output", "target", type=click.Path(), required=True, help="Folder to write.")
@click.option(
    "--bank",
    metavar="BANK|MODEL",
    shell_complete=complete_bank,
    help="The bank of the adapter's base, or the model whose bank is cached. [default: the cached one of the base that ADAPTER names]",
)
@click.option(
    "--for",
    "purpose",
    type=click.Choice(["inference"]),
    help="One rank that vLLM allows, α = rank, every scale in A: loads anywhere without an SVD.",
)
@click.option(
    "--method",
    type=click.Choice(["mica", "milora", "pissa"]),
    help="What the adapter began as, where the folder no longer says.",
)
@click.option(
    "--initial", type=click.Path(), metavar="ADAPTER", help="The fresh milora or pissa adapter that training began from."
)
@click.option("--force", is_flag=True, help="Replace an adapter that is there.")
@with_output
def export_command(
    adapter: str,
    to: Literal["peft", "lora", "slim"],
    target: str,
    bank: str | None,
    purpose: str | None,
    method: str | None,
    initial: str | None,
    force: bool,
    output: Output,
) -> None:
    """Convert ADAPTER, a PEFT folder or a slim one, to another form. Nothing is lost either way.

    A trained MiLoRA or PiSSA becomes a LoRA of twice the rank on the unchanged base: [A; A₀] and [B, −B₀].

    \b
    Examples:
      svdbank export adapter --to slim -o adapter.slim
      svdbank export adapter.slim --to peft -o adapter
      svdbank export trained-milora --to lora --bank my-model.bank -o lora
      svdbank export adapter --for inference -o served
    """
    import svdbank

    written = svdbank.export(
        adapter,
        to=to,
        output=target,
        bank=bank,
        inference=purpose == "inference",
        method=method,
        initial=initial,
        force=force,
    )
    output.notes(written.notes)
    output.data(written, _text)


def _text(written: ExportReport) -> str:
    lines = [
        f"{written.weights} weights, rank {written.rank}, {size(written.nbytes)}: {written.share:.1%} of what it was made from"
    ]
    if written.flag:
        lines.append(f"vLLM needs: {written.flag}")
    return "\n".join([*lines, written.output])
