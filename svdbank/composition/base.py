"""The base of adapters that are put together: what its modules are called, and the tensors that trained ones replaced."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from svdbank.adapter.base import configuration_of
from svdbank.adapter.model import Adapter
from svdbank.adapter.naming import matched
from svdbank.adapter.renaming import in_model, one_by_one
from svdbank.checkpoint.naming.matrices import matrices
from svdbank.checkpoint.source import Checkpoint, open_checkpoint, read_config
from svdbank.core.errors import CheckpointError, OptionError

_NAME_IT = "name the model that they are for: --base MODEL"


def on_base(adapters: Mapping[str, Adapter], base: str | Path | None) -> dict[str, Adapter]:
    """The adapters with their modules called as in ``base``, and with what their whole tensors replace there.

    Without a ``base``, it is the one that the adapters record, where all that record one name the same and it is on this machine.
    Raises :class:`OptionError` for adapters of which some have experts that were modules and others have them fused, without a base;
    what :func:`~svdbank.checkpoint.source.open_checkpoint` raises for a base that was named.
    """
    whole = any(adapter.whole.replacing for adapter in adapters.values())
    if base is None:
        folder = _recorded(adapters.values())
        if folder is None:
            _check_experts(adapters)
            return dict(adapters)
        opened = _opened(folder) if whole else None
        if opened is None:
            return _named(adapters, read_config(folder), str(folder))
    else:
        opened = open_checkpoint(base)
    with opened as checkpoint:
        named = _named(adapters, checkpoint.config, checkpoint.name)
        if not whole:
            return named
        original = _replaced(named.values(), checkpoint)
    return {name: replace(adapter, whole=adapter.whole.on(original)) for name, adapter in named.items()}


def _recorded(adapters: Iterable[Adapter]) -> Path | None:
    """The folder of the one base that all adapters name, if it is on this machine."""
    named = {(adapter.base.name, adapter.base.revision) for adapter in adapters if adapter.base.name}
    if len({name for name, _ in named}) != 1:
        return None
    return next((found for name, revision in named if name and (found := configuration_of(name, revision)) is not None), None)


def _opened(folder: Path) -> Checkpoint | None:
    """The checkpoint in a folder; None where it holds a configuration alone, or weights that cannot be read."""
    try:
        return open_checkpoint(folder)
    except CheckpointError:
        return None


def _named(adapters: Mapping[str, Adapter], config: dict[str, object], where: str) -> dict[str, Adapter]:
    return {name: in_model(adapter, config, where) if adapter.weights else adapter for name, adapter in adapters.items()}


def _check_experts(adapters: Mapping[str, Adapter]) -> None:
    modules = {name: key for name, adapter in adapters.items() if (key := one_by_one(adapter.weights)) is not None}
    fused = [name for name, adapter in adapters.items() if any(weight.kind == "expert" for weight in adapter.weights.values())]
    if modules and fused:
        name, key = next(iter(modules.items()))
        raise OptionError(
            f"{name} changes experts that were modules ({key}), {fused[0]} changes them as rows of one parameter: which rows are meant "
            "only their model says",
            hint=_NAME_IT,
        )


def _replaced(adapters: Iterable[Adapter], checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The base's own values of the tensors that adapters replace, by the adapters' names; those that it stores in the same shape."""
    found = matrices(checkpoint)
    stored = dict(found.whole)
    if found.tied is not None:
        module, embedding = found.tied
        if len(embedding.sources) == 1:
            stored[f"{module}.weight"] = embedding.sources[0]
    shapes = {name: tuple(tensor.shape) for adapter in adapters for name, tensor in adapter.whole.replacing.items()}
    names = matched({name: name for name in stored}, list(shapes)) if shapes else {}
    return {own: checkpoint.read_tensor(stored[name]) for own, name in names.items() if stored[name].shape == shapes[own]}
