"""``rm``: delete a bank."""

from __future__ import annotations

import os

from svdbank import cache
from svdbank.core import disk
from svdbank.core.errors import BankNotFoundError
from svdbank.core.places import refuse_address, refuse_empty


def rm(path: str | os.PathLike[str]) -> int:
    """Delete a bank folder, finished, unfinished or damaged, the parts of one that lies elsewhere, or what a killed ``rm`` left; returns
    the bytes freed.

    Raises BankNotFoundError for a folder that is no bank or a link to one, LockedError where somebody writes into it or works
    on a shard of it; nothing is touched then.
    """
    refuse_empty(path, "the bank's name", "svdbank ls shows the banks there are")
    refuse_address(path)
    root = disk.expanded(path)
    if not root.exists() and not root.is_symlink() and cache.left_of(root.resolve()):
        return cache.remove_left(root.resolve())
    if root.is_symlink() or not (cache.is_parts(root) or cache.is_bank(root)):
        why = "a link, which is not followed" if root.is_symlink() else "no bank here"
        raise BankNotFoundError(f"{root}: {why}", hint="svdbank ls shows the banks there are")
    return cache.remove(root.resolve())
