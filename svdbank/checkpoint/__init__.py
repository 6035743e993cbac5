"""Where weights come from: a local folder, a single file, or a repository of the Hugging Face Hub at a pinned commit."""

from __future__ import annotations

from svdbank.checkpoint.naming.selection import decomposable
from svdbank.checkpoint.naming.targets import matches
from svdbank.checkpoint.source import Checkpoint, open_checkpoint

__all__ = ["Checkpoint", "decomposable", "matches", "open_checkpoint"]
