"""Options that several commands share, declared once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import click

from svdbank_cli.completion import complete_bank, complete_model
from svdbank_cli.output import Output
from svdbank_cli.parameters import RankType, SizeType

if TYPE_CHECKING:
    from svdbank.building.fetching import Fetch
    from svdbank.core.specs import Side, StoredDtype

Command = Callable[..., Any]


class BuildOptions(TypedDict):
    """Of :func:`build_options`, what goes to ``svdbank.plan`` and ``svdbank.build`` as it is."""

    rank: int | Literal["all"]
    side: Side
    dtype: StoredDtype
    principal: int
    solver: str
    jobs: int | None
    threads: int | None
    fetch: Fetch
    disk_budget: int | None
    keep: bool | None


def with_output(command: Command) -> Command:
    """Add ``--json`` and ``-q``; the command receives an ``output``."""

    @click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout instead of text.")
    @click.option("-q", "--quiet", is_flag=True, help="No progress and no talk; the result and errors still show.")
    @functools.wraps(command)
    def wrapped(*args: Any, as_json: bool, quiet: bool, **kwargs: Any) -> Any:
        return command(*args, output=Output(json=as_json, quiet=quiet), **kwargs)

    return wrapped


def build_options(command: Command) -> Command:
    """Options of ``plan`` and ``build``: what to decompose, how much of it to keep, and how."""
    for option in reversed(
        (
            click.option(
                "-o", "--output", "bank", type=click.Path(), help="Bank folder. Default: in the cache, found again by MODEL."
            ),
            click.option(
                "--rank", type=RankType(), default="128", show_default=True, help="Minor triplets to keep of each weight."
            ),
            click.option(
                "--targets",
                multiple=True,
                metavar="PATTERN",
                help="Modules, as PEFT names them: a name's end, all-linear, or one regular expression. Repeatable. [default: all-linear]",
            ),
            click.option(
                "--side",
                type=click.Choice(["both", "left"]),
                default="both",
                show_default=True,
                help="Singular vectors to keep.",
            ),
            click.option(
                "--dtype",
                type=click.Choice(["float32", "float16", "bfloat16"]),
                default="float32",
                show_default=True,
                help="Storage of the vectors; they are computed in float64.",
            ),
            click.option(
                "--principal", type=int, default=0, metavar="N", help="Also keep N triplets of the largest singular values."
            ),
            click.option(
                "--solver", default="auto", show_default=True, metavar="PATH", help="Force a solver path; see docs/numerics.md."
            ),
            click.option(
                "--jobs",
                type=click.IntRange(min=1),
                help="Small weights that a worker solves at a time. [default: one a thread]",
            ),
            click.option(
                "--threads",
                type=click.IntRange(min=1),
                help="Threads of a worker for a large weight; fixed in the plan, because bytes depend on it. [default: its processors]",
            ),
            click.option(
                "--fetch",
                type=click.Choice(["auto", "cache", "shards", "ranges"]),
                default="auto",
                show_default=True,
                help="How weights come from the Hub: all first, file by file while solving, or only the bytes needed; auto: by what fits.",
            ),
            click.option(
                "--disk-budget",
                type=SizeType(),
                help="Most bytes of a Hub model's files on disk at a time: 500MB, 20GB, 16GiB. [default: what is free]",
            ),
            click.option(
                "--keep/--no-keep",
                default=None,
                help="Leave downloaded files in the Hugging Face cache, or delete each once it is read. [default: keep where all fit]",
            ),
        )
    ):
        command = option(command)
    return command


def find_options(command: Command) -> Command:
    """Add ``--pull`` and ``--no-find``: where a model's bank comes from when the cache has none; the command gets ``pull`` and ``find``."""

    @functools.wraps(command)
    def wrapped(*args: Any, no_find: bool, **kwargs: Any) -> Any:
        return command(*args, find=not no_find, **kwargs)

    for option in reversed(
        (
            click.option(
                "--pull",
                metavar="ORG/NAME",
                help="Bring this bank of MODEL from the Hub into the cache first; refused where it is of other weights.",
            ),
            click.option(
                "--no-find",
                is_flag=True,
                help="Where MODEL has no bank in the cache, do not ask the Hub which could be pulled. [also off under HF_HUB_OFFLINE]",
            ),
        )
    ):
        wrapped = option(wrapped)
    return wrapped


