"""``svdbank init``: a PEFT adapter folder from a bank, without an SVD."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypedDict, Unpack

import click

from svdbank_cli.completion import complete_adapter, complete_bank
from svdbank_cli.options import find_options, with_output
from svdbank_cli.output import Output, table
from svdbank_cli.parameters import CountType, LayersType, PatternType

if TYPE_CHECKING:
    from svdbank.verbs.init import InitReport


class _Options(TypedDict):
    """What goes to ``svdbank.init`` as it is."""

    rank: int | None
    method: Literal["mica", "milora", "pissa"]
    alpha: float | None
    rslora: bool
    dropout: float
    band: str | None
    beside: tuple[str, ...]
    residual_out: str | None
    base_model: str | None
    task_type: str | None
    force: bool
    pull: str | None
    find: bool


@click.command("init", short_help="Write a fresh PEFT adapter from a bank: MiCA, MiLoRA or PiSSA.")
@click.argument("source", metavar="MODEL|BANK", shell_complete=complete_bank)
@click.option("-r", "--rank", type=click.IntRange(min=1), help="Rank of the adapter. [default: 16]")
@click.option("-o", "--output", "adapter", type=click.Path(), required=True, help="Adapter folder to write.")
@click.option(
    "--method",
    type=click.Choice(["mica", "milora", "pissa"]),
    default="mica",
    show_default=True,
    help="What the factors are initialised to.",
)
@click.option("--alpha", type=float, help="LoRA alpha. [default: each weight's rank, so that the scale is 1]")
@click.option("--rslora", is_flag=True, help="Scale by alpha/√rank instead of alpha/rank.")
@click.option("--dropout", type=click.FloatRange(0, 1), default=0.0, show_default=True, help="LoRA dropout.")
@click.option(
    "--targets", multiple=True, metavar="PATTERN", help="Modules, as PEFT names them. [default: all linear in the bank]"
)
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Modules to leave out of the targets, named in the same way.")
@click.option("--layers", type=LayersType(), help="Only these layers, e.g. 0,3,5-8.")
@click.option("--rank-pattern", multiple=True, type=PatternType(), help="Another rank for a module, e.g. v_proj=8. Repeatable.")
@click.option("--alpha-pattern", multiple=True, type=PatternType(), help="Another alpha for a module. Repeatable.")
@click.option(
    "--params",
    type=CountType(),
    help="Choose ranks so that at most N parameters train: each weight gets its directions with σ/σ_max up to one level, "
    "which is the highest that N pays for.",
)
@click.option(
    "--band",
    metavar="I:J|auto",
    help="Minor directions I to J-1 instead of the first; auto: the next band free beside --beside.",
)
@click.option(
    "--beside",
    multiple=True,
    type=click.Path(),
    metavar="ADAPTER",
    shell_complete=complete_adapter,
    help="Leave this adapter's bands free. Repeatable.",
)
@click.option(
    "--residual-out",
    type=click.Path(),
    metavar="DIR",
    help="For milora and pissa: also write the base W − s·B·A, to which the adapter belongs, as a checkpoint. Where BANK is "
    "named, --base-model has to name the model whose weights are read.",
)
@click.option(
    "--base-model",
    metavar="NAME",
    help="Name or path of the base model to write into the config. [default: the full path of MODEL's folder, else the name in the bank]",
)
@click.option("--task-type", metavar="TYPE", help="PEFT task type, e.g. CAUSAL_LM. [default: as the model's config.json says]")
@click.option("--force", is_flag=True, help="Replace an adapter that is there.")
@find_options
@with_output
def init_command(
    source: str,
    adapter: str,
    targets: tuple[str, ...],
    exclude: tuple[str, ...],
    layers: tuple[int, ...] | None,
    rank_pattern: tuple[tuple[str, float], ...],
    alpha_pattern: tuple[tuple[str, float], ...],
    params: int | None,
    output: Output,
    **options: Unpack[_Options],
) -> None:
    """Write a PEFT adapter folder for MODEL from its bank: B is the minor left singular vectors, A is zero (MiCA).

    Load it with PeftModel.from_pretrained(model, ADAPTER, is_trainable=True, low_cpu_mem_usage=True): no SVD, only A trains.
    MiLoRA and PiSSA adapters belong to a base from which their start is taken out: load them with svdbank.peft.load_adapter and the
    bank, or write that base with --residual-out.

    \b
    Examples:
      svdbank init HuggingFaceTB/SmolLM2-135M -r 16 -o adapter
      svdbank init ./my-model.bank -r 8 --alpha 16 --targets q_proj --targets v_proj -o adapter
      svdbank init HuggingFaceTB/SmolLM2-135M --params 2M -o adapter
      svdbank init HuggingFaceTB/SmolLM2-135M -r 16 --beside law --beside med -o code
      svdbank init HuggingFaceTB/SmolLM2-135M -o adapter --pull org/SmolLM2-135M-svdbank
      svdbank init HuggingFaceTB/SmolLM2-135M --method milora -r 64 -o adapter --residual-out base-without
    """
    import svdbank

    with output.progress() as progress:
        written = svdbank.init(
            source,
            output=adapter,
            targets=targets or ("all-linear",),
            exclude=exclude,
            layers=layers or (),
            rank_pattern={module: _whole(module, number) for module, number in rank_pattern},
            alpha_pattern=dict(alpha_pattern),
            params=params,
            progress=progress,
            **options,
        )
    output.notes(written.notes)
    if written.band is not None and (options["band"] == "auto" or options["beside"]):
        count = len(options["beside"])
        output.say(f"band {written.band[0]}:{written.band[1]}, free beside {count} adapter{'' if count == 1 else 's'}")
    output.data(written, _table if params is not None else str)


def _whole(module: str, number: float) -> int:
    if number < 1 or number != int(number):
        raise click.BadParameter(f"{module}={number:g}: a rank is a positive whole number", param_hint="--rank-pattern")
    return int(number)


def _table(written: InitReport) -> str:
    """The ranks chosen, one line a role, and the folder."""
    by_role: dict[str, list[int]] = {}
    for name, rank in written.ranks.items():
        leaves = [part for part in name.removesuffix(".weight").split(".") if not part.isdigit()]
        by_role.setdefault(leaves[-1], []).append(rank)
    rows = [(role, len(ranks), min(ranks), sorted(ranks)[len(ranks) // 2], max(ranks)) for role, ranks in by_role.items()]
    shown = table(("module", "weights", "least", "median", "most"), rows)
    return f"{shown}\n{written.trainable_parameters} parameters train\n{written.adapter}"
