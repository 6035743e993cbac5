"""Where the values of a loaded model come from: the files that it was loaded from, or nowhere but memory.

What is in memory need not be what the files hold. A weight is the files' where its values are theirs under the cast that loading made; what
the cast has cost digits is then read from the files.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from svdbank.adapter.naming import elsewhere
from svdbank.checkpoint.loaded import InMemory, LoadedCheckpoint, LoadedWeight, of_files, of_memory
from svdbank.checkpoint.naming.roles import Role
from svdbank.checkpoint.naming.selection import decomposable
from svdbank.checkpoint.source import Checkpoint, open_cached
from svdbank.core.errors import SvdbankError
from svdbank.core.probe import is_readable
from svdbank.core.processors import available_cpus
from svdbank.core.specs import Progress, ProgressCallback, WeightKind, WeightSpec
from svdbank.peft.layers import Slot, unwrapped
from svdbank.peft.targets import Target

#: Weights compared at once: one is read and hashed while another one is compared.
_AT_ONCE = 4


@dataclass(frozen=True)
class WeightOrigin:
    """A source for the builder, and the modules of it that are to be decomposed; ``differs`` names a weight that is not as in the files."""

    checkpoint: LoadedCheckpoint
    modules: tuple[str, ...]
    differs: str | None = None


@dataclass(frozen=True)
class _Same:
    """A weight of the files that memory holds: ``exactly`` where the cast that loading made has cost no digit."""

    spec: WeightSpec
    sha256: str
    exactly: bool


def files_of(root: nn.Module) -> Checkpoint | None:
    """The files that a model says it was loaded from, where they are on this machine; nothing is asked of a network."""
    config = getattr(root, "config", None)
    name = getattr(config, "_name_or_path", None)
    if not isinstance(name, str) or not name.strip():
        return None
    try:
        return open_cached(name, getattr(config, "_commit_hash", None))
    except SvdbankError:
        return None  # pickles, GGUF, a folder that is gone: the weights in memory have to do


def kind_of_model(root: nn.Module) -> str:
    """What banks of weights that no file holds say of their model."""
    return f"{type(root).__module__}.{type(root).__qualname__}"


def name_of_model(root: nn.Module) -> str:
    """What to call a model: as it was loaded, without the way to its folder, else its class."""
    name = str(getattr(getattr(root, "config", None), "_name_or_path", "") or type(root).__name__)
    return Path(name).name if Path(name).is_absolute() else name


def origin(
    root: nn.Module, layers: Sequence[Slot], checkpoint: Checkpoint | None, prefix: str, progress: ProgressCallback
) -> WeightOrigin:
    """Where the targets of ``layers``, all of them readable, come from. Reads and hashes every one."""
    targets = [target for layer in layers for target in layer.targets]
    differs = None
    if checkpoint is not None:
        found = _in_files(checkpoint, targets, prefix, progress)
        if isinstance(found, WeightOrigin):
            return found
        differs = found
    weights = list(_own(root, layers))
    own = of_memory(name_of_model(root), kind_of_model(root), weights)
    return WeightOrigin(own, tuple(dict.fromkeys(weight.role.module for weight in weights)), differs)


def with_loaded(checkpoint: Checkpoint, specs: Sequence[WeightSpec], root: nn.Module) -> LoadedCheckpoint:
    """``checkpoint`` with those of ``specs`` from memory that the model holds whole, under their own paths and as the files do."""
    modules = {unwrapped(path): module for path, module in root.named_modules()}
    parameters = {unwrapped(path): parameter for path, parameter in root.named_parameters()}

    def own(spec: WeightSpec) -> _Same | None:
        parameter = parameters.get(spec.module) if spec.stacked else getattr(modules.get(spec.module), "weight", None)
        if not isinstance(parameter, Tensor) or parameter.device.type == "meta":
            return None
        values = parameter.detach()
        if spec.stacked and type(values) is Tensor and values.ndim == 3 and (spec.expert or 0) < values.shape[0]:
            values = values[spec.expert or 0]
        transposed = spec.operation == "transpose"
        target = Target(spec.module, values, transposed, spec.out_features, spec.in_features, 1)
        if not is_readable(target):
            return None
        held[spec.name] = InMemory(_matrix(target), "")
        return _compared(checkpoint, (spec,), target)

    held: dict[str, InMemory] = {}
    with ThreadPoolExecutor(min(_AT_ONCE, available_cpus()), "svdbank-compare") as pool:
        found = [one for one in pool.map(own, specs) if one is not None and one.exactly]
    return of_files(checkpoint, {one.spec.name: InMemory(held[one.spec.name].matrix, one.sha256) for one in found})


def absence(target: Target) -> str | None:
    """Why a weight cannot be decomposed as it lies in the model; None where it can."""
    if is_readable(target):
        return None
    weight: Any = target.weight
    if hasattr(weight, "ds_id"):
        return "partitioned by ZeRO-3"
    if hasattr(weight, "placements"):
        return "sharded by FSDP or tensor parallelism"
    if weight.device.type == "meta":
        return "on the meta device, or offloaded"
    if not weight.is_floating_point() or weight.element_size() == 1 or type(weight.data) is not Tensor:
        return f"quantised, {type(weight).__name__} of {str(weight.dtype).removeprefix('torch.')}"
    return f"{tuple(weight.shape)} in memory, not {target.out_features} by {target.in_features}"


def _in_files(
    checkpoint: Checkpoint, targets: Sequence[Target], prefix: str, progress: ProgressCallback
) -> WeightOrigin | str | None:
    """The files with what memory holds of them; where a weight is not as in them, its label; None where nobody knows what they hold."""
    try:
        specs = decomposable(checkpoint, (".*",))[0]
    except SvdbankError:
        return None
    by_module: dict[str, list[WeightSpec]] = defaultdict(list)
    for spec in specs:
        by_module[spec.module].append(spec)

    def compared(target: Target) -> _Same | None:
        return _compared(checkpoint, _candidates(by_module, target, prefix), target)

    held: dict[str, InMemory] = {}
    modules: dict[str, None] = {}
    with ThreadPoolExecutor(min(_AT_ONCE, available_cpus()), "svdbank-compare") as pool:
        for done, (target, same) in enumerate(zip(targets, pool.map(compared, targets), strict=True)):
            if same is None:
                pool.shutdown(cancel_futures=True)
                return target.label
            modules[same.spec.module] = None
            if same.exactly:
                held[same.spec.name] = InMemory(_matrix(target), same.sha256)
            progress(Progress("compare with the files", done + 1, len(targets), "weights", target.label))
    return WeightOrigin(of_files(checkpoint, held), tuple(modules))


def _candidates(by_module: Mapping[str, Sequence[WeightSpec]], target: Target, prefix: str) -> Iterator[WeightSpec]:
    """What a target may be among the files: under its own path, with the model's prefix added or removed, under other paths."""
    paths = [target.module]
    if prefix:
        paths += [f"{prefix}.{target.module}", target.module.removeprefix(f"{prefix}.")]
    known = [path for path in dict.fromkeys(paths) if path in by_module]
    for path in known or [place.module for place in elsewhere([target.module], by_module)[target.module]]:
        for spec in by_module[path]:
            if spec.expert == target.expert or (target.expert is None and not spec.stacked):
                yield spec


