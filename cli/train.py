"""``svdbank train``: continued pretraining of an adapter through Transformers' Trainer."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any

import click

from svdbank.core.units import duration, size
from svdbank_cli.completion import complete_adapter, complete_bank, complete_model
from svdbank_cli.options import find_options, report_option, with_output, write_page
from svdbank_cli.output import Output

if TYPE_CHECKING:
    from svdbank.training.report import TrainReport


@click.command("train", short_help="Train an adapter for MODEL on text; measure held-out loss.")
@click.argument("model", required=False, shell_complete=complete_model)
@click.option("-o", "--output", "adapter", type=click.Path(), help="Adapter folder to write.")
@click.option(
    "--data", multiple=True, metavar="FILE", help="Text, .jsonl, .csv, .parquet, a folder, org/name on the Hub. Repeatable."
)
@click.option("--config", type=click.Path(), help="Flat TOML file of these options; what is given here overrides it.")
@click.option("--method", type=click.Choice(["mica", "milora", "pissa", "lora"]), help="[default: mica]")
@click.option("-r", "--rank", type=int, help="Rank of the adapter. [default: 16]")
@click.option("--alpha", type=float, help="LoRA alpha. [default: the rank, so that the scale is 1]")
@click.option("--rslora", is_flag=True, default=None, help="Scale by alpha/√rank instead of alpha/rank.")
@click.option("--dropout", type=float, help="LoRA dropout. [default: 0.05]")
@click.option("--targets", multiple=True, metavar="PATTERN", help="Modules, as PEFT names them. [default: all-linear]")
@click.option(
    "--on-top-of",
    multiple=True,
    metavar="ADAPTER",
    shell_complete=complete_adapter,
    help="Folder or org/name on the Hub that lies frozen beneath, in its own band. Repeatable.",
)
@click.option(
    "--bank",
    type=click.Path(),
    shell_complete=complete_bank,
    help="Bank: its folder, or its address (hf://org/name). [default: the model's bank in the cache]",
)
@click.option("--build", is_flag=True, help="Build the bank into the cache first where there is none.")
@click.option("--field", metavar="NAME", help="Column of text in tables. [default: text]")
@click.option("--split", metavar="NAME", help="Split of a Hub dataset. [default: train]")
@click.option("--streaming", is_flag=True, default=None, help="Read on the fly, without a copy in the cache; needs --steps.")
@click.option("--held-out", type=float, metavar="SHARE", help="Share of the documents kept for measuring. [default: 0.05]")
@click.option(
    "--held-out-blocks", type=int, metavar="N", help="Blocks measured at most. [default: 16 to 64, by the run's length]"
)
@click.option(
    "--keep",
    type=click.Choice(["best", "last"]),
    help="State that is written: the best by loss on the text held out (the start's: nothing is written), or the last. [default: best]",
)
@click.option("--patience", type=int, metavar="N", help="End after N measurements in a row without a new best one.")
@click.option("--retain", multiple=True, metavar="FILE", help="Other text, to measure what is forgotten. Repeatable.")
@click.option("--length", type=int, metavar="TOKENS", help="Tokens of a block. [default: 1024, or what the model takes]")
@click.option(
    "--packing", is_flag=True, default=None, help="Let attention and positions begin anew at each document in a block."
)
@click.option("--batch-size", type=int, metavar="N", help="Blocks a device computes at a time. [default: 4]")
@click.option("--accumulation", type=int, metavar="N", help="Such batches a step. [default: 1]")
@click.option("--epochs", type=float, help="Times through the data. [default: 1]")
@click.option("--steps", type=int, help="Steps to make, instead of --epochs.")
@click.option("--learning-rate", "--lr", type=float, metavar="RATE", help="AdamW's peak rate. [default: found at the start]")
@click.option("--schedule", metavar="NAME", help="Transformers' name of the schedule. [default: cosine]")
@click.option("--warmup", type=float, metavar="SHARE", help="Share of the steps that warm up. [default: 0.1]")
@click.option("--weight-decay", type=float, help="[default: 0.01]")
@click.option("--clip", type=float, metavar="NORM", help="Norm that gradients are clipped to; 0 for never. [default: 0.3]")
@click.option(
    "--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), help="[default: bfloat16 on a GPU, else float32]"
)
@click.option("--load-in", type=click.Choice(["4bit", "8bit"]), help="Quantise the base by bitsandbytes while loading.")
@click.option("--gradient-checkpointing", is_flag=True, default=None, help="Less memory for activations, a third more time.")
@click.option("--save-steps", type=int, metavar="N", help="A checkpoint every N steps.")
@click.option("--save-minutes", type=float, metavar="N", help="A checkpoint every N minutes. [default: 10]")
@click.option("--log-steps", type=int, metavar="N", help="Steps a point of the curve. [default: 10]")
@click.option("--seed", type=int, help="[default: 0]")
@click.option("--force", is_flag=True, help="Replace an adapter, or an unfinished run of other options, that is there.")
@find_options
@report_option
@with_output
def train_command(
    model: str | None,
    adapter: str | None,
    config: str | None,
    build: bool,
    force: bool,
    page: str | None,
    output: Output,
    **options: Any,
) -> int:
    """Train an adapter for MODEL on text and write it as a PEFT folder; measure held-out loss before and after.

    Without --learning-rate a rate that suits model, method and text is looked for first, and said. What goes wrong is said while it runs; a
    run that made the text held out no better writes nothing unless told --keep last, and ends with exit code 5.

    A killed or interrupted run goes on from its last checkpoint when the same command is run again. The resolved options lie beside the
    adapter in training.toml, the figures in training.json. For several GPUs: accelerate launch -m svdbank_cli.main train …

    \b
    Examples:
      svdbank train HuggingFaceTB/SmolLM2-135M -r 16 -o law --data licences.jsonl --build
      svdbank train HuggingFaceTB/SmolLM2-135M -o med --data notes/ --on-top-of law --retain licences.jsonl
      svdbank train HuggingFaceTB/SmolLM2-135M -o law --data licences.jsonl --pull org/SmolLM2-135M-svdbank
      svdbank train --config law/training.toml --lr 1e-3 -o law-slow
      svdbank train HuggingFaceTB/SmolLM2-135M -o plain --data licences.jsonl --method lora --patience 3
    """
    import svdbank

    given = {name: value for name, value in options.items() if value not in (None, ())}
    if adapter is not None:
        given["output"] = adapter
    with output.progress(lines=True) as progress:
        report = svdbank.train(
            model, config=config, build=build, force=force, progress=progress if _is_main() else None, **given
        )
    if _is_main():
        output.data(report, _text)
        if page is not None and report.kept != "nothing":
            write_page([report.adapter], page, output)
    return WORSE if report.worse else 0


#: Exit code of a run that is done and made the text held out worse, or no better.
WORSE = 5


def _is_main() -> bool:
    """Of the processes that a launcher started, one talks."""
    return os.environ.get("RANK", "0") == "0"


def _seconds(report: TrainReport) -> str:
    """Of a step, with its standard error where more than one step was timed."""
    error = report.step_seconds_error
    return f"{report.step_seconds:.2f}" + (f" ± {error:.2f}" if math.isfinite(error) else "")


def _text(report: TrainReport) -> str:
    lines = [
        f"trained   {report.steps} steps, {report.tokens:,} tokens in {duration(report.seconds)}"
        + (f", from the checkpoint of step {report.resumed_from}" if report.resumed_from is not None else ""),
        _rate(report),
        f"step      {_seconds(report)} s; {report.trainable_parameters:,} trainable parameters, "
        f"{size(report.peak_bytes)} memory at most; measuring took {report.measuring_share:.0%} as long as the steps",
        *([f"left out  {len(report.left_out)} weights with fewer directions than the rank"] if report.left_out else ()),
    ]
    for change in (report.held_out, *report.retained):
        if change is not None:
            lines.append(
                f"loss      {change.before:.3f} ± {change.before_error:.3f} before, {change.after:.3f} ± {change.after_error:.3f} after, "
                f"{change.change:+.3f} ± {change.change_error:.3f} on {change.text} ({change.blocks} blocks)"
            )
    lines += [f"note      {notice}" for notice in report.notices]
    return "\n".join(lines) + f"\n\n{_written(report)}"


def _rate(report: TrainReport) -> str:
    found = report.calibration
    if found is None:
        return f"rate      {report.learning_rate:.3g}, as it was given"
    return f"rate      {report.learning_rate:.3g}, found: {found.why} ({report.calibration_share:.0%} of the steps' time)"


def _written(report: TrainReport) -> str:
    """What lies where: the last line is the adapter's folder where there is one."""
    if report.kept == "nothing":
        return (
            "Nothing was written: the text held out was best before training.\n"
            f"A lower rate than {report.learning_rate:.2g} (--learning-rate), more text, or --keep last to have what came of it."
        )
    said = (
        f"state of step {report.kept_step} of {report.steps}, the best of {len(report.measured)} measured\n"
        if report.kept == "best"
        else ""
    )
    worse = "The text held out is worse than before by more than two standard errors.\n" if report.worse else ""
    return f"{said}{worse}{report.adapter}"
