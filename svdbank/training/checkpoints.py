"""Checkpoints of a run that may be killed at any moment: one counts only with its seal, which lists every file and its hash.

The Trainer writes a checkpoint file by file into its final folder. A run killed meanwhile leaves a folder that looks like one; what
was not sealed is removed before the run goes on from the newest sealed one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from svdbank.core import disk
from svdbank.core.errors import CheckpointError, OptionError
from svdbank.core.locks import locked
from svdbank.core.specs import Struct, from_json, to_json

SEAL = "svdbank-seal.json"
RECORD = "run.json"

#: Files of the lock that a run holds its folder by.
_LOCKS = {".lock", ".lock.owner"}


class Seal(Struct, frozen=True):
    """Every file of a checkpoint with its sha256, written after all of them were fsynced."""

    files: dict[str, str]


class RunRecord(Struct, frozen=True):
    """What has to be the same for a run to go on: the options as TOML, and what the data and the base were."""

    options: str
    data_digest: str
    processes: int


def folder_of(output: Path) -> Path:
    """Where the checkpoints of a run lie until its adapter is written: beside the adapter."""
    return output.with_name(f"{output.name}.checkpoints")


def seal(checkpoint: Path) -> None:
    """Make every file durable, then say so."""
    disk.fsync_tree(checkpoint)
    disk.write_bytes(checkpoint / SEAL, to_json(Seal(_hashes(checkpoint))))


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint is sealed and still holds, file by file, what was sealed."""
    try:
        sealed = from_json((checkpoint / SEAL).read_bytes(), Seal, where=str(checkpoint), error=CheckpointError)
    except (OSError, CheckpointError):
        return False
    return sealed.files == _hashes(checkpoint)


def last_whole(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run; those that are not whole are left out."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit() and path.is_dir()]
    ordered = sorted(found, key=step_of, reverse=True)
    return next((path for path in ordered if is_whole(path)), None)


def remove_others(folder: Path, keep: Path | None) -> None:
    """Remove every checkpoint but one: later ones were never finished, and would be written into."""
    for path in folder.glob("checkpoint-*"):
        if path != keep:
            disk.remove_tree(path)


def step_of(checkpoint: Path) -> int:
    """Steps made before this checkpoint."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


@contextlib.contextmanager
def begun(folder: Path, record: RunRecord, *, force: bool = False) -> Iterator[None]:
    """Start a run's folder, or recognise this very run in it, and hold it inside: of two runs into one output, one goes on.

    Another run that came to no whole checkpoint gives way. Raises :class:`OptionError` where one that did lies there: other options, other
    data, another number of processes; ``force`` removes that one too. Raises :class:`LockedError` where a run is under way.
    """
    if (folder.exists() or folder.is_symlink()) and not (folder / RECORD).is_file() and not _is_empty(folder):
        raise OptionError(
            f"{folder} exists and is no folder of checkpoints", hint="name another output with -o, or move it away"
        )
    with locked(folder):
        _begin(folder, record, force)
        yield


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """What torch and safetensors raise where a file beside or in ``folder`` cannot be written, as an error that says so."""
    from safetensors import SafetensorError

    try:
        yield
    except (RuntimeError, SafetensorError) as cause:
        # torch's writer says no more than how far it came.
        if not any(sign in str(cause) for sign in ("inline_container", "PytorchStreamWriter", "os error")):
            raise
        free = disk.free_bytes(folder)
        raise CheckpointError(
            f"{folder.parent}: a file could not be written ({free:,} bytes are free there)",
            hint="free some space, or choose another disk with -o; the same command goes on from the last whole checkpoint",
        ) from cause


def _begin(folder: Path, record: RunRecord, force: bool) -> None:
    path = folder / RECORD
    if path.is_file():
        before = from_json(path.read_bytes(), RunRecord, where=str(path), error=CheckpointError)
        if before == record:
            return
        if not force and last_whole(folder) is not None:
            raise OptionError(
                f"{folder} holds an unfinished run with {_difference(before, record)}",
                hint=f"run it as it was begun to go on, or begin anew with --force, which removes {folder.name}",
            )
        for entry in folder.iterdir():
            if entry.name not in _LOCKS:
                disk.remove_tree(entry) if entry.is_dir() and not entry.is_symlink() else disk.unlink(entry)
    disk.write_bytes(path, to_json(record))


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not {entry.name for entry in folder.iterdir()} - _LOCKS


def _difference(before: RunRecord, record: RunRecord) -> str:
    ours, theirs = record.options.splitlines(), before.options.splitlines()
    differing = sorted({line.partition(" =")[0] for line in {*ours} ^ {*theirs}})
    if differing:
        return f"other {', '.join(differing)}"
    if before.data_digest != record.data_digest:
        return "other text: the files changed since"
    return f"{before.processes} processes instead of {record.processes}"


def _hashes(checkpoint: Path) -> dict[str, str]:
    return {
        path.relative_to(checkpoint).as_posix(): disk.sha256_file(path)
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name != SEAL
    }
