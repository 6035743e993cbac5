"""``svdbank info``: what a bank holds and how good it is."""

from __future__ import annotations

from shlex import quote
from typing import TYPE_CHECKING

import click

from svdbank_cli.options import with_output
from svdbank_cli.output import Output, dequantised, size, table

if TYPE_CHECKING:
    from svdbank.building.standing import UnfinishedInfo
    from svdbank.verbs.info import BankInfo


@click.command("info", short_help="Describe a BANK, or how far the build of one is.")
@click.argument("bank")
@click.option("--missing", is_flag=True, help="Of an unfinished build: only what is left, a shard a line, for a retry.")
@with_output
def info_command(bank: str, missing: bool, output: Output) -> None:
    """Describe a BANK: its folder, or the model whose cached bank is meant; of an unfinished build what is done and who is at it.

    \b
    Examples:
      svdbank info ./my-model.bank
      svdbank info HuggingFaceTB/SmolLM2-135M --json
      svdbank info ./unfinished.bank --missing
    """
    import svdbank
    from svdbank.building.standing import UnfinishedInfo

    found = svdbank.info(bank)
    if not isinstance(found, UnfinishedInfo):
        if missing:
            output.say(f"{found.path} is published: nothing is missing")
        else:
            output.data(found, _text)
    elif missing and output.json:
        output.line(found.left)
    else:
        output.data(found, _missing if missing else _unfinished)


def _missing(info: UnfinishedInfo) -> str:
    return "\n".join(
        f"{one.family}/{one.index}  {', '.join(one.weights[:3])}"
        + (f" and {len(one.weights) - 3} more" if len(one.weights) > 3 else "")
        + (f"  held by {one.held_by}" if one.held_by else "")
        for one in info.left
    )


def _unfinished(info: UnfinishedInfo) -> str:
    revision = f"@{info.revision}" if info.revision else ""
    held = sum(one.held_by is not None for one in info.left)
    lines = [
        f"unfinished  {'extension of ' if info.extends else ''}{info.path}",
        f"model       {info.model}{revision}, rank {info.rank}",
        f"done        {info.recorded} of {info.weights} weights, {info.recorded_shards} of {info.shards} shards",
        f"left        {len(info.left)} shards, {held} of them held by {len(info.workers)} workers",
    ]
    rows = [(one.host, one.pid, one.device, len(one.shards), ", ".join(one.shards[:2])) for one in info.workers]
    if rows:
        lines += ["", table(("host", "process", "device", "holds", "shards"), rows)]
    elif info.left:
        lines += ["", "nobody is at it: the same svdbank build goes on, alone or as --shard I/N on several machines"]
    else:
        lines += ["", f"all is recorded: svdbank publish {quote(info.path)}"]
    return "\n".join(lines)


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
