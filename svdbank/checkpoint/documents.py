"""JSON from strangers: size-bounded, valid UTF-8, one object, no key twice, no name that cannot be shown."""

from __future__ import annotations

import json
import re
from typing import Any

from svdbank.errors import CheckpointError

#: Control characters, the line separators of Unicode, direction overrides and lone surrogates.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

#: Longest tensor name accepted; real ones stay under 150.
MAX_NAME = 512


class _RepeatedKeyError(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _RepeatedKeyError(f"the key {key[:MAX_NAME]!r} appears twice")
            seen.add(key)
    return out


def parse_object(data: bytes, where: str) -> dict[str, Any]:
    """The JSON object in ``data``; a CheckpointError naming ``where`` if it is anything else or repeats a key."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except UnicodeDecodeError as cause:
        raise CheckpointError(f"{where}: not valid UTF-8 at byte {cause.start}") from cause
    except RecursionError as cause:
        raise CheckpointError(f"{where}: JSON nested too deeply") from cause
    except ValueError as cause:
        raise CheckpointError(f"{where}: not valid JSON: {cause}") from cause
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: a JSON object was expected, found {type(value).__name__}")
    return value


def check_name(name: str, where: str) -> str:
    """``name`` if it can be stored, shown and logged; else a CheckpointError."""
    if not name or len(name) > MAX_NAME:
        raise CheckpointError(f"{where}: a tensor name of {len(name)} characters; 1 to {MAX_NAME} are accepted")
    if _UNPRINTABLE.search(name):
        raise CheckpointError(f"{where}: the tensor name {name!r} holds control characters")
    return name


def is_bare_weight_name(name: object) -> bool:
    """True for a plain ``*.safetensors`` file name: no folder, drive, leading dot or control character."""
    return (
        isinstance(name, str)
        and name.endswith(".safetensors")
        and not name.startswith(".")
        and 0 < len(name.encode("utf-8", "surrogatepass")) <= 255
        and not any(c in name for c in "/\\:")
        and not _UNPRINTABLE.search(name)
    )
