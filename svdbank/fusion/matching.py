"""Which weight of the checkpoint each weight of the adapter changes, and whether they belong together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from svdbank.adapter.model import Adapter
from svdbank.adapter.naming import matched
from svdbank.adapter.renaming import in_model
from svdbank.adapter.weights import AdaptedWeight
from svdbank.bank.index import base_digest
from svdbank.checkpoint.naming.matrices import matrices as matrices_of
from svdbank.checkpoint.naming.selection import decomposable
from svdbank.checkpoint.source import Checkpoint
from svdbank.core.errors import OptionError, WrongBaseError, abridge
from svdbank.core.specs import TensorSource, WeightSpec
from svdbank.fusion.pairing import is_idle
from svdbank.fusion.untying import how_to_untie

#: What to do about whole modules that do not fit a checkpoint's tensors.
_OTHER_HEAD = (
    "name a checkpoint of the class that was trained: save the model, with this head, by save_pretrained before get_peft_model"
)
_RESIZE = "model.resize_token_embeddings({0}), model.save_pretrained(FOLDER), and fuse into FOLDER"


def named_as_stored(adapter: Adapter, checkpoint: Checkpoint) -> Adapter:
    """The adapter with the names that its modules have in the model that is loaded of ``checkpoint`` today, where it has those of older
    Transformers (:func:`svdbank.adapter.renaming.in_model`)."""
    held = {(spec.name if spec.stacked else spec.module) for spec in decomposable(checkpoint, (".*",))[0]}
    whole = matrices_of(checkpoint).whole.keys()

    def strangers(one: Adapter) -> int:
        return len(one.weights.keys() - held) + len(one.whole.replacing.keys() - whole)

    if not adapter.weights or not strangers(adapter):
        return adapter
    found = in_model(adapter, checkpoint.config, checkpoint.name)
    return found if strangers(found) < strangers(adapter) else adapter


def match_weights(adapter: Adapter, checkpoint: Checkpoint, *, other: bool) -> list[tuple[WeightSpec, AdaptedWeight]]:
    """Each weight of the adapter with the weight of the checkpoint that it changes.

    Raises :class:`OptionError` where there is none, :class:`WrongBaseError` for another shape (OptionError where the model is
    ``other`` than the base).
    """
    if not adapter.weights:
        return []
    specs, _ = decomposable(checkpoint, (".*",))
    held = {(spec.name if spec.stacked else spec.module): spec for spec in specs}
    names = _names(adapter, held)
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
            kind, rows = OptionError if other else WrongBaseError, _rows_of_vocabulary(spec, ours, theirs)
            raise kind(
                f"{checkpoint.name}: {spec.name} is {ours[0]}×{ours[1]}, the adapter's change of it {theirs[0]}×{theirs[1]}",
                hint=_RESIZE.format(rows)
                if rows is not None
                else "name the base model of the adapter: base_model_name_or_path in its adapter_config.json",
            )
    for spec, _ in found:
        if is_idle(spec):
            raise _idle(spec.module, checkpoint)
    _refuse_tied([spec for spec, _ in found], specs, checkpoint)
    return found


def _idle(module: str, checkpoint: Checkpoint) -> OptionError:
    return OptionError(
        f"{checkpoint.name}: {module} is never called: encoder and decoder have its tensor in embeddings of their own, so that the "
        "adapter on it does nothing in PEFT, and fused it would change both",
    )


def _rows_of_vocabulary(spec: WeightSpec, ours: tuple[int, int], theirs: tuple[int, int]) -> int | None:
    """How many tokens there were in training, where that is all that differs."""
    tokens = {"embedding": 1, "head": 0}.get(spec.kind)
    return theirs[tokens] if tokens is not None and ours[1 - tokens] == theirs[1 - tokens] else None


def _names(adapter: Adapter, held: Mapping[str, WeightSpec]) -> dict[str, str]:
    """Which of ``held`` each weight of the adapter is: what it records where that is here, else by path, and shape where two are."""
    by_name = {spec.name: key for key, spec in held.items()}
    recorded = {key: by_name.get(weight.source.name) for key, weight in adapter.weights.items() if weight.source is not None}
    known = {key: name for key, name in recorded.items() if name is not None}
    if len(known) == len(adapter.weights):
        return known

    def fits(key: str, name: str) -> bool:
        weight, spec = adapter.weights[key], held[name]
        return (spec.out_features, spec.in_features) == (weight.out_features, weight.in_features)

    names = {key: key for key in held}
    found = matched(names, list(adapter.weights), fits)
    return found if len(found) == len(adapter.weights) else matched(names, list(adapter.weights))


def _refuse_tied(chosen: Sequence[WeightSpec], specs: Sequence[WeightSpec], checkpoint: Checkpoint) -> None:
    users = _users(specs)
    modules = {spec.module for spec in chosen}
    for spec in chosen:
        others = [module for source in spec.sources for module in users[source] if module != spec.module]
        if others:
            how = "each by itself" if modules.issuperset(others) else f"{spec.module} alone"
            raise OptionError(
                f"{checkpoint.name}: {spec.module} and {others[0]} are one tensor, {spec.sources[0].name}; the adapter changes "
                f"{how}, and one tensor cannot hold both",
                hint=how_to_untie(checkpoint, [spec.module, *others]),
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


def whole_tensors(adapter: Adapter, checkpoint: Checkpoint) -> list[tuple[WeightSpec, Tensor]]:
    """The tensors of ``modules_to_save``, each with the stored tensor that it replaces; one for a tied pair of one value."""
    replacing, saved = adapter.whole.replacing, adapter.settings.modules_to_save or ()
    if not replacing and not saved:
        return []
    users = _users(decomposable(checkpoint, (".*",))[0])
    shared = {f"{module}.weight": source for source, modules in users.items() if len(modules) > 1 for module in modules}
    found = {**shared, **matrices_of(checkpoint).whole}
    names = matched({key: key for key in found}, list(replacing)) if replacing else {}
    lacking = [own for own in found if own not in names.values() and any(f".{module}." in f".{own}" for module in saved)]
    if lacking:
        raise OptionError(
            f"the adapter was trained with modules_to_save {', '.join(saved)}, and {abridge(lacking)} is not in its folder: nor does PEFT "
            "load it"
        )
    values_of = {names[key]: values for key, values in replacing.items() if key in names}
    full: list[tuple[WeightSpec, Tensor]] = []
    for key, values in replacing.items():
        source = found[names[key]] if key in names else None
        tied = [] if source is None or names[key] not in shared else [f"{module}.weight" for module in users[source]]
        why, hint = None, None
        if source is None:
            why, hint = "the model stores no tensor of that name", _OTHER_HEAD
        elif source.shape != tuple(values.shape):
            why = f"its shape is {tuple(values.shape)}, the model's {source.shape}: a vocabulary that was resized, or another head"
            hint = _RESIZE if len(source.shape) == 2 and source.shape[1:] == tuple(values.shape)[1:] else _OTHER_HEAD
        elif any(name not in values_of or not torch.equal(values_of[name], values) for name in tied):
            why, hint = f"{' and '.join(users[source])} are one tensor", how_to_untie(checkpoint, users[source])
        if source is None or why is not None:
            raise OptionError(
                f"the adapter holds a whole {key} (modules_to_save) that cannot be carried over: {why}",
                hint=hint and hint.format(len(values)),
            )
        module = names[key].rpartition(".")[0]
        if module.rpartition(".")[2] == "shared" and any(module == name or module.endswith(f".{name}") for name in saved):
            raise _idle(module, checkpoint)
        if any(spec.sources == (source,) for spec, _ in full):
            continue
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


def matrices_beneath(adapter: Adapter, matrices: Sequence[tuple[WeightSpec, AdaptedWeight]]) -> dict[str, Tensor]:
    """What the adapter says the base's own weights were in training, (out, in), by the name of the weight that it changes.

    Raises :class:`WrongBaseError` where that has another shape than the weight, as after a vocabulary was resized.
    """
    beneath = {}
    for (spec, weight), key in zip(matrices, adapter.weights, strict=True):
        values = adapter.whole.beneath.get(key)
        if values is None:
            continue
        matrix = values.mT if weight.kind == "embedding" else values
        if tuple(matrix.shape) != (spec.out_features, spec.in_features):
            raise WrongBaseError(
                f"the adapter was trained on a {key}.base_layer.weight of shape {tuple(values.shape)}, the model's {spec.name} is "
                f"{spec.out_features}×{spec.in_features}",
                hint=_RESIZE.format(len(values)),
            )
        beneath[spec.name] = matrix
    return beneath


def check_beneath(
    beneath: Mapping[str, Tensor], matrices: Sequence[tuple[WeightSpec, AdaptedWeight]], base: Checkpoint
) -> None:
    """Raise :class:`WrongBaseError` where the base stores other values than the adapter was trained on: another model lacks them too."""
    for spec, _ in matrices:
        if spec.name not in beneath:
            continue
        stored, held = base.read(spec), beneath[spec.name]
        if not (torch.equal(stored.to(held.dtype), held) or torch.equal(held.to(stored.dtype), stored)):
            raise WrongBaseError(
                f"{base.name}: the adapter was trained on another {spec.name} than this model stores, and holds it "
                f"({spec.module}.base_layer.weight): ΔW alone is not what was trained",
                hint="without --into, the adapter's own values are written",
            )
