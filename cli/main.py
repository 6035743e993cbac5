"""The ``svdbank`` command: loads sub-commands on demand, turns errors into messages and exit codes."""

from __future__ import annotations

import atexit
import difflib
import errno
import importlib
import os
import signal
import sys
import traceback
import warnings
from typing import NoReturn, TextIO

import click

from svdbank import SvdbankError, __version__
from svdbank_cli.output import printable

#: In the order of the work; each is a module of this package with a command of the same name.
VERBS = (
    "plan",
    "build",
    "publish",
    "info",
    "verify",
    "repair",
    "ls",
    "rm",
    "prune",
    "push",
    "pull",
    "init",
    "train",
    "eval",
    "merge",
    "stack",
    "compare",
    "fuse",
    "extract",
    "export",
    "report",
    "env",
    "demo",
)

INTERRUPTED = 130

#: What a shell reports of a program that a closed pipe ended.
BROKEN_PIPE = 141


class _Verbs(click.Group):
    """Sub-commands imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        module = importlib.import_module(f"svdbank_cli.{cmd_name}")
        command: click.Command = getattr(module, f"{cmd_name}_command")
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        if args and not args[0].startswith("-") and args[0] not in VERBS:
            close = difflib.get_close_matches(args[0], VERBS, n=1)
            raise click.UsageError(f"no such command {args[0]!r}" + (f"; did you mean {close[0]!r}?" if close else ""), ctx)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # click would say 1
            return _closed_pipe()


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="svdbank")
def cli() -> None:
    """Decompose a base model once; every MiCA, MiLoRA or PiSSA adapter after that is a lookup.

    \b
    Examples:
      svdbank demo                                   the whole way, on a small real model
      svdbank build HuggingFaceTB/SmolLM2-135M       decompose a model, into the cache
      svdbank init HuggingFaceTB/SmolLM2-135M -r 16 -o adapter
                                                     a MiCA adapter for your trainer, or train it here:
      svdbank train HuggingFaceTB/SmolLM2-135M -o law --data licences.jsonl
      svdbank stack law med -o domains               adapters together, each still to be scaled or dropped
      svdbank fuse HuggingFaceTB/SmolLM2-135M domains -o model
                                                     a checkpoint that needs no PEFT
    """


def main() -> NoReturn:
    """Entry point. Exit codes: 0 ok, 1 error, 2 usage, 3 partly done, 4 damage, 5 done, but worse than before, 10 no bank, 11 locked,
    12 wrong base, 130 interrupted.

    SIGTERM, which schedulers send before they kill, ends a command as Ctrl-C does. Once all handlers of ``atexit`` have run, the process
    ends at once: taking torch down module by module is half a second in which nothing is done.
    """
    ended: list[int] = []
    warnings.showwarning = _noted
    atexit.register(lambda: os._exit(ended[0]) if ended else None)  # the first to be registered is the last to run
    signal.signal(signal.SIGTERM, _interrupt)
    if sys.argv[1:2] in (["train"], ["eval"]):
        from svdbank.lm.libraries import spare_bitsandbytes

        spare_bitsandbytes()
    ended.append(_flushed(run(sys.argv[1:])))
    sys.exit(ended[0])


def _noted(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """svdbank's own warnings are notes here, without the line of Python that they come from; others' are shown as ever."""
    if category.__module__.startswith("svdbank."):
        click.echo(f"Note: {printable(message)}", err=True)
    else:
        (file or sys.stderr).write(warnings.formatwarning(message, category, filename, lineno, line))


def _flushed(code: int) -> int:
    """The exit code, once all output has left; another where it cannot."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return _closed_pipe()
    except OSError as error:
        _complain(f"what was printed could not be written: {error.strerror or error}", None)
        return code or 1
    return code


def _closed_pipe() -> int:
    """Whoever read our output has seen enough; whether the work was finished, nobody can tell: not 0."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return BROKEN_PIPE


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code; errors are printed to stderr."""
    try:
        code = cli.main(args=arguments, prog_name="svdbank", standalone_mode=False, auto_envvar_prefix="SVDBANK")
        return code if isinstance(code, int) else 0
    except click.UsageError as error:
        error.show()
        return 2
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("\nInterrupted. What was finished is kept; the same command goes on from there.", err=True)
        return INTERRUPTED
    except SvdbankError as error:
        _debug()
        _complain(str(error), error.hint)
        return error.exit_code
    except OSError as error:
        _debug()
        place = f"{error.filename}: " if error.filename else ""
        hint = {
            errno.ENOSPC: "free some space, or name another disk (for the cache: SVDBANK_HOME); the same command goes on",
            errno.EDQUOT: "your quota is used up: free some space, or name another disk; the same command goes on",
            errno.EACCES: "choose a folder you may write to with -o, or set SVDBANK_HOME",
            errno.EROFS: "this disk is read-only: name another (for the cache: SVDBANK_HOME)",
        }.get(error.errno or 0)
        _complain(f"{place}{error.strerror or error}", hint)
        return 1
    except Exception as error:
        _debug()
        _complain(
            f"unexpected {type(error).__name__}: {error}", "a defect of svdbank: SVDBANK_DEBUG=1 shows where; please report it"
        )
        return 1


def _complain(message: str, hint: str | None) -> None:
    click.echo(f"{click.style('Error:', fg='red', bold=True) if _colour() else 'Error:'} {printable(message)}", err=True)
    if hint:
        click.echo(f"  → {printable(hint)}", err=True)


def _colour() -> bool:
    return sys.stderr.isatty() and not os.environ.get("NO_COLOR")


def _debug() -> None:
    if os.environ.get("SVDBANK_DEBUG"):
        traceback.print_exc()


if __name__ == "__main__":
    main()
