"""Every error svdbank raises on purpose.

An error says what is wrong, where and why; ``hint`` is the next command to run. The command line prints both and exits with
``exit_code``; a library caller catches the class.
"""

from __future__ import annotations

from collections.abc import Sequence

#: Names spelled out in an error before "and n more".
_NAMED = 3


class SvdbankError(Exception):
    """Base of all errors raised on purpose. ``hint`` names what to do next."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class OptionError(SvdbankError, ValueError):
    """An option or argument that cannot be meant: a rank of 0, a pattern that matches nothing."""

    exit_code = 2


class CheckpointError(SvdbankError):
    """A checkpoint that cannot be read: a missing file, a lying header, an unsupported format."""


class DeviceError(SvdbankError):
    """A device that torch sees does not compute."""


class SolverError(SvdbankError):
    """No method produced a basis that passes every gate."""


class NotFiniteError(SolverError, ValueError):
    """A weight holds NaN or infinity."""


class BankError(SvdbankError):
    """A bank that cannot be used as asked: wrong format version, rank beyond what it stores, missing weight."""


class DamageError(BankError):
    """Bytes of a bank are missing or differ from what its index records."""

    exit_code = 4


class BankNotFoundError(BankError, FileNotFoundError):
    """There is no published bank at the place named."""

    exit_code = 10


class UnfinishedError(BankError):
    """A bank cannot be published yet: some of its shards are not there."""

    exit_code = 3


class LockedError(SvdbankError):
    """Another process is writing here."""

    exit_code = 11


class WorkerError(SvdbankError):
    """A worker process ended without a word: it was killed, or ran out of memory."""


class WrongBaseError(SvdbankError):
    """The bank or adapter belongs to other weights than those it is used with."""

    exit_code = 12


class MissingExtraError(SvdbankError, ImportError):
    """An optional dependency is not installed."""


def missing_extra(package: str, extra: str) -> MissingExtraError:
    """The error for an import that needs one of svdbank's extras."""
    return MissingExtraError(
        f"this needs the package {package!r}, which is not installed",
        hint=f"pip install 'svdbank[{extra}]'",
    )


def abridge(names: Sequence[str]) -> str:
    """The first few of ``names``, and how many more there are."""
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
