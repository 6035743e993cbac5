"""Which weight of a fine-tuned model each weight of its base is."""

from __future__ import annotations

from collections.abc import Sequence

from svdbank.checkpoint.naming.selection import decomposable
from svdbank.checkpoint.source import Checkpoint
from svdbank.core.errors import OptionError
from svdbank.core.specs import WeightSpec


def pair_weights(one: Checkpoint, other: Checkpoint, targets: Sequence[str]) -> list[tuple[WeightSpec, WeightSpec]]:
    """The targeted weights of both models, by name. Raises :class:`OptionError` where they do not correspond."""
    mine = {spec.name: spec for spec in decomposable(one, targets)[0]}
    theirs = {spec.name: spec for spec in decomposable(other, targets)[0]}
    lacking = [(name, other) for name in mine if name not in theirs] + [(name, one) for name in theirs if name not in mine]
    if lacking:
        name, where = lacking[0]
        raise OptionError(
            f"{where.name} lacks {len(lacking)} weights of the other model, first {name}: they are not of one architecture",
            hint="name a fine-tuned model and the base it was made from",
        )
    _check_vocabularies(one, other)
    for name, spec in mine.items():
        here, there = (spec.out_features, spec.in_features), (theirs[name].out_features, theirs[name].in_features)
        if here != there:
            raise OptionError(
                f"{name} is {here[0]}×{here[1]} in {one.name} and {there[0]}×{there[1]} in {other.name}",
                hint="name a fine-tuned model and the base it was made from",
            )
    return [(spec, theirs[name]) for name, spec in mine.items()]


def _check_vocabularies(one: Checkpoint, other: Checkpoint) -> None:
    """Embeddings and heads must agree even where they are not targeted: with other tokens the adapter is of no use on the base."""
    ends = [spec for spec in decomposable(one, (".*",))[0] if spec.kind in ("embedding", "head")]
    for source in (source for spec in ends for source in spec.sources):
        there = other.tensors.get(source.name)
        if there is not None and there.shape != source.shape:
            raise OptionError(
                f"{source.name} is {_shape(source.shape)} in {one.name} and {_shape(there.shape)} in {other.name}: the "
                "vocabulary was resized, and an adapter cannot add tokens to the base",
                hint=f"resize the base first: model.resize_token_embeddings({there.shape[0]}), then save_pretrained",
            )


def _shape(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))