def device_option(command: Command) -> Command:
    """Add ``--device``: where to compute."""
    return click.option(
        "--device",
        default="auto",
        show_default=True,
        help="Where to compute: auto (CUDA if there), cpu, cuda (every GPU), cuda:1 …, or several with commas, a worker each; "
        "plan also takes cuda-low-float64, a card with little float64.",
    )(command)


def composed_from(command: Command) -> Command:
    """Add ``--bank``, ``--rebase`` and ``--base``: which bank and which model the adapters that are put together belong to."""
    for option in reversed(
        (
            click.option(
                "--bank",
                metavar="BANK|MODEL",
                shell_complete=complete_bank,
                help="Bank of their base: recognises its directions in adapters that other programs saved. MiLoRA and PiSSA need it.",
            ),
            click.option(
                "--rebase",
                metavar="BANK|MODEL",
                shell_complete=complete_bank,
                help="Carry adapters of other bases over to this bank's; says what is lost.",
            ),
            click.option(
                "--base",
                metavar="MODEL",
                shell_complete=complete_model,
                help="Their base model: what whole trained modules (modules_to_save) are counted from, and what modules of older "
                "Transformers are called now. [default: the one they record, where it is on this machine]",
            ),
        )
    ):
        command = option(command)
    return command


def report_option(command: Command) -> Command:
    """Add ``--report``; the command receives a ``page``, refused before any work where it cannot be written."""

    def checked(context: click.Context, option: click.Parameter, value: str | None) -> str | None:
        if value is not None:
            from svdbank.reporting.figures import load_matplotlib
            from svdbank.reporting.page import checked_place, load_template

            checked_place(value)
            load_matplotlib()
            load_template()
        return value

    return click.option(
        "--report",
        "page",
        metavar="FILE.html",
        callback=checked,
        help="Also write a report with pictures, as svdbank report does; needs pip install 'svdbank[report]'.",
    )(command)


def write_page(sources: Sequence[Any], page: str, output: Output) -> None:
    """The report that ``--report`` asked for."""
    import svdbank

    output.say(f"report: {svdbank.report(sources, page)}")


def fit_options(command: Command) -> Command:
    """Add ``--fit`` and what it needs; the command receives a ``fit``, None where none is asked for."""

    @functools.wraps(command)
    def wrapped(
        *args: Any, fit: tuple[str, ...], model: str | None, fit_tokens: int, fit_length: int, fit_trials: int, **kwargs: Any
    ) -> Any:
        if not fit:
            if model is not None:
                raise click.UsageError("--model is what --fit measures on: name texts with --fit FILE")
            return command(*args, fit=None, **kwargs)
        if model is None:
            raise click.UsageError("--fit needs the base to measure on: --model MODEL")
        from svdbank.composition.fitting import FitOptions

        chosen = FitOptions(model=model, texts=fit, tokens=fit_tokens, length=fit_length, evaluations=fit_trials)
        return command(*args, fit=chosen, **kwargs)

    for option in reversed(
        (
            click.option(
                "--fit",
                multiple=True,
                metavar="FILE",
                help="Choose the weights on this held-out text. Repeatable. Needs --model.",
            ),
            click.option("--model", metavar="MODEL", shell_complete=complete_model, help="The base to measure --fit on."),
            click.option(
                "--fit-tokens",
                type=click.IntRange(min=1),
                default=6144,
                show_default=True,
                help="Tokens measured of each text.",
            ),
            click.option("--fit-length", type=int, default=256, show_default=True, help="Tokens of a window."),
            click.option(
                "--fit-trials", type=click.IntRange(min=2), default=24, show_default=True, help="Adapters tried at most."
            ),
        )
    ):
        wrapped = option(wrapped)
    return wrapped
