"""``svdbank info``: what a bank holds and how good it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from svdbank_cli.options import with_output
from svdbank_cli.output import Output, dequantised, size, table

if TYPE_CHECKING:
    from svdbank.verbs.info import BankInfo


@click.command("info", short_help="Describe a BANK: what it holds and how exact it is.")
@click.argument("bank")
@with_output
def info_command(bank: str, output: Output) -> None:
    """Describe a BANK: its folder, or the model whose cached bank is meant.

    \b
    Examples:
      svdbank info ./my-model.bank
      svdbank info HuggingFaceTB/SmolLM2-135M --json
    """
    import svdbank

    output.data(svdbank.info(bank), _text)


def _text(info: BankInfo) -> str:
    rows = [
        (
            f.name,
            f"{f.weights} + {f.tied} tied" if f.tied else f.weights,
            f"{f.out_features}x{f.in_features}",
            f.rank,
            f"{f.residual:.0e}",
            f"{f.orthogonality:.0e}",
            f"{f.condition:.1e}",
            f.unresolved,
        )
        for f in info.families
    ]
    revision = f"@{info.revision}" if info.revision else ""
    solved = ", ".join(f"{count} {path}" for path, count in sorted(info.paths.items()))
    lines = [
        f"model       {info.model}{revision}",
        f"bank        {info.path}",
        f"holds       {info.weights} weights, rank {info.rank}, side {info.side}, {info.dtype}, {size(info.nbytes)}, format {info.format}",
        f"base        {info.base_digest[:16]}",
        f"solved by   {solved}",
        *([f"quantised   {dequantised(info.quantised)}"] if info.quantised else []),
        "",
        table(("family", "weights", "out x in", "rank", "residual", "orthogonality", "condition", "unresolved"), rows),
        "",
        "residual: worst ‖Wv − σu‖/‖W‖ before the cast to storage; unresolved: ranks whose gap is too small for the data to",
        "define their subspace to 1e-6, whoever computes it",
    ]
    if info.tied:
        lines.append("")
        lines += [
            f"tied: {name} is {of} with the sides exchanged: one decomposition serves both"
            for name, of in sorted(info.tied.items())
        ]
    if info.fallbacks:
        lines.append("")
        lines += [f"second method: {name}: {'; '.join(tried)}" for name, tried in sorted(info.fallbacks.items())]
    return "\n".join(lines)
