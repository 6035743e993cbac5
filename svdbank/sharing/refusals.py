"""What a refusal of the Hub means to somebody who writes there, and which command helps."""

from __future__ import annotations

import re

from svdbank.core.errors import BankError, SvdbankError
from svdbank.core.hub_refusals import is_connection_error, status_of

#: Ends every error after which the command may simply be run again.
_AGAIN = "run the same command again: what was uploaded is not uploaded again"

_ADDRESS = re.compile(r"\w+://\S+")


class OvertakenError(BankError):
    """Somebody else committed to the repository meanwhile."""


def explained(cause: BaseException, shown: str, doing: str) -> SvdbankError:
    """The error for a failure of the Hub client while ``doing`` something with the repository ``shown``. Quotes no URL and no token."""
    from huggingface_hub import errors

    if isinstance(cause, RuntimeError) and cause.__cause__ is not None and status_of(cause) == 0:
        cause = cause.__cause__  # of an upload in a thread
    if isinstance(cause, SvdbankError):
        return cause
    if isinstance(cause, errors.OfflineModeIsEnabled):
        return BankError(f"{shown}: HF_HUB_OFFLINE forbids {doing}", hint="run it with HF_HUB_OFFLINE=0")
    status, said = status_of(cause), _said(cause)
    if status == 401:
        return BankError(
            f"{shown}: the Hub knows no token of yours (HTTP 401), which {doing} needs",
            hint="hf auth login, or HF_TOKEN in the environment",
        )
    if status == 403:
        return BankError(f"{shown}: your token does not allow {doing} (HTTP 403{said})", hint="hf auth whoami says whose it is")
    if isinstance(cause, errors.RevisionNotFoundError):
        return BankError(f"{shown}: the repository has no such branch", hint="leave @REVISION out for main")
    if status == 404:
        return BankError(
            f"{shown}: no such repository, or none that the Hub shows you", hint="check the spelling; hf auth whoami"
        )
    if status in (409, 412):
        return OvertakenError(
            f"{shown}: somebody else changed the repository meanwhile (HTTP {status}); nothing of it was replaced", hint=_AGAIN
        )
    if status == 429:
        return BankError(f"{shown}: the Hub answers that too many requests were made (HTTP 429)", hint=f"wait, then {_AGAIN}")
    if status:
        return BankError(f"{shown}: the Hub refuses {doing} (HTTP {status}{said})", hint=_AGAIN if status >= 500 else None)
    if is_connection_error(cause):
        return BankError(
            f"{shown}: the connection broke while {doing} ({type(cause).__name__})",
            hint=f"check it, and HF_ENDPOINT; then {_AGAIN}",
        )
    return BankError(f"{shown}: {doing} failed: {type(cause).__name__}: {_ADDRESS.sub('…', str(cause))[:300]}", hint=_AGAIN)


def _said(cause: BaseException) -> str:
    """What the server gives as its reason."""
    message = getattr(cause, "server_message", None)
    return f": {' '.join(str(message).split())[:200]}" if message else ""
