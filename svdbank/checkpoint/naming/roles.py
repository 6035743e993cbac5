"""What a parameter is, from its name, its shape and a few facts of the configuration.

The aim is the set that PEFT's ``all-linear`` selects on the loaded model: every ``nn.Linear`` and ``Conv1D`` except the output
embedding, and the matrices of experts, which are linear weights too although transformers keeps them as stacked parameters.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from svdbank.checkpoint.configuration import ModelFacts
from svdbank.checkpoint.dtypes import FLOATING
from svdbank.checkpoint.naming.correspondence import Parameter, is_listed
from svdbank.core.specs import WeightKind

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
_TOWER = re.compile(r"(?:^|[._])(?:visual|vision|image|audio|speech|merger|projector|connector|adapter)(?:[._]|$)")
_HEAD_HINT = re.compile(r"head|out|decoder|predictions|logits|unembed", re.IGNORECASE)

_WITH_HEAD = re.compile(r"LMHead|ForCausalLM|ForConditionalGeneration|ForMaskedLM|ForPreTraining")


@dataclass(frozen=True)
class Role:
    """A matrix that can be decomposed: its module (of an expert its stacked parameter), what that is, whether it is stored (in, out)."""

    module: str
    kind: WeightKind
    transposed: bool


def role_of(parameter: Parameter, about: ModelFacts, experts_under: Collection[str]) -> Role | str:
    """The role of a parameter, or the reason why it has none.

    ``experts_under`` holds the module paths that have an ``experts`` child: a ``gate`` or ``router`` beside it is a router, which
    transformers keeps as a bare parameter.
    """
    module, dot, last = parameter.name.rpartition(".")
    shape = parameter.shape
    if len(shape) < 2:
        return "a vector (norm, bias or scale): only matrices are decomposed"
    if len(shape) > 2:
        return _why_not_flat(parameter, about)
    unreadable = next((source.dtype for source in parameter.sources if source.dtype not in FLOATING), None)
    if parameter.expert is not None:
        return (
            f"stored as {unreadable}: codes, not values" if unreadable else Role(parameter.name, "linear", parameter.transposed)
        )
    if not dot or last != "weight":
        return "not a module's weight (a buffer or free parameter)"
    if unreadable:
        return f"stored as {unreadable}: codes, not values"
    if 0 in shape:
        return "empty"
    parent, _, own = module.rpartition(".")
    if _NORM.fullmatch(own):
        return "a norm"
    kind = _kind(module, parent, own, shape, about, experts_under)
    return Role(module, kind, transposed=parameter.transposed or kind == "embedding")


def _why_not_flat(parameter: Parameter, about: ModelFacts) -> str:
    dimensions = len(parameter.shape)
    if dimensions == 3 and "expert" in parameter.name and not is_listed(about):
        return f"3-D: stacked experts, of which only the architectures in docs/architectures.md are understood, not {about.model_type!r}"
    return f"{dimensions}-D (a convolution, buffer or stacked weights): only matrices are decomposed"


def _kind(
    module: str, parent: str, own: str, shape: tuple[int, ...], about: ModelFacts, experts_under: Collection[str]
) -> WeightKind:
    if own in _HEAD_NAMES or any(module == end or module.endswith("." + end) for end in _HEAD_ENDS):
        return "head"
    if own in _EMBEDDING_NAMES or (_EMBEDDING.fullmatch(own) and not _PROJECTION.fullmatch(own)):
        return "embedding"
    if own in ("gate", "router") and parent in experts_under:
        return "router"
    # Outside the numbered layers, a matrix with a row for each token is one end of the model whatever it is called.
    # The table's types have theirs under the names above; elsewhere a tower's matrix may be as wide by chance.
    if shape[0] == about.vocab_size and not is_listed(about) and not _NUMBERED.search(module) and not _TOWER.search(module):
        return "head" if _HEAD_HINT.search(module) else "embedding"
    return "linear"


def tied_head(about: ModelFacts, matrices: Iterable[tuple[Role, Parameter]], head: str) -> tuple[str, Parameter] | None:
    """(``head``, the module, its embedding's parameter) when the head shares the embedding's tensor and has none of its own.

    Without ``tie_word_embeddings`` in the configuration, a language model that brings no head is a tied one: it could not be loaded
    otherwise.
    """
    matrices = list(matrices)
    if about.tied is False or any(role.kind == "head" for role, _ in matrices):
        return None
    if about.tied is None and not any(_WITH_HEAD.search(name) for name in about.architectures):
        return None
    if about.architectures and not any(_WITH_HEAD.search(name) for name in about.architectures):
        return None
    ranked = []
    for number, (role, parameter) in enumerate(matrices):
        own = role.module.rpartition(".")[2]
        if role.kind == "embedding" and own in TOKEN_EMBEDDINGS:
            of_vocabulary = about.vocab_size is None or parameter.shape[0] == about.vocab_size
            ranked.append((not of_vocabulary, TOKEN_EMBEDDINGS.index(own), role.module.count("."), number))
    if not ranked:
        return None
    return head, matrices[min(ranked)[3]][1]
