"""A tied embedding and output head as two tensors, so that each can be changed by itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import msgspec

from svdbank.adapter.model import Adapter
from svdbank.adapter.naming import matched
from svdbank.checkpoint.configuration import facts
from svdbank.checkpoint.naming.matrices import matrices
from svdbank.checkpoint.naming.selection import decomposable
from svdbank.checkpoint.source import Checkpoint
from svdbank.core.errors import OptionError
from svdbank.core.specs import WeightSpec

#: The tensor that Transformers' causal language models read where nothing is tied.
HEAD = "lm_head.weight"

#: What ``config.json`` then says.
UNTIED = {"tie_word_embeddings": False}

#: Ends of the classes whose ``forward`` does the same with a head of its own as with a tied one.
_CLASSES = ("ForCausalLM", "LMHeadModel")


def tensors_to_untie(checkpoint: Checkpoint, adapter: Adapter) -> tuple[str, ...]:
    """Tensors of the embedding and of the head that there will be, where they are one and the adapter changes or replaces either."""
    pair = _tied_pair(checkpoint)
    if pair is None:
        return ()
    modules = {spec.module: spec.module for spec in pair}
    whole = {f"{module}.weight": module for module in modules}
    changed = bool(adapter.weights) and matched(modules, list(adapter.weights))
    replacing = list(adapter.whole.replacing)
    if not changed and not (replacing and matched(whole, replacing)):
        return ()
    return pair[0].sources[0].name, HEAD


def _tied_pair(checkpoint: Checkpoint) -> tuple[WeightSpec, WeightSpec] | None:
    """Embedding and head."""
    specs, _ = decomposable(checkpoint, (".*",))
    heads = [spec for spec in specs if spec.kind == "head"]
    return next(((spec, head) for head in heads for spec in specs if spec != head and spec.sources == head.sources), None)


def how_to_untie(checkpoint: Checkpoint, modules: Collection[str]) -> str | None:
    """What to do about an adapter that changes one of ``modules``, which are one tensor; None where nothing is known to give the same."""
    pair = _tied_pair(checkpoint)
    if pair is not None and {spec.module for spec in pair} >= set(modules):
        made = _with_head(checkpoint)
        return None if made is None else "--untie writes a tensor for each, and tie_word_embeddings: false"
    return "keep it an adapter: loaded by PEFT beside the model, each of these modules has its own change"


def untied(checkpoint: Checkpoint) -> Checkpoint:
    """The same checkpoint with a head of its own, :data:`HEAD`, of the same bytes; written, both are there.

    Raises :class:`OptionError` where that is not certain to be the same model: T5 scales the output of a tied head, BERT's head shares a
    bias too, and multimodal models have more than one configuration.
    """
    pair = _tied_pair(checkpoint)
    if pair is None:
        return checkpoint
    made = _with_head(checkpoint)
    if made is None:
        embedding, head = pair
        about = facts(checkpoint.config, f"{checkpoint.name}: config.json")
        kind = ", ".join(about.architectures) or about.model_type or "it has no config.json"
        raise OptionError(
            f"{checkpoint.name}: {embedding.module} and {head.module} cannot be untied: that this model ({kind}) reads a head of its "
            "own and then does the same is not known",
        )
    return made


def _with_head(checkpoint: Checkpoint) -> Checkpoint | None:
    pair = _tied_pair(checkpoint)
    about = facts(checkpoint.config, f"{checkpoint.name}: config.json")
    plain = bool(about.architectures) and all(name.endswith(_CLASSES) for name in about.architectures) and not about.parts
    if pair is None or HEAD in checkpoint.tensors or not plain or matrices(checkpoint).decided == "names":
        return None
    tensors = checkpoint.tensors | {HEAD: msgspec.structs.replace(pair[0].sources[0], name=HEAD)}
    made = dataclasses.replace(checkpoint, tensors=tensors, config=checkpoint.config | UNTIED, kept={})
    return made if _reads(made) else None


def _reads(checkpoint: Checkpoint) -> bool:
    """True where the model's output head is :data:`HEAD` under that very name."""
    return any(
        role.kind == "head" and f"{role.module}.weight" == HEAD and parameter.sources == (checkpoint.tensors[HEAD],)
        for role, parameter in matrices(checkpoint).found
    )
