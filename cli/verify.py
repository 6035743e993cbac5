"""``svdbank verify``: is this bank what was published?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from svdbank.core.errors import DamageError
from svdbank_cli.options import with_output
from svdbank_cli.output import Output, size

if TYPE_CHECKING:
    from svdbank.verbs.verify import VerifyReport


@click.command("verify", short_help="Check a BANK against its records, or against its model.")
@click.argument("bank")
@click.option("--data", is_flag=True, help="Hash every byte instead of looking at sizes.")
@click.option("--source", "model", metavar="MODEL", help="Compare the bases with the weights they were made from.")
@with_output
def verify_command(bank: str, data: bool, model: str | None, output: Output) -> int:
    """Check a BANK against its records: structure and sizes by default, in a second or two.

    Exit code 0 when sound, 4 when anything is damaged; then each file is named.

    \b
    Examples:
      svdbank verify ./my-model.bank
      svdbank verify ./my-model.bank --data
      svdbank verify ./my-model.bank --source ./my-model
    """
    import svdbank

    with output.progress() as progress:
        report = svdbank.verify(bank, data=data, model=model, progress=progress)
    output.data(report, _text)
    return 0 if report.sound else DamageError.exit_code


def _text(report: VerifyReport) -> str:
    scope = {"structure": "files, sizes and metadata", "data": "every byte", "source": "files, and bases against the model"}[
        report.level
    ]
    if report.sound:
        verdict = f"sound: {report.weights} weights in {report.files} files, {size(report.nbytes)}; checked {scope}"
        if report.unrecorded:
            left = f"{len(report.unrecorded)} files belong to no published part (unfinished builds leave them)"
            verdict += f"\n{left}: {report.unrecorded[0]}, …"
        return verdict
    lines = [f"damaged  {damage.file}: {damage.what}" for damage in report.damage]
    return "\n".join([*lines, f"DAMAGED: {len(report.damage)} of {report.files} files; checked {scope}", f"  → {report.next}"])
