"""``svdbank repair``: make what is damaged again, keep the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from svdbank.core.errors import DamageError
from svdbank_cli.completion import complete_bank, complete_model
from svdbank_cli.options import with_output
from svdbank_cli.output import Output

if TYPE_CHECKING:
    from svdbank.verbs.repair import RepairReport


@click.command("repair", short_help="Make what is damaged in a BANK again, from a copy or its model.")
@click.argument("bank", type=click.Path(), shell_complete=complete_bank)
@click.option(
    "--source",
    "model",
    metavar="MODEL",
    shell_complete=complete_model,
    help="The model it was built from; needed where that was a folder. Default: the repository and commit that the bank names.",
)
@click.option(
    "--from",
    "origin",
    metavar="ADDRESS",
    help="The same bank elsewhere (hf://org/name[@revision], s3://…): damaged files, a lost index or manifest come from there. Default: "
    "where it was pulled from, if the cache still knows.",
)
@click.option(
    "--device",
    default="auto",
    show_default=True,
    help="Where weights are solved: auto (the kind of device that solved them before, which gives the same bytes), cpu, cuda, cuda:1 …",
)
@click.option(
    "--dry-run", is_flag=True, help="Hash every byte and say what would be done and how long it takes; change nothing."
)
@with_output
def repair_command(bank: str, model: str | None, origin: str | None, device: str, dry_run: bool, output: Output) -> int:
    """Make what is damaged in a BANK again, from the same bank elsewhere or from weights whose hashes match, and keep what is sound.

    Every byte is hashed first. New files take the place of damaged ones by renames; sound weights can be looked up meanwhile. Where the
    bytes are others than before (another machine), slim adapters of those weights refuse the bank by name, and others do not notice.
    Exit code 0 when the bank is sound at the end, 4 with --dry-run when it is not.

    \b
    Examples:
      svdbank repair ./my-model.bank --source ./my-model --dry-run
      svdbank repair ./my-model.bank --source ./my-model
      svdbank repair ./my-model.bank --source ./my-model --device cuda
      svdbank repair ./my-model.bank --from hf://org/my-model-bank
    """
    import svdbank

    with output.progress() as progress:
        report = svdbank.repair(bank, model=model, origin=origin, device=device, dry_run=dry_run, progress=progress)
    output.data(report, _text)
    return 0 if report.sound else DamageError.exit_code


def _text(report: RepairReport) -> str:
    if not report.damage:
        return f"sound: nothing to repair in {report.path}"
    lines = [f"damaged  {one.file}: {one.what}" for one in report.damage]
    if report.anew:
        lines.append(
            "Its index or manifest is lost and came from nowhere: nothing else says which bytes are right, so all is solved again."
        )
    if report.fetched:
        what = "would fetch" if report.dry_run else "fetched"
        lines.append(f"{what} {len(report.fetched)} damaged files from {report.origin}, as they were recorded")
    if report.dry_run:
        lines.append(
            f"would solve {report.solved} weights again, about {report.seconds:.0f} s on one processor, and keep {report.kept}"
        )
    else:
        lines.append(f"solved {report.solved} weights again, kept {report.kept}, in {report.seconds:.1f} s")
        if report.changed and not report.anew:
            lines.append(
                f"{len(report.changed)} weights have other bytes than before, first {report.changed[0]}: "
                "slim adapters on them need --to lora from where the bank was as before"
            )
        lines.append("sound" if report.sound else "STILL DAMAGED: svdbank verify --data shows where")
    return "\n".join(lines)
