"""``svdbank build``: a checkpoint into a bank."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

import click

from svdbank.core.units import duration, size
from svdbank_cli.completion import complete_model
from svdbank_cli.options import BuildOptions, build_options, device_option, with_output
from svdbank_cli.output import Output, dequantised, named_by

if TYPE_CHECKING:
    from svdbank.building.fetching import FetchReport
    from svdbank.verbs.build import BuildReport


@click.command("build")
@click.argument("model", shell_complete=complete_model)
@build_options
@device_option
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="Workers here: on a CPU as many as asked for, in one process; of several GPUs the first so many, a process each. "
    "[default: 1; every GPU of --device cuda]",
)
@click.option(
    "--shard",
    metavar="I/N|auto[/N]",
    help="Work beside other processes and machines that see the bank's folder, first on part I of N. auto: as Slurm's array, an "
    "indexed Job (with N) or torchrun says. Whoever is done helps the others; the last publishes.",
)
@click.option(
    "--ray",
    is_flag=False,
    flag_value="local",
    metavar="[ADDRESS]",
    help="Have Ray start the workers: local (a Ray of its own; so --ray alone), auto or HOST:PORT (a cluster that runs, whose machines "
    "see the bank's folder and the model). One a GPU, or a group of --threads processors; as many as there is room for, or --workers.",
)
@click.option("--dry-run", is_flag=True, help="Show the plan and stop, as svdbank plan does.")
@with_output
def build_command(
    model: str,
    bank: str | None,
    targets: tuple[str, ...],
    device: str,
    workers: int | None,
    shard: str | None,
    ray: str | None,
    dry_run: bool,
    output: Output,
    **options: Unpack[BuildOptions],
) -> None:
    """Decompose the weights of MODEL into a bank.

    MODEL is org/name[@revision] on the Hub, or a folder or file of safetensors. A build that was stopped goes on where it was;
    building again with more --targets adds them to the bank.

    \b
    Examples:
      svdbank build HuggingFaceTB/SmolLM2-135M
      svdbank build ./my-model -o ./my-model.bank --rank 64
      svdbank build ./my-model --targets q_proj --targets v_proj
      svdbank build ./my-model --targets '.*layers\\.(0|1)\\..*proj'
      svdbank build meta-llama/Llama-3.1-70B --disk-budget 20GB --no-keep
      svdbank build ./my-model --workers 2 --threads 8
      svdbank build ./my-model --device cuda:0,cuda:2
      svdbank build ./my-model -o /shared/my-model.bank --shard 1/4       on each of four machines, with its number
      svdbank build ./my-model -o /shared/my-model.bank --shard auto      in sbatch --array, or torchrun
      svdbank build ./my-model -o /shared/my-model.bank --ray auto        on a machine of a Ray cluster
      svdbank build ./my-model --json | tail -1
    """
    import svdbank

    targets = targets or ("all-linear",)
    if dry_run:
        from svdbank_cli.plan import show_plan

        show_plan(model, bank, targets, device, output, options)
        return
    reports: list[BuildReport] = []
    with output.progress(lines=True) as progress:
        svdbank.build(
            model,
            bank,
            targets=targets,
            device=device,
            workers=workers,
            shard=shard,
            ray=ray,
            progress=progress,
            on_report=reports.append,
            **options,
        )
    output.data(reports[0], _text)


def _text(report: BuildReport) -> str:
    if report.reused and report.solved:
        what = f"decomposed {report.solved} weights, reused {report.reused} of {report.weights}"
    elif report.reused:
        what = f"reused {report.reused} of {report.weights} weights: nothing to do"
    else:
        what = f"decomposed {report.solved} weights"
    where = f" on {report.device}" if report.solved and report.device != "cpu" else ""
    lines = [
        f"{what} in {duration(report.seconds)}{where}",
        f"largest residual ‖Wv − σu‖/‖W‖  {report.largest_residual:.1e}",
        f"{size(report.nbytes)} of vectors in {report.bank}",
    ]
    if report.quantised:
        lines.insert(1, dequantised(report.quantised))
    if not report.same_bytes:
        lines.append("the bank was built from the same values saved in another dtype: it serves this model as it is")
    lines += [f"names: {line}" for line in named_by(report.decided, report.doubt, report.decided_before)]
    if fetched := _fetch(report.fetch):
        lines.append(fetched)
    if report.fallbacks:
        lines.insert(len(lines) - 1, f"{len(report.fallbacks)} weights needed a second method (svdbank info shows which)")
    return "\n".join(lines)


def _fetch(fetch: FetchReport) -> str | None:
    """How the bytes came from the Hub, in one line; None for a model that was here."""
    if fetch.way == "local":
        return None
    parts = [f"fetched {size(fetch.nbytes)} by {fetch.way}"]
    if fetch.requests:
        whose = " for headers (the Hub client does not count its own)" if fetch.way == "cache" else ""
        parts.append(f"{fetch.requests} requests{whose}, {fetch.retries} of them repeated")
    parts.append(f"solver waited {duration(fetch.waiting_seconds)}")
    if not fetch.checked:
        parts.append("not checked against a hash: the Hub has none for a range")
    return "; ".join(parts)
