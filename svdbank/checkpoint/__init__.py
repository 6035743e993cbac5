"""Where weights come from: a local folder, a single file, or a repository of the Hugging Face Hub at a pinned commit."""

from __future__ import annotations

from svdbank.checkpoint.selection import decomposable
from svdbank.checkpoint.source import Checkpoint, open_checkpoint
from svdbank.checkpoint.targets import matches

__all__ = ["Checkpoint", "decomposable", "matches", "open_checkpoint"]
