"""``svdbank init``: a PEFT adapter folder from a bank, without an SVD."""

from __future__ import annotations

import click

from svdbank_cli.options import with_output
from svdbank_cli.output import Output


@click.command("init")
@click.argument("source", metavar="MODEL|BANK")
@click.option("-r", "--rank", type=click.IntRange(min=1), default=16, show_default=True, help="Rank of the adapter.")
@click.option("-o", "--output", "adapter", type=click.Path(), required=True, help="Adapter folder to write.")
@click.option(
    "--method", type=click.Choice(["mica"]), default="mica", show_default=True, help="What the factors are initialised to."
)
@click.option("--alpha", type=float, help="LoRA alpha. [default: the rank, so that the scale is 1]")
@click.option("--rslora", is_flag=True, help="Scale by alpha/√rank instead of alpha/rank.")
@click.option("--dropout", type=click.FloatRange(0, 1), default=0.0, show_default=True, help="LoRA dropout.")
@click.option(
    "--targets", multiple=True, metavar="PATTERN", help="Modules, as PEFT names them. [default: all linear in the bank]"
)
@click.option(
    "--base-model", metavar="NAME", help="Name or path of the base model to write into the config. [default: the bank's]"
)
@click.option("--task-type", metavar="TYPE", help="PEFT task type, e.g. CAUSAL_LM.")
@click.option("--force", is_flag=True, help="Replace an adapter that is there.")
@with_output
def init_command(
    source: str,
    rank: int,
    adapter: str,
    method: str,
    alpha: float | None,
    rslora: bool,
    dropout: float,
    targets: tuple[str, ...],
    base_model: str | None,
    task_type: str | None,
    force: bool,
    output: Output,
) -> None:
    """Write a PEFT adapter folder for MODEL from its bank: B is the minor left singular vectors, A is zero.

    Load it with PeftModel.from_pretrained(model, ADAPTER, is_trainable=True, low_cpu_mem_usage=True): no SVD, only A trains.

    \b
    Examples:
      svdbank init HuggingFaceTB/SmolLM2-135M -r 16 -o adapter
      svdbank init ./my-model.bank -r 8 --alpha 16 --targets q_proj --targets v_proj -o adapter
    """
    import svdbank

    written = svdbank.init(
        source,
        output=adapter,
        rank=rank,
        method=method,
        alpha=alpha,
        targets=targets or ("all-linear",),
        dropout=dropout,
        rslora=rslora,
        base_model=base_model,
        task_type=task_type,
        force=force,
    )
    output.data(written, str)
