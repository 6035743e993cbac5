"""What a tensor is, from its name, its shape and a few facts of the configuration.

The aim is the set that PEFT's ``all-linear`` selects on the loaded model: every ``nn.Linear`` and ``Conv1D`` except the output
embedding.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from svdbank.checkpoint.configuration import ModelFacts
from svdbank.checkpoint.dtypes import FLOATING
from svdbank.specs import TensorSource

Kind = Literal["linear", "embedding", "head", "router"]

#: Architectures whose blocks use transformers' Conv1D, which stores (in, out), and the names of those modules.
CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
CONV1D_NAMES = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})

#: Last name components of token embeddings, the ones an output head can be tied to; preferred first.
TOKEN_EMBEDDINGS = (
    "embed_tokens",
    "wte",
    "word_embeddings",
    "shared",
    "embed_in",
    "tok_embeddings",
    "tokens_embed",
    "word_embedding",
    "embeddings",
)

_EMBEDDING_NAMES = frozenset(
    {
        *TOKEN_EMBEDDINGS,
        "wpe",
        "relative_attention_bias",
        "positions_embed",
        "position_embedding_table",
        "pos_emb",
        "rel_pos_emb",
    }
)
_EMBEDDING = re.compile(r"(?:.*_)?(?:embed|embeds|embedding|embeddings)|embed_(?:tokens|positions?)(?:_.*)?")
#: Patches are projected by a convolution or a linear layer, never looked up.
_PROJECTION = re.compile(r"patch_.*|.*_proj(?:ection)?")
_NORM = re.compile(r"(?:.*_)?(?:layer_?norm|rms_?norm|norm\d*|ln(?:_?\d+|_\w+)?)", re.IGNORECASE)
_HEAD_NAMES = frozenset({"lm_head", "embed_out", "generator_lm_head", "vocab_projector"})
_HEAD_ENDS = ("lm_head.decoder", "predictions.decoder", "pred_layer.proj")
_NUMBERED = re.compile(r"(?:^|\.)[0-9]+(?:\.|$)")
_HEAD_HINT = re.compile(r"head|out|decoder|predictions|logits|unembed", re.IGNORECASE)

#: Where a tied output head hangs in the loaded model, where it is not ``lm_head``.
_TIED_HEADS = {
    "albert": "predictions.decoder",
    "bert": "cls.predictions.decoder",
    "ernie": "cls.predictions.decoder",
    "fnet": "cls.predictions.decoder",
    "roc_bert": "cls.predictions.decoder",
    "roformer": "cls.predictions.decoder",
    "visual_bert": "cls.predictions.decoder",
    "camembert": "lm_head.decoder",
    "data2vec-text": "lm_head.decoder",
    "roberta": "lm_head.decoder",
    "roberta-prelayernorm": "lm_head.decoder",
    "xlm-roberta": "lm_head.decoder",
    "xlm-roberta-xl": "lm_head.decoder",
    "distilbert": "vocab_projector",
    "electra": "generator_lm_head",
    "modernbert": "decoder",
    "whisper": "proj_out",
}
_WITH_HEAD = re.compile(r"LMHead|ForCausalLM|ForConditionalGeneration|ForMaskedLM|ForPreTraining")


@dataclass(frozen=True)
class Role:
    """A matrix that can be decomposed: its module, what that is, and whether it is stored transposed."""

    module: str
    kind: Kind
    transposed: bool


def role_of(source: TensorSource, about: ModelFacts, experts_under: Collection[str]) -> Role | str:
    """The role of a tensor, or the reason why it has none.

    ``experts_under`` holds the module paths that have an ``experts`` child: a ``gate`` or ``router`` beside it is a router, which
    transformers keeps as a bare parameter.
    """
    module, dot, last = source.name.rpartition(".")
    dimensions = len(source.shape)
    if dimensions < 2:
        return "a vector (norm, bias or scale): only matrices are decomposed"
    if dimensions > 2:
        return f"{dimensions}-D (a convolution, buffer or stacked weights): only matrices are decomposed"
    if not dot or last != "weight":
        return "not a module's weight (a buffer or free parameter)"
    if source.dtype not in FLOATING:
        return f"stored as {source.dtype}: codes, not values"
    if 0 in source.shape:
        return "empty"
    parent, _, own = module.rpartition(".")
    if _NORM.fullmatch(own):
        return "a norm"
    kind = _kind(module, parent, own, source.shape, about, experts_under)
    conv1d = about.model_type in CONV1D_MODELS and own in CONV1D_NAMES
    return Role(module, kind, transposed=conv1d or kind == "embedding")


def _kind(
    module: str, parent: str, own: str, shape: tuple[int, ...], about: ModelFacts, experts_under: Collection[str]
) -> Kind:
    if own in _HEAD_NAMES or any(module == end or module.endswith("." + end) for end in _HEAD_ENDS):
        return "head"
    if own in _EMBEDDING_NAMES or (_EMBEDDING.fullmatch(own) and not _PROJECTION.fullmatch(own)):
        return "embedding"
    if own in ("gate", "router") and parent in experts_under:
        return "router"
    # Outside the numbered layers, a matrix with a row for each token is one end of the model whatever it is called.
    if shape[0] == about.vocab_size and not _NUMBERED.search(module):
        return "head" if _HEAD_HINT.search(module) else "embedding"
    return "linear"


def tied_head(about: ModelFacts, roles: dict[str, Role], shapes: dict[str, tuple[int, ...]]) -> tuple[str, str] | None:
    """(module of the head, tensor of its embedding) when the head shares the embedding's tensor and has none of its own.

    ``roles`` and ``shapes`` are by tensor name. Without ``tie_word_embeddings`` in the configuration, a language model that
    brings no head is a tied one: it could not be loaded otherwise.
    """
    if about.tied is False or any(role.kind == "head" for role in roles.values()):
        return None
    if about.tied is None and not any(_WITH_HEAD.search(name) for name in about.architectures):
        return None
    if about.architectures and not any(_WITH_HEAD.search(name) for name in about.architectures):
        return None
    ranked = []
    for tensor, role in roles.items():
        own = role.module.rpartition(".")[2]
        if role.kind == "embedding" and own in TOKEN_EMBEDDINGS:
            of_vocabulary = about.vocab_size is None or shapes[tensor][0] == about.vocab_size
            ranked.append((not of_vocabulary, TOKEN_EMBEDDINGS.index(own), role.module.count("."), tensor))
    if not ranked:
        return None
    return _TIED_HEADS.get(about.model_type, "lm_head"), min(ranked)[3]
