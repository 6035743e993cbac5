"""How an adapter or a text is named on a command line."""

from __future__ import annotations

from pathlib import Path


def named_place(value: str) -> tuple[str | None, str]:
    """``NAME=PLACE`` as its parts. The name is None where there is only a place: a path that exists, or one with ``=`` further down."""
    name, sign, place = value.partition("=")
    if not sign or "/" in name or Path(value).expanduser().exists():
        return None, value
    return name, place
