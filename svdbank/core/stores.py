"""Object stores and plain web servers, through obstore: S3, Google Cloud Storage, HTTP.

Credentials, regions and endpoints are what obstore takes from the environment (``AWS_ACCESS_KEY_ID``, ``AWS_ENDPOINT_URL``,
``GOOGLE_APPLICATION_CREDENTIALS`` …); none is ever named on a command line or in a message.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from svdbank.core.errors import BankError, DamageError, missing_extra

#: Seconds and tries after which a request is given up. obstore's own are three minutes and ten.
_PATIENCE, _TRIES = 60, 5


def open_store(address: str) -> Any:
    """An obstore store whose root is ``address`` (``s3://bucket/path``, ``gs://…``, ``http(s)://…``). MissingExtraError without obstore,
    BankError for an address or settings that it refuses."""
    try:
        import obstore.store
    except ImportError as cause:
        raise missing_extra("obstore", "s3") from cause
    try:
        return obstore.store.from_url(
            address,
            # Where the environment names an endpoint without TLS, it is meant; an https:// address is not to be led to one.
            client_options={"allow_http": not address.startswith("https://"), "timeout": timedelta(seconds=_PATIENCE)},
            retry_config={"max_retries": _TRIES, "retry_timeout": timedelta(seconds=_PATIENCE)},
        )
    except Exception as cause:
        raise BankError(
            f"{address}: cannot be opened: {_first_line(cause)}", hint="check the address and the store's settings"
        ) from cause


@contextmanager
def explained(place: str, name: str, *, doing: str = "read") -> Iterator[None]:
    """What a failure of a store means: of reading, FileNotFoundError stays one; everything else becomes a BankError that names the file
    and says what cannot be done with it."""
    try:
        yield
    except FileNotFoundError as cause:
        if doing == "read":
            raise FileNotFoundError(f"{place}/{name}") from cause
        raise BankError(f"{place}: {name} cannot be {doing}: no such place", hint="check the name of the bucket") from cause
    except (BankError, ImportError):
        raise
    except Exception as cause:
        import obstore.exceptions as errors

        text = str(cause)
        if isinstance(cause, errors.PermissionDeniedError | errors.UnauthenticatedError):
            raise BankError(
                f"{place}: the store refuses access to {name}", hint="check its credentials (AWS_…, GOOGLE_…) and endpoint"
            ) from cause
        if isinstance(cause, errors.NotSupportedError):
            raise BankError(
                f"{place}: the server does not answer byte ranges",
                hint="copy the bank's folder by other means, or serve it from elsewhere",
            ) from cause
        if "status code: 416" in text or "UnexpectedRange" in text:
            raise DamageError(f"{place}/{name}: ends before the bytes that were asked for, or others are sent") from cause
        raise BankError(
            f"{place}: {name} cannot be {doing}: {_first_line(cause)}",
            hint="check the connection, the address and the store's endpoint",
        ) from cause


def _first_line(cause: BaseException) -> str:
    """What an error of obstore says at first; the rest are its types, and may quote signed addresses."""
    return str(cause).strip().partition("\n")[0].split("?")[0][:200]
