"""JSON from strangers: size-bounded, valid UTF-8, one object, no key twice, no name that cannot be shown."""

from __future__ import annotations

import json
import re
from typing import Any

from svdbank.core.errors import CheckpointError

#: Control characters, the line separators of Unicode, direction overrides and lone surrogates.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

#: Lists, objects and commas accepted in one file: a model of half a million tensors has fewer. Parsed they take a gigabyte at most.
MAX_PARTS = 5_000_000

#: Levels of lists and objects accepted.
MAX_DEPTH = 100

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
    """The JSON object in ``data``; a CheckpointError naming ``where`` if it is anything else or repeats a key.

    What would take far more memory than ``data`` is refused before it is parsed.
    """
    if sum(data.count(mark) for mark in (b"{", b"[", b",")) > MAX_PARTS:
        raise CheckpointError(f"{where}: more than {MAX_PARTS} lists, objects and values")
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
    if _deeper_than(value, MAX_DEPTH):
        raise CheckpointError(f"{where}: JSON nested too deeply")
    return value


def _deeper_than(value: Any, depth: int) -> bool:
    """Without recursion: that is what nesting is meant to exhaust."""
    level = [value]
    for _ in range(depth):
        level = [
            inner
            for item in level
            for inner in (item.values() if isinstance(item, dict) else item)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


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
