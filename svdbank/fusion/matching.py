"""Which weight of the checkpoint each weight of the adapter changes, and whether they belong together."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from svdbank.adapter.folder import SavedModules
from svdbank.adapter.model import Adapter
from svdbank.adapter.naming import matched
from svdbank.adapter.weights import AdaptedWeight
from svdbank.bank.index import base_digest
from svdbank.checkpoint.naming.matrices import matrices as matrices_of
from svdbank.checkpoint.naming.selection import decomposable
from svdbank.checkpoint.source import Checkpoint
from svdbank.core.errors import OptionError, WrongBaseError, abridge
from svdbank.core.specs import TensorSource, WeightSpec

#: What to do about whole modules that do not fit a checkpoint's tensors.
_WITH_PEFT = "merge it with PEFT: PeftModel.from_pretrained(model, ADAPTER).merge_and_unload().save_pretrained(…)"

#: What to do about an adapter that changes one of a tied pair.
_UNTIE = "--untie writes a tensor for each, and tie_word_embeddings: false"


def match_weights(adapter: Adapter, checkpoint: Checkpoint, *, other: bool) -> list[tuple[WeightSpec, AdaptedWeight]]:
    """Each weight of the adapter with the weight of the checkpoint that it changes.

    Raises :class:`OptionError` where there is none, :class:`WrongBaseError` for another shape (OptionError where the model is
    ``other`` than the base).
    """
    if not adapter.weights:
        return []
    specs, _ = decomposable(checkpoint, (".*",))
    held = {(spec.name if spec.stacked else spec.module): spec for spec in specs}
    names = matched({key: key for key in held}, list(adapter.weights))
    missing = [key for key in adapter.weights if key not in names]
    if missing:
        raise OptionError(
            f"{checkpoint.name}: the adapter changes {len(missing)} weights that this model lacks: {abridge(missing)}",
            hint="name the base model of the adapter: base_model_name_or_path in its adapter_config.json",
        )
    found = [(held[names[key]], weight) for key, weight in adapter.weights.items()]
    for spec, weight in found:
        ours, theirs = (spec.out_features, spec.in_features), (weight.out_features, weight.in_features)
        if ours != theirs:
            kind = OptionError if other else WrongBaseError
            raise kind(
                f"{checkpoint.name}: {spec.name} is {ours[0]}×{ours[1]}, the adapter's change of it {theirs[0]}×{theirs[1]}",
                hint="name the base model of the adapter: base_model_name_or_path in its adapter_config.json",
            )
    _refuse_tied([spec for spec, _ in found], specs, checkpoint)
    return found


def _refuse_tied(chosen: Sequence[WeightSpec], specs: Sequence[WeightSpec], checkpoint: Checkpoint) -> None:
    users = _users(specs)
    for spec in chosen:
        others = [module for source in spec.sources for module in users[source] if module != spec.module]
        if others:
            raise OptionError(
                f"{checkpoint.name}: {spec.module} and {others[0]} are one tensor, {spec.sources[0].name}; the adapter changes "
                f"{spec.module} alone, and one tensor cannot hold both",
                hint=_UNTIE,
            )


def _users(specs: Sequence[WeightSpec]) -> dict[TensorSource, list[str]]:
    """The modules that are made of each stored tensor or piece: two of a tied embedding and head."""
    users: dict[TensorSource, list[str]] = {}
    for spec in specs:
        for source in spec.sources:
            users.setdefault(source, []).append(spec.module)
    return users


def check_kinds(
    base: Sequence[tuple[WeightSpec, AdaptedWeight]],
    matrices: Sequence[tuple[WeightSpec, AdaptedWeight]],
    one: Checkpoint,
    other: Checkpoint,
) -> None:
    """Raise where the base and the model that is changed instead name the adapted weights differently."""
    for (mine, _), (theirs, _) in zip(base, matrices, strict=True):
        if mine.kind != theirs.kind or (mine.expert is None) != (theirs.expert is None):
            raise OptionError(f"{other.name}: {theirs.name} is not what {mine.name} is in {one.name}")


def check_base(adapter: Adapter, matrices: Sequence[tuple[WeightSpec, AdaptedWeight]], base: Checkpoint) -> dict[str, str]:
    """sha256 that each weight must have, by name; raises :class:`WrongBaseError` before the work where the smallest has another."""
    expected = {spec.name: weight.source.sha256 for spec, weight in matrices if weight.source is not None}
    if expected:
        smallest = min((spec for spec, _ in matrices if spec.name in expected), key=lambda spec: spec.nbytes)
        wrong = base.read_hashed(smallest)[1] != expected[smallest.name]
    elif adapter.base.digest and adapter.base.weights:
        specs = {spec.name: spec for spec, _ in matrices}
        names = adapter.base.weights
        known = all(name in specs for name in names)
        wrong = not known or base_digest({n: base.read_hashed(specs[n])[1] for n in names}) != adapter.base.digest
    else:
        return {}
    if wrong:
        said = adapter.base.name or "another base"
        raise WrongBaseError(
            f"{base.name}: not the weights that the adapter was made on ({said})",
            hint=f"svdbank fuse BASE ADAPTER --into {base.name} adds it to another model of the same shapes, if that is meant",
        )
    return expected


def whole_tensors(saved: SavedModules, checkpoint: Checkpoint) -> list[tuple[WeightSpec, Tensor]]:
    """The tensors of ``modules_to_save``, each with the stored tensor that it replaces."""
    if not saved.tensors:
        return []
    found = matrices_of(checkpoint).whole
    names = matched({key: key for key in found}, list(saved.tensors))
    users = _users(decomposable(checkpoint, (".*",))[0])
    full = []
    for key, values in saved.tensors.items():
        source = found[names[key]] if key in names else None
        why, hint = None, _WITH_PEFT
        if source is None:
            why = "the model stores no tensor of that name"
        elif source.shape != tuple(values.shape):
            why = f"its shape is {tuple(values.shape)}, the model's {source.shape}: a vocabulary that was resized, or another head"
        elif len(shared := users.get(source, ())) > 1:
            why, hint = f"{' and '.join(shared)} are one tensor", _UNTIE
        if source is None or why is not None:
            raise OptionError(
                f"the adapter holds a whole {key} (modules_to_save) that cannot be carried over: {why}",
                hint=hint,
            )
        spec = WeightSpec(
            name=f"{names[key]} (whole)",
            module=names[key].rpartition(".")[0],
            kind="linear",
            family="",
            out_features=source.shape[0],
            in_features=math.prod(source.shape[1:]),
            dtype=source.dtype,
            sources=(source,),
        )
        full.append((spec, values))
    return full
