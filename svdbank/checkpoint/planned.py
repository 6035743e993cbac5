"""A checkpoint opened as a frozen plan has it: the same commit or the same files, no header read again."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from svdbank.checkpoint.files import State, WeightBytes, WeightFile, blob_id, member, open_regular
from svdbank.checkpoint.source import Checkpoint, cache_key_of
from svdbank.core.errors import CheckpointError, WrongBaseError
from svdbank.core.places import Nowhere, OnDisk, OnHub, locate, refusal, refuse_empty
from svdbank.core.specs import BaseSpec, SourceFile, Sources

#: Identity of a local file: size, time in nanoseconds, sha256 of its header.
_LOCAL = re.compile(r"(\d+)-(\d+)-[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SECOND = 10**9


def open_planned(model: str | os.PathLike[str], sources: Sources, base: BaseSpec) -> Checkpoint:
    """Open what ``model`` names, once it is found to be what ``sources`` were taken from; configuration and tensors are not read.

    Of a model on the Hub the commit of the plan, whatever its branch names by now. A folder or file on this machine must have files of
    the same size and time, or of the same Hub id. Raises WrongBaseError where they differ, CheckpointError where there are none.
    """
    refuse_empty(model, "the model's name", "name a model folder, a .safetensors file or org/name on the Hub")
    place = locate(model)
    if isinstance(place, OnDisk):
        return _opened(sources, base, place.path.resolve(), _local(place.path, sources))
    if isinstance(place, OnHub):
        return _on_hub(place, sources, base)
    if isinstance(place, Nowhere) and place.is_path:
        raise CheckpointError(f"{place.text}: no such file or folder", hint="name the model that the build was begun with")
    raise refusal(place)


def same_files(ours: tuple[SourceFile, ...], theirs: tuple[SourceFile, ...]) -> str | None:
    """None where two sets of weight files are the same, as far as identities tell; else the name of one that differs."""
    known = {file.name: file for file in theirs}
    for file in ours:
        other = known.pop(file.name, None)
        if other is None or other.size != file.size or not _same_identity(file.identity, other.identity):
            return file.name
    return next(iter(known), None)


def other_files(name: str, sources: Sources, file: str) -> WrongBaseError:
    """The error for weight files that are not those of the plan."""
    begun = f"{sources.name}@{sources.revision[:12]}" if sources.revision else sources.name
    return WrongBaseError(
        f"the plan of this build is of other files than those of {name}: {file} is not the one of {begun} (size, time or id)",
        hint="name the model that the build was begun with; a copy of it must keep its times, as cp -a and rsync -a do",
    )


def _opened(
    sources: Sources, base: BaseSpec, folder: Path, readers: Mapping[str, WeightBytes], remote: object = None
) -> Checkpoint:
    return Checkpoint(
        name=sources.name,
        revision=sources.revision,
        folder=folder,
        config={},
        tensors={},
        files=sources.files,
        cache_key=cache_key_of(sources.files),
        config_digest=base.config_digest,
        _open=dict(readers),
        remote=remote,  # type: ignore[arg-type]
        planned=True,
    )


def _local(path: Path, sources: Sources) -> dict[str, WeightBytes]:
    folder = path.resolve() if path.is_dir() else path.parent.resolve()
    readers: dict[str, WeightBytes] = {}
    for file in sources.files:
        where = path.resolve() if not path.is_dir() else member(folder, file.name)
        try:
            descriptor = open_regular(where)
        except CheckpointError as cause:
            raise other_files(str(path), sources, file.name) from cause
        try:
            state = State.of(descriptor)
        finally:
            os.close(descriptor)
        found = blob_id(folder, file.name) or f"{state.size}-{state.mtime_ns}-{'0' * 64}"
        if state.size != file.size or not _same_identity(found, file.identity):
            raise other_files(str(path), sources, file.name)
        readers[file.name] = WeightFile(file.name, where, state)
    return readers


def _on_hub(place: OnHub, sources: Sources, base: BaseSpec) -> Checkpoint:
    from svdbank.checkpoint.remote.access import Remote
    from svdbank.checkpoint.remote.hub import Snapshot, located

    commit = sources.revision
    named = place.revision if place.revision is not None and _COMMIT.fullmatch(place.revision) else None
    if commit is None or place.repository != sources.name or named not in (None, commit):
        begun = f"{sources.name}@{commit}" if commit else sources.name
        raise WrongBaseError(
            f"the plan of this build is of {begun}, not of {place}", hint="name the model that the build was begun with"
        )
    folder, files = located(place.repository, commit, sources.files)
    remote = Remote(Snapshot(place.repository, commit, folder, None, None, files, False), place.revision)
    readers: dict[str, WeightBytes] = dict(remote.files)
    for file in files:
        if file.path is not None:
            descriptor = open_regular(file.path)
            try:
                readers[file.name] = WeightFile(file.name, file.path, State.of(descriptor))
            finally:
                os.close(descriptor)
    return _opened(sources, base, folder, readers, remote if remote.files else None)


def _same_identity(one: str, other: str) -> bool:
    """Equal, or local files of equal size and time: to the nanosecond, or to the second where a copy kept no more than that."""
    ours, theirs = _LOCAL.fullmatch(one), _LOCAL.fullmatch(other)
    if ours is None or theirs is None:
        return one == other and one != ""
    times = int(ours[2]), int(theirs[2])
    whole = any(time % _SECOND == 0 for time in times) and times[0] // _SECOND == times[1] // _SECOND
    return ours[1] == theirs[1] and (times[0] == times[1] or whole)
