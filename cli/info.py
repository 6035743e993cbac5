"""``svdbank info``: what a bank holds and how good it is."""

from __future__ import annotations

import math
from shlex import quote
from typing import TYPE_CHECKING

import click

from svdbank.core.units import size
from svdbank_cli.completion import complete_bank
from svdbank_cli.options import with_output
from svdbank_cli.output import Output, dequantised, table

if TYPE_CHECKING:
    from svdbank.bank.spectrum import WeightSpectrum
    from svdbank.building.standing import UnfinishedInfo
    from svdbank.verbs.info import BankInfo

_BARS = "▁▂▃▄▅▆▇█"


@click.command("info", short_help="Describe a BANK, or how far the build of one is.")
@click.argument("bank", shell_complete=complete_bank)
@click.option("--weights", is_flag=True, help="A row for each weight: its singular values' ends, condition, gap, certificate.")
@click.option(
    "--csv", "as_csv", is_flag=True, help="The same rows with every column, as comma-separated text for other programs."
)
@click.option("--missing", is_flag=True, help="Of an unfinished build: only what is left, a shard a line, for a retry.")
@with_output
def info_command(bank: str, weights: bool, as_csv: bool, missing: bool, output: Output) -> None:
    """Describe a BANK: its folder, its address (hf://org/name, s3://…), or the model whose cached bank is meant; of an unfinished build
    what is done and who is at it.

    \b
    Examples:
      svdbank info ./my-model.bank
      svdbank info HuggingFaceTB/SmolLM2-135M --json
      svdbank info ./my-model.bank --weights
      svdbank info ./my-model.bank --csv > spectrum.csv
      svdbank info ./unfinished.bank --missing
    """
    if sum((weights, as_csv, missing)) > 1 or (as_csv and output.json):
        raise click.UsageError("--weights, --csv and --missing exclude each other, and --csv is no --json")
    if weights or as_csv:
        _spectrum(bank, as_csv, output)
        return
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


def _spectrum(bank: str, as_csv: bool, output: Output) -> None:
    import svdbank

    rows = svdbank.open(bank).spectrum()
    if as_csv:
        click.echo(rows.to_csv(), nl=False)
    else:
        output.data(tuple(rows), _weights)


def _weights(rows: tuple[WeightSpectrum, ...]) -> str:
    header = ("weight", "out x in", "rank", "σ_max", "σ_min", "condition", "gap", "resolved", "residual", "solved by")
    cells = [
        (
            row.name,
            f"{row.out_features}x{row.in_features}",
            row.rank,
            f"{row.sigma_max:.2e}",
            f"{row.sigma_min:.2e}",
            f"{row.condition:.1e}",
            "-" if row.gap is None else f"{row.gap:.0e}",
            row.resolved_rank,
            f"{row.residual:.0e}",
            row.path,
        )
        for row in rows
    ]
    return table(header, cells) + (
        "\n\nσ in the weight's own units; gap: (σ_{R+1} − σ_R) / σ_max at the stored rank R; resolved: the largest stored rank"
        "\nwhose subspace the data define to 1e-6; residual: ‖Wv − σu‖/‖W‖"
    )


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
    floor = min((share for f in info.families for _, share in f.curve if share > 0), default=1.0)
    rows = [
        (
            f.name,
            f"{f.weights} + {f.tied} tied" if f.tied else f.weights,
            f"{f.out_features}x{f.in_features}",
            f.rank,
            _spark([share for _, share in f.curve], floor),
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
        f"holds       {info.weights} weights, rank {info.rank}, side {info.side}, {info.dtype}, {size(info.nbytes)} of vectors, "
        f"format {info.format}",
        f"base        {info.base_digest[:16]}",
        f"solved by   {solved}",
        *([f"quantised   {dequantised(info.quantised)}"] if info.quantised else []),
        "",
        table(
            ("family", "weights", "out x in", "rank", "σ_1 to σ_rank", "residual", "orthogonality", "condition", "unresolved"),
            rows,
        ),
        "",
        f"σ_1 to σ_rank: the stored end of the spectrum, the smallest first, median over weights of σ/σ_max; ▁ is {floor:.0e}, █ is 1, in",
        "equal factors. residual: worst ‖Wv − σu‖/‖W‖ before the cast to storage; unresolved: ranks whose gap is too small for the data to",
        "define their subspace to 1e-6, whoever computes it; condition: the largest σ_max/σ_min",
        "",
        table(("rank", "MiCA reads", "MiLoRA reads"), [(s.rank, size(s.left), _both(s.both)) for s in info.sizes]),
        "",
        "Bytes of vectors of all weights at a rank, left ones and both sides; kB, MB and GB are powers of 1000.",
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


def _both(nbytes: int | None) -> str:
    return "not stored" if nbytes is None else size(nbytes)


def _spark(shares: list[float], floor: float) -> str:
    """Heights of σ/σ_max in equal factors between ``floor`` and 1; a σ of 0 is a dot."""
    steps = len(_BARS) - 1
    span = -math.log(floor) or 1.0
    return "".join(
        _BARS[min(steps, max(0, round(steps * (1 + math.log(share) / span))))] if share > 0 else "·" for share in shares
    )
