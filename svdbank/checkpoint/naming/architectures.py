"""What transformers 5 loads a model type's tensors as, where that is not one module of the same name for each.

The table is data: regular expressions on names, and which matrices make up which parameter. ``correspondence.py`` applies it. It was
written from transformers 5.23's ``conversion_mapping.py`` and modelling files; ``tests/checkpoint/test_architectures.py`` builds
each type with the real classes and compares every weight. transformers itself is not needed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Experts:
    """Matrices stored one by one for each expert and loaded as slice e of one parameter (experts, out, in).

    ``<path>.experts.<e>.<part>.weight`` for each of ``parts``, their rows one after another, is ``<path>.experts.<parameter>[e]``.
    """

    parameter: str
    parts: tuple[str, ...]


@dataclass(frozen=True)
class Stack:
    """A 3-D tensor, one matrix for each expert, that is a parameter of the loaded model too.

    ``parameter`` is the end of its name. ``transposed``: its slices are (in, out), so that the model computes ``x @ W[e]``.
    """

    parameter: str
    transposed: bool = False


@dataclass(frozen=True)
class Blocks:
    """One stored matrix whose equal blocks of rows are the weights of several modules, in that order. Ends of module paths."""

    stored: str
    modules: tuple[str, ...]


@dataclass(frozen=True)
class Architecture:
    """One row of the table: a model type, or a part of a multimodal model.

    Attributes
    ----------
    renames
        (regular expression, replacement) applied in order to a tensor's name, each at most once.
    prefix
        transformers' ``base_model_prefix``: where the bare model hangs in a model with a head. Names get it, or lose it, as the class
        in ``config.json`` has it.
    parts
        Key in ``config.json`` → path of that part in the loaded model with a head. The part's own row applies below it.
    experts, stacks, blocks
        Parameters and modules that are not one stored matrix each.
    conv1d
        Last components of modules that are transformers' ``Conv1D``, which stores (in, out).
    head
        Where the output head hangs, for checkpoints that leave it out because it is tied to the embedding.
    """

    renames: tuple[tuple[str, str], ...] = ()
    prefix: str = ""
    parts: tuple[tuple[str, str], ...] = ()
    experts: tuple[Experts, ...] = ()
    stacks: tuple[Stack, ...] = ()
    blocks: tuple[Blocks, ...] = ()
    conv1d: frozenset[str] = frozenset()
    head: str = "lm_head"


#: What is assumed of a model type that is not in the table.
UNKNOWN = Architecture()

_GATE_UP = (Experts("gate_up_proj", ("gate_proj", "up_proj")), Experts("down_proj", ("down_proj",)))
_W1_W3 = (Experts("gate_up_proj", ("w1", "w3")), Experts("down_proj", ("w2",)))
_STACKS = (Stack("experts.gate_up_proj"), Stack("experts.down_proj"))
_STACKS_IN_OUT = (Stack("experts.gate_up_proj", transposed=True), Stack("experts.down_proj", transposed=True))
_CONV1D = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})

_VIT_RENAMES = (
    (r"encoder\.layer\.", "layers."),
    (r"attention\.query", "q_proj"),
    (r"attention\.key", "k_proj"),
    (r"attention\.value", "v_proj"),
    (r"attention\.output\.dense", "attention.o_proj"),
    (r"intermediate\.dense", "mlp.fc1"),
    (r"output\.dense", "mlp.fc2"),
)

#: A language model behind a vision tower: stored as two models side by side, loaded as parts of one.
_LLAVA = Architecture(
    renames=(
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^language_model\.model\.", "model.language_model."),
        (r"^(language_model|vision_tower|multi_modal_projector)\.", r"model.\1."),
        (r"^model\.language_model\.model\.", "model.language_model."),
    ),
    prefix="model",
    parts=(("text_config", "model.language_model"), ("vision_config", "model.vision_tower")),
)
_QWEN_VL = Architecture(
    renames=((r"^visual\.", "model.visual."), (r"^model\.(?!language_model\.|visual\.)", "model.language_model.")),
    prefix="model",
    parts=(("text_config", "model.language_model"), ("vision_config", "model.visual")),
)

_DECODER = Architecture(prefix="model")
_TRANSFORMER = Architecture(prefix="transformer")
_MOE = Architecture(prefix="model", experts=_GATE_UP, stacks=_STACKS)
_MIXTRAL = Architecture(prefix="model", renames=((r"\.block_sparse_moe\.", ".mlp."),), experts=_W1_W3, stacks=_STACKS)
_GRANITE_MOE = Architecture(
    prefix="model",
    renames=(
        (r"block_sparse_moe\.input_linear\.weight", "block_sparse_moe.experts.gate_up_proj"),
        (r"block_sparse_moe\.output_linear\.weight", "block_sparse_moe.experts.down_proj"),
        (r"block_sparse_moe\.router\.layer\.weight", "block_sparse_moe.router.weight"),
    ),
    stacks=_STACKS,
)


def _bert(prefix: str, head: str) -> Architecture:
    return Architecture(prefix=prefix, head=head)


def _rows(types: str, row: Architecture) -> Iterable[tuple[str, Architecture]]:
    return ((model_type, row) for model_type in types.split())


#: ``model_type`` → row. A type that is absent is taken to load each tensor under its own name.
ARCHITECTURES: dict[str, Architecture] = dict(
    [
        # Decoders of one tensor a module; Phi-3's and GLM's fused matrices are modules.
        *_rows(
            "llama mistral ministral qwen2 qwen3 gemma gemma2 gemma3_text phi phi3 olmo olmo2 olmo3 cohere cohere2 granite starcoder2 "
            "stablelm smollm3 glm glm4 helium nemotron exaone4 seed_oss ernie4_5 opt",
            _DECODER,
        ),
        *_rows("gpt_neo gptj bloom falcon codegen mpt gpt_bigcode", _TRANSFORMER),
        *_rows("gpt2 openai-gpt", replace(_TRANSFORMER, conv1d=_CONV1D)),
        ("gpt_neox", Architecture(prefix="gpt_neox", renames=((r"^embed_out\.", "lm_head."),))),
        # Mixtures of experts.
        *_rows("mixtral minimax", _MIXTRAL),
        ("phimoe", replace(_MIXTRAL, renames=(*_MIXTRAL.renames, (r"\.gate\.weight$", ".router.weight")))),
        *_rows("qwen2_moe qwen3_moe qwen3_next deepseek_v2 deepseek_v3 olmoe dots1 glm4_moe hunyuan_v1_moe", _MOE),
        ("ernie4_5_moe", replace(_MOE, renames=((r"mlp\.moe_statics\.", "mlp.gate.moe_statics."),))),
        ("jamba", replace(_MOE, stacks=())),
        ("lfm2_moe", Architecture(prefix="model", experts=_W1_W3)),
        *_rows("granitemoe granitemoeshared", _GRANITE_MOE),
        *_rows("gpt_oss llama4_text", Architecture(prefix="model", stacks=_STACKS_IN_OUT)),
        # Encoders, and encoders with decoders.
        ("bert", _bert("bert", "cls.predictions.decoder")),
        ("ernie", _bert("ernie", "cls.predictions.decoder")),
        *_rows("roberta camembert xlm-roberta", _bert("roberta", "lm_head.decoder")),
        ("electra", _bert("electra", "generator_lm_head")),
        ("albert", _bert("albert", "predictions.decoder")),
        ("distilbert", _bert("distilbert", "vocab_projector")),
        ("mpnet", _bert("mpnet", "lm_head.decoder")),
        ("modernbert", _bert("model", "decoder")),
        (
            "nomic_bert",
            Architecture(
                renames=(
                    (r"encoder\.layers", "layers"),
                    (r"attn\.out_proj", "self_attn.o_proj"),
                    (r"fc11", "up_proj"),
                    (r"fc12", "gate_proj"),
                    (r"fc2", "down_proj"),
                    (r"attn\.Wqkv", "self_attn.Wqkv"),
                ),
                prefix="nomic_bert",
                blocks=(Blocks("self_attn.Wqkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),),
                head="cls.predictions.decoder",
            ),
        ),
        *_rows("t5 mt5 bart mbart", Architecture()),
        ("whisper", Architecture(head="proj_out")),
        # Vision.
        ("vit", Architecture(renames=_VIT_RENAMES, prefix="vit")),
        ("deit", Architecture(renames=_VIT_RENAMES, prefix="deit")),
        (
            "dinov2",
            Architecture(
                renames=(
                    (r"attention\.attention\.query", "attention.q_proj"),
                    (r"attention\.attention\.key", "attention.k_proj"),
                    (r"attention\.attention\.value", "attention.v_proj"),
                    (r"attention\.output\.dense", "attention.o_proj"),
                    (r"mlp\.weights_out", "mlp.down_proj"),
                ),
                prefix="dinov2",
                blocks=(Blocks("mlp.weights_in", ("mlp.gate_proj", "mlp.up_proj")),),
            ),
        ),
        *_rows("siglip_vision_model clip_vision_model", Architecture(renames=((r"^vision_model\.", ""),))),
        *_rows("siglip clip", Architecture()),
        # Vision and language.
        *_rows("llava llava_next llava_onevision vipllava paligemma gemma3 mistral3 internvl aya_vision", _LLAVA),
        *_rows("qwen2_vl qwen2_5_vl qwen3_vl", _QWEN_VL),
        (
            "mllama",
            Architecture(
                renames=(
                    (r"^language_model\.lm_head\.", "lm_head."),
                    (r"^language_model\.model\.", "model.language_model."),
                    (r"^(vision_model|multi_modal_projector)\.", r"model.\1."),
                ),
                prefix="model",
            ),
        ),
        (
            "llama4",
            Architecture(
                parts=(("text_config", "language_model"), ("vision_config", "vision_model")), head="language_model.lm_head"
            ),
        ),
    ]
)
