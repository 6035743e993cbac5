"""What workers say to whoever started them, and what is made of it there."""

from __future__ import annotations

import os
import traceback

import msgspec

from svdbank.core import errors
from svdbank.core.errors import SvdbankError, WorkerError
from svdbank.core.specs import Progress, Struct


class Said(Struct, frozen=True):
    """What a worker says: progress, at the end how it was (``solved`` weights …), or the error that it ended with; where it is."""

    progress: Progress | None = None
    solved: int | None = None
    stages: dict[str, float] = msgspec.field(default_factory=dict)
    waited: float = 0.0
    traffic: tuple[int, int, int] = (0, 0, 0)
    host: str = ""
    error: str | None = None
    message: str = ""
    hint: str | None = None


def last_words(error: BaseException) -> Said:
    """What a worker says that ends with an error."""
    if os.environ.get("SVDBANK_DEBUG"):
        traceback.print_exception(error)
    return Said(error=type(error).__name__, message=str(error), hint=error.hint if isinstance(error, SvdbankError) else None)


def own_error(worker: str, said: Said) -> SvdbankError:
    """What a worker ended with, as it said it, of the same class where that is one of ours."""
    kind = getattr(errors, said.error or "", None)
    if isinstance(kind, type) and issubclass(kind, SvdbankError):
        return kind(f"{worker}: {said.message}", hint=said.hint)
    return WorkerError(f"{worker}: {said.error}: {said.message}", hint=said.hint)
