"""Where weights come from: a local folder, a single file, or a repository of the Hugging Face Hub at a pinned commit.

Names are loaded at their first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from svdbank.checkpoint.naming.selection import decomposable as decomposable
    from svdbank.checkpoint.naming.targets import matches as matches
    from svdbank.checkpoint.source import Checkpoint as Checkpoint
    from svdbank.checkpoint.source import open_checkpoint as open_checkpoint

_LAZY = {
    "Checkpoint": "source",
    "decomposable": "naming.selection",
    "matches": "naming.targets",
    "open_checkpoint": "source",
}

__all__ = [*sorted(_LAZY)]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'svdbank.checkpoint' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f"svdbank.checkpoint.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