def _compared(checkpoint: Checkpoint, specs: Iterator[WeightSpec] | Sequence[WeightSpec], target: Target) -> _Same | None:
    """The first of ``specs`` whose stored values are the target's, under the cast that loading made."""
    here = _matrix(target)
    for spec in specs:
        if (spec.out_features, spec.in_features) != tuple(here.shape):
            continue
        stored, sha256 = checkpoint.read_hashed(spec)
        stored = stored.to(here.device)
        if torch.equal(stored.to(here.dtype), here) or any(
            torch.equal(stored.to(between).to(here.dtype), here) for between in (torch.bfloat16, torch.float16)
        ):
            return _Same(spec, sha256, torch.equal(here.to(stored.dtype), stored))
    return None


def _matrix(target: Target) -> Tensor:
    """The weight as (out, in), where it lies."""
    values = target.weight.detach()
    return values.mT if target.transposed else values


def _own(root: nn.Module, layers: Sequence[Slot]) -> Iterator[LoadedWeight]:
    """The targets of layers as weights of their own; the same parameter in two modules is one tensor."""
    output = getattr(root, "get_output_embeddings", lambda: None)()
    first: dict[tuple[int, tuple[int, ...]], str] = {}
    for layer in layers:
        base = layer.layer.get_base_layer()
        for target in layer.targets:
            weight = target.weight
            label = target.module if target.expert is None else f"{target.module}.{target.expert}"
            tensor = first.setdefault((weight.data_ptr(), tuple(weight.shape)), label)
            role = Role(target.module, _kind(layer, target, base, output), target.transposed)
            yield LoadedWeight(role, tensor, _matrix(target), target.expert)


def _kind(layer: Slot, target: Target, base: Any, output: Any) -> WeightKind:
    if layer.kind == "embedding":
        return "embedding"
    if output is not None and base is output:
        return "head"
    if target.parameter and target.expert is None:
        return "grouped" if isinstance(base, nn.Linear) else "router"
    return "linear"
