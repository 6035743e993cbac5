"""Which weight of a fine-tuned model each weight of its base is, and in what else the two differ that no adapter holds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from svdbank.checkpoint.configuration import VOLATILE
from svdbank.checkpoint.naming.selection import decomposable
from svdbank.checkpoint.naming.targets import parse_targets
from svdbank.checkpoint.source import Checkpoint
from svdbank.core.errors import OptionError
from svdbank.core.specs import WeightSpec


def pair_weights(one: Checkpoint, other: Checkpoint, targets: Sequence[str]) -> list[tuple[WeightSpec, WeightSpec]]:
    """The targeted weights of both models, by name, without idle ones. Raises :class:`OptionError` where they do not correspond."""
    mine = {spec.name: spec for spec in decomposable(one, targets)[0]}
    theirs = {spec.name: spec for spec in decomposable(other, targets)[0]}
    lacking = [(name, other) for name in mine if name not in theirs] + [(name, one) for name in theirs if name not in mine]
    if lacking:
        name, where = lacking[0]
        raise OptionError(
            f"{where.name} lacks {len(lacking)} weights of the other model, first {name}: they are not of one architecture",
            hint="name a fine-tuned model and the base it was made from",
        )
    all_linear = parse_targets(targets).all_linear
    _check_vocabularies(one, other, decomposable(one, (".*",))[0] if all_linear else mine.values())
    for name, spec in mine.items():
        here, there = (spec.out_features, spec.in_features), (theirs[name].out_features, theirs[name].in_features)
        if here != there:
            raise OptionError(
                f"{name} is {here[0]}×{here[1]} in {one.name} and {there[0]}×{there[1]} in {other.name}",
                hint="name a fine-tuned model and the base it was made from",
            )
    return [(spec, theirs[name]) for name, spec in mine.items() if not is_idle(spec)]


def is_idle(spec: WeightSpec) -> bool:
    """True for the module that lends encoder and decoder its tensor (T5's and BART's ``shared``) and is called by neither: what is added
    to it by an adapter does nothing."""
    return spec.kind == "embedding" and spec.module.rpartition(".")[2] == "shared"


def _check_vocabularies(one: Checkpoint, other: Checkpoint, specs: Iterable[WeightSpec]) -> None:
    """Embeddings and heads among ``specs`` must agree: what has other tokens is of no use on the base as a whole."""
    for source in (source for spec in specs if spec.kind in ("embedding", "head") for source in spec.sources):
        there = other.tensors.get(source.name)
        if there is not None and there.shape != source.shape:
            raise OptionError(
                f"{source.name} is {_shape(source.shape)} in {one.name} and {_shape(there.shape)} in {other.name}: the "
                "vocabulary was resized, and an adapter cannot add tokens to the base",
                hint=f"resize the base first: model.resize_token_embeddings({there.shape[0]}), then save_pretrained; or name modules "
                "without the vocabulary, --targets q_proj --targets v_proj, for an adapter that knows the base's tokens alone",
            )


#: Fields of ``config.json`` that do not decide what a trained model computes.
_SILENT = re.compile(
    r"architectures|vocab_size|tie_word_embeddings|quantization_config|use_cache|initializer_range|id2label|label2id"
    r"|.*_token_id|.*drop.*|output_.*|return_dict|problem_type|pretraining_tp"
)


def differing_settings(one: Mapping[str, Any], other: Mapping[str, Any], where: str = "") -> list[str]:
    """Fields that both configurations have, with other values, and that may change what the model computes; nested ones by path."""
    names = []
    for name in sorted(one.keys() & other.keys()):
        mine, theirs = one[name], other[name]
        if name in VOLATILE or _SILENT.fullmatch(name) or mine == theirs:
            continue
        if isinstance(mine, dict) and isinstance(theirs, dict):
            names += differing_settings(mine, theirs, f"{where}{name}.")
        else:
            names.append(f"{where}{name}")
    return names


def _shape(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))
