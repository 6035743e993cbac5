"""Folders to write: named, and then there whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from svdbank.core import disk
from svdbank.core.errors import SvdbankError
from svdbank.core.locks import locked
from svdbank.core.places import refuse_address, refuse_empty


def output_folder(output: str | os.PathLike[str]) -> Path:
    """The folder that an ``output=`` argument names, absolute and without links; OptionError for an empty name.

    What a run that was killed after its last step left beside it goes.
    """
    refuse_empty(output, "the output's name", "name a folder with -o")
    refuse_address(output)
    path = disk.expanded(output).resolve()
    work = _work(path)
    if work.is_dir() and not work.is_symlink() and path.exists():
        with contextlib.suppress(OSError, SvdbankError):
            if not {entry.name for entry in work.iterdir()} - {".lock", ".lock.owner"}:
                with locked(work):
                    pass  # its files go with the lock
                disk.remove_empty(work)
    return path


def _work(output: Path) -> Path:
    """The hidden folder beside an output in which it is made."""
    return output.with_name(f".{output.name}{disk.TEMPORARY}")


@contextlib.contextmanager
def appearing(output: Path, *, replacing: bool = False, check: Callable[[], None] | None = None) -> Iterator[Path]:
    """An empty folder to fill, fsynced by the caller, which becomes ``output`` at the end; nothing is left of it after an error.

    It lies in a hidden folder beside ``output``, under the writer's lock; what a killed run left there goes first. ``output`` is absent
    or empty, or an :class:`OSError` says at the end that it is not. With ``replacing``, what it holds is exchanged for the new folder in
    a single step where the system can (:func:`svdbank.core.disk.exchange`). Elsewhere it is moved aside first, and the next run puts it
    back if this one was killed in between; ``check`` is called after that, and raises where what came back is not to be replaced.

    Raises :class:`~svdbank.core.errors.LockedError` while another process makes the same folder.
    """
    work = _work(output)
    folder, replaced = work / "new", work / "replaced"
    disk.make_dirs(output.parent)
    try:
        with locked(work):
            if replaced.exists() and not output.exists():
                disk.replace(replaced, output)
                if check is not None:
                    check()
            _remove(folder, replaced)
            try:
                disk.make_dirs(folder)
                yield folder
                _publish(folder, output, replaced if replacing else None)
            finally:
                _remove(folder, replaced)
    finally:
        disk.remove_empty(work)


def _publish(folder: Path, output: Path, replaced: Path | None) -> None:
    """Rename a finished folder over an absent or empty one, or exchange it for what is there."""
    if replaced is None or not output.exists() or not any(output.iterdir()):
        disk.replace(folder, output)
        disk.fsync_dir(folder.parent)
        return
    if disk.exchange(folder, output):
        return
    disk.replace(output, replaced)
    disk.fsync_dir(output.parent)
    try:
        disk.replace(folder, output)
    except OSError:
        disk.replace(replaced, output)
        raise


def _remove(*folders: Path) -> None:
    for folder in folders:
        if folder.exists():
            disk.remove_tree(folder)
