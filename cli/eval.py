"""``svdbank eval``: loss and perplexity, adapters × texts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypedDict, Unpack

import click

from svdbank_cli.completion import complete_model
from svdbank_cli.options import report_option, with_output, write_page
from svdbank_cli.output import Output, table

if TYPE_CHECKING:
    from svdbank.verbs.eval import EvalReport


class _Options(TypedDict):
    """What goes to ``svdbank.eval`` as it is."""

    tasks: tuple[str, ...]
    task_limit: int | None
    task_folder: str | None
    field: str
    split: str
    length: int | None
    tokens: int | None
    batch_size: int
    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    load_in: Literal["4bit", "8bit"] | None


def _pairs(context: click.Context, option: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """``NAME=PLACE`` as a dict; a bare place is named by its last part."""
    from pathlib import Path

    from svdbank.core.places import named_place

    named: dict[str, str] = {}
    for value in values:
        name, place = named_place(value)
        if name is None:
            name = Path(value).name
        if not name or not place:
            raise click.BadParameter(f"{value!r} is not NAME=PLACE")
        if name in named:
            raise click.BadParameter(f"{name!r} is named twice: write NAME={place}")
        named[name] = place
    return named


@click.command("eval", short_help="Measure MODEL alone and with adapters on texts.")
@click.argument("model", shell_complete=complete_model)
@click.option("--adapter", "adapters", multiple=True, metavar="NAME=DIR[,DIR]", callback=_pairs, help="Adapters. Repeatable.")
@click.option("--data", multiple=True, metavar="NAME=FILE", callback=_pairs, help="Texts, as in train. Repeatable.")
@click.option("--field", metavar="NAME", default="text", show_default=True, help="Column of text in tables.")
@click.option("--split", metavar="NAME", default="train", show_default=True, help="Split of a Hub dataset.")
@click.option("--length", type=int, metavar="TOKENS", help="Tokens of a window. [default: 1024, or what the model takes]")
@click.option("--tokens", type=click.IntRange(min=1), metavar="N", help="Stop a text after N tokens. [default: all of it]")
@click.option("--batch-size", type=click.IntRange(min=1), default=4, show_default=True, help="Windows at a time.")
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), default="auto", show_default=True)
@click.option("--load-in", type=click.Choice(["4bit", "8bit"]), help="Quantise the base by bitsandbytes while loading.")
@click.option("--tasks", multiple=True, metavar="TASK", help="lm-eval tasks; needs pip install 'svdbank[eval]'. Repeatable.")
@click.option("--task-limit", type=click.IntRange(min=1), metavar="N", help="Examples of a task. [default: all]")
@click.option("--task-folder", type=click.Path(), help="Folder with task files of your own.")
@report_option
@with_output
def eval_command(
    model: str, adapters: dict[str, str], data: dict[str, str], page: str | None, output: Output, **options: Unpack[_Options]
) -> None:
    """Measure MODEL alone and with each adapter on each text: loss in nats a token, perplexity, standard errors.

    Windows begin with what the tokenizer puts before a text (BOS). Errors are over documents. The change against the base is measured in
    pairs, document by document, so its error is far below that of the loss. Several folders after one name act together.

    \b
    Examples:
      svdbank eval HuggingFaceTB/SmolLM2-135M --adapter law=./law --adapter med=./med --data law=licences.jsonl --data notes.txt
      svdbank eval HuggingFaceTB/SmolLM2-135M --adapter both=./law,./med --data licences.jsonl --tokens 100000 --json
      svdbank eval HuggingFaceTB/SmolLM2-135M --adapter law=./law --data licences.jsonl --report law.html
      svdbank eval HuggingFaceTB/SmolLM2-135M --adapter law=./law --tasks hellaswag --task-limit 100
    """
    import svdbank

    stacks = {name: tuple(folders.split(",")) for name, folders in adapters.items()}
    with output.progress() as progress:
        report = svdbank.eval(model, data=data, adapters=stacks, progress=progress, **options)
    output.data(report, _text)
    output.notes(report.notes)
    if page is not None:
        folders = {folder: name for name, stack in stacks.items() for folder in stack if len(stack) == 1}
        write_page([*(f"{name}={folder}" for folder, name in folders.items()), report], page, output)


def _text(report: EvalReport) -> str:
    parts = []
    if report.scores:
        rows = [
            (
                score.text,
                score.adapter,
                f"{score.loss:.4f}{_error(score.error)}",
                f"{score.perplexity:.2f}",
                "" if score.adapter == "base" else f"{score.change:+.4f}{_error(score.change_error)}",
                f"{score.tokens:,}",
                f"{score.draws:,} {score.over}" if score.draws != 1 else f"none: 1 {score.over.removesuffix('s')}",
            )
            for score in report.scores
        ]
        parts.append(table(("text", "adapter", "loss", "perplexity", "change", "tokens", "errors over"), rows))
    if report.tasks:
        scores = [
            (
                score.task,
                score.adapter,
                score.metric,
                f"{score.value:.4f}" + ("" if score.error is None else f" ± {score.error:.4f}"),
            )
            for score in report.tasks
        ]
        parts.append(table(("task", "adapter", "metric", "value"), scores))
    return "\n\n".join(parts)


def _error(error: float) -> str:
    """Nothing where there is none, because one document or window is all that was measured."""
    return f" ± {error:.4f}" if error == error else ""
