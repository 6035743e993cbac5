"""``svdbank verify``: is this bank what was published?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from svdbank.core.errors import DamageError
from svdbank.core.units import size
from svdbank_cli.completion import complete_bank, complete_model
from svdbank_cli.options import with_output
from svdbank_cli.output import Output
from svdbank_cli.parameters import ShareType

if TYPE_CHECKING:
    from svdbank.verbs.verify import VerifyReport


@click.command("verify", short_help="Check a BANK against its records, or against its model.")
@click.argument("bank", shell_complete=complete_bank)
@click.option("--data", is_flag=True, help="Hash every byte instead of looking at sizes.")
@click.option(
    "--source",
    "model",
    metavar="MODEL",
    shell_complete=complete_model,
    help="Measure the bases against the weights they were made from.",
)
@click.option(
    "--sample",
    type=ShareType(),
    help="With --source: measure this share of each family's weights, drawn anew each time, e.g. 5%.",
)
@with_output
def verify_command(bank: str, data: bool, model: str | None, sample: float | None, output: Output) -> int:
    """Check a BANK against its records: structure and sizes by default, in a second or two.

    --source reads the model and measures each stored basis against its weight: that it is one (residual), that its vectors are
    orthonormal, and that no smaller singular value was missed (one Cholesky factorisation a weight, no SVD). Use it, or a --sample of it,
    before you trust a bank that somebody else made.

    Of an address (hf://org/name, s3://…) the files are checked that are there now; of a folder of parts, as `svdbank ls` shows it, what is
    kept on this disk.

    Exit code 0 when sound, 4 when anything is damaged; then each file or weight is named.

    \b
    Examples:
      svdbank verify ./my-model.bank
      svdbank verify ./my-model.bank --data
      svdbank verify ./my-model.bank --source ./my-model
      svdbank verify ./my-model.bank --source ./my-model --sample 5%
      svdbank verify hf://org/SmolLM2-135M-svdbank --source HuggingFaceTB/SmolLM2-135M --sample 5%
    """
    import svdbank

    with output.progress() as progress:
        report = svdbank.verify(bank, data=data, model=model, sample=sample, progress=progress)
    output.data(report, _text)
    return 0 if report.sound else DamageError.exit_code


def _text(report: VerifyReport) -> str:
    proven = f"files, and the bases of {report.proven} of {report.weights} weights against the model"
    kept = "what is kept on this disk"
    scope = {"structure": "files, sizes and metadata", "data": "every byte", "source": proven, "parts": kept}[report.level]
    if report.sound:
        verdict = (
            _sampled(report)
            + f"sound: {report.weights} weights in {report.files} files, {size(report.nbytes)}; checked {scope}"
        )
        if report.unrecorded:
            left = f"{len(report.unrecorded)} files belong to no published part (unfinished builds leave them)"
            verdict += f"\n{left}: {report.unrecorded[0]}, …"
        return verdict
    next_command = [f"  → {report.next}"] if report.next else ["  → tell whoever published it"]
    lines = [*_sampled(report).splitlines(), *(f"damaged  {damage.file}: {damage.what}" for damage in report.damage)]
    return "\n".join([*lines, f"DAMAGED: {len(report.damage)} of {report.files} files; checked {scope}", *next_command])


def _sampled(report: VerifyReport) -> str:
    """What a sample shows: how likely it is that bad weights would have been seen."""
    if report.sample is None:
        return ""
    counts = ", ".join(f"{count} with {float(chance):.0%}" for chance, count in report.sample.needed.items())
    return (
        f"sample   {report.proven} of {report.weights} weights, some of each family, drawn by the system\n"
        f"chance   one bad weight is seen with {report.sample.share:.1%}, k with 1 − {1 - report.sample.share:.3f}^k: {counts}\n"
    )
