"""What a failure of the Hub client means: whether another try can help, when, and what to tell the person who named the model."""

from __future__ import annotations

import email.utils
import random
import re
import time
from collections.abc import Mapping

from svdbank.core.errors import CheckpointError

#: Answers that a server gives when it would rather be asked later.
RETRIED = frozenset({408, 429, 500, 502, 503, 504})

#: Requests in a row that may fail, without a byte between them, before a build gives up.
ATTEMPTS = 8

#: Seconds of the first wait and of the longest that we choose ourselves; a server may ask for more, up to ``LONGEST_ASKED``.
FIRST_WAIT, LONGEST_WAIT, LONGEST_ASKED = 0.25, 30.0, 300.0

#: The Hub's rate limit: ``"api";r=0;t=55`` says that none is left and that it is renewed in 55 seconds.
_RATE_LIMIT = re.compile(r"\br\s*=\s*0\s*;\s*t\s*=\s*(\d{1,9})")

_LIBRARIES = frozenset({"httpx", "httpx2", "httpcore", "httpcore2"})


def explain(cause: BaseException, shown: str) -> CheckpointError:
    """What a failure of the Hub client means to the person who named ``shown``. Never quotes a URL: it may be signed."""
    from huggingface_hub import constants, errors

    if isinstance(cause, CheckpointError):
        return cause
    if isinstance(cause, errors.GatedRepoError):
        return CheckpointError(
            f"{shown}: access to this repository must be granted first",
            hint=f"ask for it on its page, {constants.ENDPOINT}/{shown.removeprefix('hf://').split('@')[0]}, then: hf auth login",
        )
    if isinstance(cause, errors.RevisionNotFoundError):
        return CheckpointError(
            f"{shown}: the repository has no such revision", hint="name a branch, a tag or a full commit hash"
        )
    if isinstance(cause, errors.RepositoryNotFoundError):
        return CheckpointError(
            f"{shown}: neither a path here nor a repository that the Hub shows you",
            hint="check the spelling; if it is private: hf auth login",
        )
    if isinstance(cause, errors.OfflineModeIsEnabled):
        return CheckpointError(
            f"{shown}: not complete in the Hugging Face cache, and HF_HUB_OFFLINE forbids downloading it",
            hint=f"once, with a connection: HF_HUB_OFFLINE=0 hf download {shown.replace('@', ' --revision ')}",
        )
    if isinstance(cause, errors.HfHubHTTPError):
        return _explain_status(status_of(cause), shown)
    if is_connection_error(cause):
        return CheckpointError(
            f"{shown}: not complete in the Hugging Face cache, and the Hub cannot be reached ({type(cause).__name__})",
            hint="check the connection and HF_ENDPOINT, or name a local folder",
        )
    if isinstance(cause, OSError):
        return CheckpointError(
            f"{shown}: downloading failed: {cause.strerror or cause}",
            hint="check the free space and permissions of the Hugging Face cache (HF_HOME)",
        )
    return CheckpointError(
        f"{shown}: the Hub client failed: {type(cause).__name__}", hint="run it again; what was downloaded is kept"
    )


def _explain_status(status: int, shown: str) -> CheckpointError:
    if status in (401, 403):
        return CheckpointError(f"{shown}: the Hub refuses access (HTTP {status})", hint="hf auth login")
    if status == 429:
        return CheckpointError(
            f"{shown}: the Hub answers that too many requests were made (HTTP 429)",
            hint="wait some minutes and run it again",
        )
    return CheckpointError(f"{shown}: the Hub answers HTTP {status}", hint="run it again later")


def status_of(cause: BaseException) -> int:
    """The HTTP status that an error of the Hub client carries; 0 without one."""
    return int(getattr(getattr(cause, "response", None), "status_code", 0) or 0)


def is_connection_error(cause: BaseException) -> bool:
    """True for a failed or broken connection, of whichever HTTP library this version of huggingface_hub uses."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(cause, HfHubHTTPError):
        return False
    seen: BaseException | None = cause
    while seen is not None:
        libraries = {kind.__module__.partition(".")[0] for kind in type(seen).__mro__}
        if isinstance(seen, ConnectionError | TimeoutError) or libraries & _LIBRARIES:
            return True
        seen = seen.__cause__
    return False


def wait_before_retry(cause: BaseException, failures: int) -> float | None:
    """Seconds to wait before try number ``failures + 1``; None when trying again cannot help.

    As long as the server asks for (``Retry-After``, or the Hub's rate limit), else twice as long as the last time, with jitter so
    that requests which failed together do not come back together. A wait beyond ``LONGEST_ASKED`` is not worth waiting.
    """
    from huggingface_hub.errors import OfflineModeIsEnabled

    status = status_of(cause)
    if isinstance(cause, OfflineModeIsEnabled):  # of the kind of a broken connection, but nobody will connect
        return None
    if status not in RETRIED and not (status == 0 and is_connection_error(cause)):
        return None
    asked = _asked(getattr(getattr(cause, "response", None), "headers", {}))
    if asked is not None:
        return asked if asked <= LONGEST_ASKED else None
    return float(min(LONGEST_WAIT, FIRST_WAIT * 2 ** (failures - 1)) * random.uniform(0.5, 1.5))


def _asked(headers: Mapping[str, str]) -> float | None:
    value = str(headers.get("Retry-After", "")).strip()
    if value.isdecimal():
        return float(value)
    if value:
        try:
            return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
        except ValueError:
            return None
    limited = _RATE_LIMIT.search(str(headers.get("RateLimit", "")))
    return float(limited[1]) if limited else None
