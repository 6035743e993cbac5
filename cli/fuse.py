"""``svdbank fuse``: an adapter added into a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from svdbank.core.units import size
from svdbank_cli.completion import complete_adapter, complete_bank, complete_model
from svdbank_cli.options import with_output
from svdbank_cli.output import Output, grouped, table

if TYPE_CHECKING:
    from svdbank.fusion.fuse_report import FusedDtype, FusedWeight, FuseReport


@click.command("fuse", short_help="Write MODEL with ADAPTER added into its weights.")
@click.argument("model", shell_complete=complete_model)
@click.argument("adapter", type=click.Path(), shell_complete=complete_adapter)
@click.option("-o", "--output", "checkpoint", type=click.Path(), required=True, help="Folder of the checkpoint to write.")
@click.option(
    "--into",
    metavar="MODEL",
    shell_complete=complete_model,
    help="Add it to this model of the same shapes instead, e.g. the instruct model.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Store every floating tensor so. [default: as each is stored; what is quantised becomes its values]",
)
@click.option(
    "--untie", is_flag=True, help="Write embedding and output head apart where they are one and ADAPTER changes either."
)
@click.option(
    "--bank",
    metavar="BANK",
    shell_complete=complete_bank,
    help="Bank of MODEL, for MiLoRA and PiSSA adapters. [default: the cached one]",
)
@click.option("--per-weight", is_flag=True, help="A line for each weight instead of one for each role.")
@with_output
def fuse_command(
    model: str,
    adapter: str,
    checkpoint: str,
    into: str | None,
    dtype: FusedDtype | None,
    untie: bool,
    bank: str | None,
    per_weight: bool,
    output: Output,
) -> None:
    """Write MODEL with ADAPTER added into its weights: a checkpoint that loads without PEFT and without svdbank.

    W + ΔW is summed in float32 and rounded once. Shard layout, metadata and tensors that the adapter does not touch stay byte for byte;
    configuration and tokenizer are carried over. ADAPTER is a folder, or user/name[@revision] on the Hub. The table shows what that
    rounding left of the adapter: the share of elements whose bits changed, and the error of the change in the file against the one
    intended.

    \b
    Examples:
      svdbank fuse HuggingFaceTB/SmolLM2-135M ./law -o ./smollm2-law
      svdbank fuse HuggingFaceTB/SmolLM2-135M ./law --into HuggingFaceTB/SmolLM2-135M-Instruct -o ./instruct-law
      svdbank fuse HuggingFaceTB/SmolLM2-135M user/lora-with-a-head -o ./fused --untie
      svdbank fuse ./my-model ./law -o ./exact --dtype float32 --json
    """
    import svdbank

    opened = None if bank is None else svdbank.open(bank)
    with output.progress() as progress:
        report = svdbank.fuse(
            model,
            adapter,
            checkpoint,
            into=into,
            bank=opened,
            dtype=dtype,
            untie=untie,
            progress=progress,
        )
    output.notes(report.notes)
    output.data(report, lambda value: _text(value, per_weight))


def _text(report: FuseReport, per_weight: bool) -> str:
    rows = [_row(name, members) for name, members in grouped(report.weights, per_weight=per_weight).items()]
    return "\n".join(
        (
            table(("weights", "number", "elements", "changed", "‖ΔW‖", "error of ΔW"), rows),
            "",
            f"{report.changed / max(1, report.elements):.2%} of {report.elements:,} elements changed; error of ΔW {report.error:.2%}",
            *([f"replaced whole: {', '.join(report.replaced)}"] if report.replaced else []),
            f"{size(report.nbytes)}, changed weights in {report.dtype}, in {report.checkpoint}",
        )
    )


def _row(name: str, weights: list[FusedWeight]) -> tuple[object, ...]:
    elements, changed = sum(w.elements for w in weights), sum(w.changed for w in weights)
    norm = sum(w.norm**2 for w in weights) ** 0.5
    error = sum((w.norm * w.error) ** 2 for w in weights) ** 0.5 / norm if norm else 0.0
    return (name, len(weights), elements, f"{changed / elements:.2%}", f"{norm:.4g}", f"{error:.2%}")
