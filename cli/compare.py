"""``svdbank compare``: sizes of adapters, angles between them, where they will fight."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from svdbank_cli.completion import complete_adapter
from svdbank_cli.options import composed_from, with_output
from svdbank_cli.output import Output, table

if TYPE_CHECKING:
    from svdbank.composition.relations import Pair, Relation
    from svdbank.verbs.compare import CompareReport


@click.command("compare", short_help="Compare adapters of one base: norms, cosines, what cancels.")
@click.argument("adapters", nargs=-1, required=True, metavar="[NAME=]ADAPTER...", shell_complete=complete_adapter)
@click.option(
    "--by", type=click.Choice(["all", "layer", "weight"]), default="all", show_default=True, help="Rows of the table."
)
@click.option(
    "--image", metavar="FILE.svg|png", type=click.Path(), help="Heat map by layer; needs pip install 'svdbank[report]'."
)
@composed_from
@with_output
def compare_command(
    adapters: tuple[str, ...],
    by: str,
    image: str | None,
    bank: str | None,
    rebase: str | None,
    base: str | None,
    output: Output,
) -> None:
    """Compare adapters of one base from their coefficients alone: norms, cosines, what cancels when they are added.

    A folder written by stack counts as the domains in it. cosine = agreement − conflict: what the products of coefficients of equal and
    of opposite sign amount to. overlap is how much of the adapters lies in output directions of each other. With --bank, minor is
    the share of an adapter in the bank's minor subspace.

    \b
    Examples:
      svdbank compare law med code
      svdbank compare domains --by layer
      svdbank compare law med code --image angles.svg
      svdbank compare user/lora --bank HuggingFaceTB/SmolLM2-135M
    """
    import svdbank

    report = svdbank.compare(adapters, bank=bank, rebase=rebase, base=base, image=image)
    output.notes(report.notes)
    output.data(report, lambda found: _text(found, by))


def _text(report: CompareReport, by: str) -> str:
    header = ["adapter", "‖ΔW‖", "rank", "weights", "on bank directions"]
    rows = [[size.name, f"{size.norm:.4g}", size.rank, size.touched, size.in_bank] for size in report.adapters]
    if any(size.share is not None for size in report.adapters):
        header.append("minor")
        rows = [[*row, f"{size.share:.1%}"] for row, size in zip(rows, report.adapters, strict=True)]
    parts = [table(header, rows)]
    if report.pairs:
        shown = [(pair, relation) for pair in report.pairs for relation in _relations(pair, by)]
        columns = ("pair", *(() if by == "all" else (by,)), "cosine", "agreement", "conflict", "overlap", "weights")
        parts.append(table(columns, [_row(pair, relation, by) for pair, relation in shown]))
        parts.append("\n".join(pair.verdict for pair in report.pairs))
    if report.image is not None:
        parts.append(report.image)
    return "\n\n".join(parts)


def _relations(pair: Pair, by: str) -> tuple[Relation, ...]:
    return {"all": (pair.all,), "layer": pair.layers, "weight": pair.weights}[by]


def _row(pair: Pair, relation: Relation, by: str) -> tuple[object, ...]:
    where = () if by == "all" else (relation.where,)
    figures = (
        f"{round(relation.cosine, 3) + 0.0:+.3f}",
        f"{relation.agreement:.3f}",
        f"{relation.conflict:.3f}",
        f"{relation.overlap:.0%}",
    )
    return (f"{pair.one} · {pair.other}", *where, *figures, relation.weights)
