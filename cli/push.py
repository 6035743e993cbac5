"""``svdbank push``: a bank for others."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict, Unpack

import click

from svdbank.core.units import size
from svdbank_cli.completion import complete_bank
from svdbank_cli.options import with_output
from svdbank_cli.output import Output

if TYPE_CHECKING:
    from svdbank.verbs.push import PushReport


class _Options(TypedDict):
    """What goes to ``svdbank.push`` as it is."""

    base: str | None
    source: str | None
    public: bool
    expose_closed_base: bool
    force: bool


@click.command("push", short_help="Put a BANK on the Hub or in an object store, verified.")
@click.argument("bank", shell_complete=complete_bank)
@click.argument("to", metavar="PLACE")
@click.option(
    "--base",
    metavar="ORG/NAME[@REVISION]",
    help="The bank's base on the Hub, where it was built from a folder. Weights are compared by their hashes.",
)
@click.option(
    "--source",
    metavar="FOLDER",
    help="With --base: the folder that it was built from, whose files must be those on the Hub. [default: the Hub's cache]",
)
@click.option("--public", is_flag=True, help="Let everybody see the repository. [default: private]")
@click.option(
    "--expose-closed-base",
    is_flag=True,
    help="With --public, although the base is gated or private: gives everybody singular vectors and values of weights that its owner "
    "does not give to everybody.",
)
@click.option("--force", is_flag=True, help="Replace a bank of another base or other options, or put it beside other files.")
@with_output
def push_command(bank: str, to: str, output: Output, **options: Unpack[_Options]) -> None:
    """Put BANK (a folder, or a model whose bank is in the cache) at PLACE: the repository org/name[@branch] of the Hugging Face Hub, or
    s3://bucket/path, gs://bucket/path.

    Every byte is verified first. Files are uploaded, then one commit shows all of them: until then the repository is as it was, and the
    same command goes on after an interruption. A bank that is there already makes no commit. Its card says base, digests, families,
    certificates, sizes and the base's licence. Locks, logs and whatever else is in the folder stay here. The token is the Hub client's:
    hf auth login, or HF_TOKEN. In an object store there is no card and no commit: the manifest, which makes files a bank, is put last.
    Credentials are obstore's (AWS_…, GOOGLE_…); it needs: pip install 'svdbank[s3]'.

    \b
    Examples:
      svdbank push HuggingFaceTB/SmolLM2-135M me/SmolLM2-135M-svdbank
      svdbank push ./my-model.bank me/my-model-svdbank --public
      svdbank push ./my-model.bank me/my-model-svdbank --base org/my-model --source ./my-model
      svdbank push ./my-model.bank s3://bucket/banks/my-model
    """
    import svdbank

    with output.progress() as progress:
        report = svdbank.push(bank, to, progress=progress, **options)
    output.data(report, _text)


def _text(report: PushReport) -> str:
    seen = {None: "there now", True: "private", False: "public"}[report.private]
    if not report.committed:
        return f"nothing to do: {report.place} holds this bank already"
    made = "new, " if report.created else ""
    removed = f", {report.removed} of the bank before removed" if report.removed else ""
    beside = f"; {report.documents} beside them (card, attributes, licence)" if report.documents else ""
    return (
        f"{report.place}\n{made}{seen}: {report.files} files, {size(report.nbytes)}; {report.changed} new or changed, "
        f"{size(report.changed_bytes)}{removed}{beside}" + (f"\n{report.url}" if report.url != report.place else "")
    )
