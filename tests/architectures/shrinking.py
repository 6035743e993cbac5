"""A small configuration of any model type, by the kind of each field: no type is known here by name.

The defaults of the configuration class are walked, those of its parts too, and each number becomes small by what its name says that it
counts: widths 32, feed-forward widths 48, 4 heads of 8, as few layers as show every kind of layer. Equal widths stay equal, whatever part
they stand in, so what has to fit together fits. Relations that the defaults keep (``heads · head_dim = 2 · hidden``, sections of a rotary
embedding that add up to half a head) are kept.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

HIDDEN, FEED_FORWARD, EXPERT_FEED_FORWARD, HEADS, HEAD_DIM, VOCABULARY, POSITIONS = 32, 48, 24, 4, 8, 120, 64
#: Sides of an image and of its patches: four by four of them.
IMAGE, PATCH = 16, 4

#: What a number counts, by its name, and the most of it; the first that matches decides. 0: not a size, it stays.
_KINDS: tuple[tuple[str, int], ...] = (
    (r"channel_multiplier|downsample_ratio", 2),
    (r"downsample_(hidden|channel)", HIDDEN),
    (r"rotary_dim$", HEAD_DIM // 2),
    (r"^clip_", 8),
    (r"index_topk|index_kpool|indexer_(budget|compress)", 4),
    # No sizes.
    (r"(^|_)(seed|factor|scale|ratio|eps|period|stride|steps?|interval|buckets|clamp|rate|multiplier|mult|langs|lang)$", 0),
    (r"merge_size|merge_kernel|shuffle|spatial_pool|downsample|upsampl|temporal_|dilation|cca_time", 0),
    (r"(^|_)n_floor$|altup|ngram$|ngram_size$|hc_(count|mult)$|crop|cycles$|insert_layer|n_top$|summary|suppress", 0),
    (r"num_channels|in_channels$|chroma", 3),
    # Layers.
    (
        r"num_global_layers|num_res_blocks|num_residual_layers|lstm_layers|num_mem_blocks|num_dense_layers|first_k_dense|nextn|mtp",
        1,
    ),
    (r"(^|_)(n_layers?|num_layers|layers|num_hidden_layers|depth|num_blocks|num_layers_per_stack)$", 2),
    # Experts.
    (r"shared_experts?$", 2),
    (r"(num|n)_(local_|routed_)?experts$|zero_expert_num", 4),
    (r"per_tok(en)?$|top_?k|moe_k$|top_k_experts", 2),
    (r"(n|num)(_expert)?_group$|n_?groups$|query_groups|o_groups$", 2),
    # Heads.
    (r"linear_num_key_heads|heads_per_ngram|kv_heads$|key_value_heads$", 2),
    (r"(^|_)(n_)?heads?(_per_layer)?$", HEADS),
    # Ranks, states, kernels.
    (r"time_step_rank|dt_rank", 4),
    (r"lora_rank|low_?rank|(^|_)rank$", 16),
    (r"d_state|state_size|d_rel$|rel_extent", 8),
    (r"conv_kernel|d_conv|kernel_size|L_cache|kernel_dim|conv1d_width|conv_states|kernel$", 7),
    # Widths of heads.
    (r"head_?dim|d_head|dim_head|d_kv|kv_channels|head_size", HEAD_DIM),
    # Images and sound.
    (r"image_size|resolution|img_size", IMAGE),
    (r"(^|_)patch_size", PATCH),
    (r"mel_bins|num_filters|feature_size$|feat_size", 16),
    (
        r"num_patches|num_position_embeddings|image_seq_length|mm_tokens_per_image|image_tokens|soft_tokens|query_num|posemb_grid",
        16,
    ),
    (r"query_tokens|n_latents|num_latents|prompt_length|prompt_types|segment_types", 4),
    (r"pos_emb_(height|width)|num_quantizers|num_codebooks|codebook_size|num_embeddings|num_centroids", 16),
    # Positions and windows.
    (r"canvas|index_block_size|index_local|compress_rate|mask_|n_window", 8),
    (r"window|chunk_size|chunk_length|chunksize|attention_chunk|block_size|max_patch_length", 8),
    (r"position|max_seq|seq_len|context_length|max_(source|target)|mem_len|max_.*len|max_distance|_vit_seq", POSITIONS),
    # Words and widths.
    (r"vocab", VOCABULARY),
    (r"(moe|expert|share).*(intermediate|hidden|ffn|dim)", EXPERT_FEED_FORWARD),
    (r"intermediate|ffn|(^|_)ff|d_ff|dff|n_inner|d_inner|feed_forward|mlp_dim|mid_dim", FEED_FORWARD),
    (r"hidden|dim|width|embd|embed|model|size|channels?$|units|pos_feats|ssm|text_", HIDDEN),
)

_NO_NUMBERS = ("id2label", "label2id", "transformers_version", "architectures", "model_type", "dtype")
_TOKEN = re.compile(
    r"token_ids?$|token_index$|(^|_)(start|end|newline|patch|im|eod|unk|mask|pad|bos|eos)_(id|index)$|vocab_offset"
)
_LAYERS = re.compile(r"^(num_hidden_layers|n_layers?|num_layers|num_blocks|depth|encoder_layers|decoder_layers|layers)$")
_OF_LAYERS = re.compile(r"layer|index|idx")
_QUERIES = r"(num_attention_heads|n_heads?|num_heads|attention_heads)$"
_WIDTHS = ("mamba_d_ssm", "hidden_size", "d_model", "n_embd", "embed_dim", "attention_hidden_size")
#: Widths of heads, and how many of them there are.
_HEADS = (
    (r"^(head_dim|kv_channels|attention_head_size|d_kv|d_head|dim_head|attention_head_dim)$", rf"^{_QUERIES}"),
    (r"^mamba_(d_head|head_?dim)$", r"^(mamba_(n|num)_heads|n_mamba_heads)$"),
)

Fields = Mapping[str, Any]


def shrunk(defaults: Fields, *, each_kind: int = 1, wider: int = 1) -> dict[str, Any]:
    """The small values of a configuration's ``to_dict()``, by the rules above.

    ``each_kind`` layers of every kind; widths (of the model, not of heads) ``wider`` times what they are by rule.
    """
    return _Rules(each_kind, wider).fields(defaults, {})


def limit(name: str) -> int:
    """The most that a number of this name may be; 0 where the name says nothing of a size."""
    return next((most for pattern, most in _KINDS if re.search(pattern, name)), 0)


def proportional(parts: list[int], total: int) -> list[int]:
    """Whole numbers in these proportions that add up to ``total``; none is 0 unless there are more of them than that."""
    if total < len(parts):
        return [int(place < total) for place in range(len(parts))]
    small = [max(1, math.floor(part * total / sum(parts))) for part in parts]
    small[-1] = max(1, small[-1] + total - sum(small))
    return small


class _Rules:
    """One walk over a configuration. Numbers of special tokens: equal ones stay equal, different ones different, inside the vocabulary."""

    def __init__(self, each_kind: int, wider: int) -> None:
        self._each_kind = each_kind
        self._wider = wider
        self._tokens: dict[int, int] = {}

    def fields(self, fields: Fields, around: Fields) -> dict[str, Any]:
        """The fields of one part; ``around`` are those of what it is a part of."""
        count = next((fields[name] for name in fields if _LAYERS.search(str(name)) and type(fields[name]) is int), None)
        kept = _layers_to_keep(fields, count, self._each_kind) if count is not None and count > 1 else None
        small = {name: self._field(str(name), value, fields, count, kept) for name, value in fields.items()}
        for name, value in fields.items():
            own = str(name).removeprefix("default_")
            if value is None and own != name and isinstance(fields.get(f"{own}s"), list | tuple):
                small[name] = fields[f"{own}s"][0]
        if fields.get("attention_hidden_size") and fields["attention_hidden_size"] == 2 * (fields.get("hidden_size") or 0):
            small["attention_hidden_size"] = 2 * small["hidden_size"]
        _keep_periods(fields, small, len(kept) if kept else 0)
        _keep_heads(fields, small, around)
        _keep_rotations(small)
        return small

    def _field(self, name: str, value: Any, fields: Fields, count: int | None, kept: list[int] | None) -> Any:
        if name in _NO_NUMBERS:
            return value
        if value is None:
            return self._absent(name, kept)
        if isinstance(value, Mapping):
            if name == "per_layer_config" and kept is not None:
                own = {int(layer): fields_ for layer, fields_ in value.items()}
                return {f"{new:02d}": self._override(own[old], fields) for new, old in enumerate(kept) if old in own}
            return self.fields(value, fields)
        if kept is not None and _LAYERS.search(name) and value == count:
            return len(kept)
        if isinstance(value, list | tuple):
            return self._list(name, list(value), fields, count, kept)
        return self._number(name, value) if type(value) is int else value

    def _absent(self, name: str, kept: list[int] | None) -> Any:
        """What no released model leaves out, though the class does: a word that stands for an image, the layers that attend."""
        if re.search(r"^(image|video)_token_(id|index)$", name):
            return self._number(name, 10**9 + len(name))
        return [len(kept) - 1] if kept and re.search(r"^attn_layer_ind", name) else None

    def _override(self, own: Fields, fields: Fields) -> dict[str, Any]:
        """What one layer has otherwise, in its relation to what the others have."""
        small = self.fields(own, fields)
        for name, value in own.items():
            common = fields.get(name)
            if type(value) is int and type(common) is int and common and limit(name):
                small[name] = max(2, self._field(name, common, fields, None, None) * value // common // 2 * 2)
        return small

    def _number(self, name: str, value: int) -> int:
        if value <= 0:
            return max(value, -2) if "feature_layer" in name else value
        if _TOKEN.search(name):
            if value < VOCABULARY // 2:
                return value
            return self._tokens.setdefault(value, VOCABULARY // 2 + len(self._tokens) % (VOCABULARY // 2))
        most = limit(name)
        if most in (HIDDEN, FEED_FORWARD, EXPERT_FEED_FORWARD):
            most *= self._wider
        return min(value, most) if most else value

    def _list(self, name: str, values: list[Any], fields: Fields, count: int | None, kept: list[int] | None) -> list[Any]:
        whole = all(type(value) is int for value in values)
        if kept is not None and len(values) == count:
            values = [values[layer] for layer in kept]
            if _OF_LAYERS.search(name) and whole and set(values) <= set(range(count)):
                return [kept.index(value) if value in kept else min(value, 1) for value in values]
        elif (
            values and whole and _OF_LAYERS.search(name) and not name.endswith(("_ids", "_types"))
        ) or name == "hybrid_layer_ids":
            return _renumbered(values, count, kept)
        elif name == "depths":
            return [1 for _ in values]
        return [self._field(name, value, fields, None, None) for value in values]


def _renumbered(values: list[int], count: int | None, kept: list[int] | None) -> list[int]:
    """Numbers of layers: the kept ones under their new numbers; those of layers elsewhere, within the first two."""
    if kept is None or not all(0 <= value < (count or 0) for value in values):
        return list(dict.fromkeys(max(-2, min(value, 1)) for value in values))
    return [kept.index(value) for value in values if value in kept] or [len(kept) - 1]


def _layers_to_keep(fields: Fields, count: int, each_kind: int) -> list[int]:
    """Numbers of layers such that every kind of layer is there: every value of every list with an entry a layer; at least two."""
    lists = {name: value for name, value in fields.items() if isinstance(value, list | tuple) and len(value) == count}
    chosen = {
        name: set(value)
        for name, value in fields.items()
        if name not in lists and isinstance(value, list | tuple) and _OF_LAYERS.search(str(name)) and value
        if all(type(number) is int and 0 <= number < count for number in value)
    }
    own = {int(layer): repr(value) for layer, value in (fields.get("per_layer_config") or {}).items()}
    seen: dict[tuple[str, str], int] = {}
    kept = []
    for layer in range(count):
        kinds = {(str(name), repr(value[layer])) for name, value in lists.items() if not _numbered(name, value, count)}
        kinds |= {(str(name), str(layer in numbers)) for name, numbers in chosen.items()}
        kinds.add(("per_layer_config", own.get(layer, "")))
        if any(seen.get(kind, 0) < each_kind for kind in kinds):
            kept.append(layer)
            for kind in kinds:
                seen[kind] = seen.get(kind, 0) + 1
    return kept if len(kept) > 1 else [0, 1]


def _numbered(name: str, values: Iterable[Any], count: int) -> bool:
    """Whether a list with an entry a layer says numbers of layers: those make no kinds."""
    return bool(_OF_LAYERS.search(str(name))) and set(map(str, values)) == set(map(str, range(count)))


def _keep_periods(fields: Fields, small: dict[str, Any], layers: int) -> None:
    """Every second layer is of the other kind; offsets inside the period; layers that share are all of them or none."""
    for name, value in fields.items():
        if type(value) is not int:
            continue
        if re.search(r"(period|interval|every_n_layers|pattern|interleave_moe_layer_step|sparse_step|frequency)$", str(name)):
            small[name] = min(value, 2)
        elif re.search(r"_layer_offset$|layer_(end|start)_index$|max_window_layers", str(name)):
            small[name] = min(value, 1)
        elif name == "num_kv_shared_layers":
            small[name] = layers if value == fields.get("num_hidden_layers") else 0


def _keep_heads(fields: Fields, small: dict[str, Any], around: Fields) -> None:
    """Fewer heads of keys where there were fewer; a head's width in its relation to the model's."""
    for name, value in fields.items():
        if type(value) is int and re.search(r"(^|_)(key_value_heads|kv_heads|kv_n_heads)$", str(name)):
            prefix = str(name).partition("num_key_value")[0] if "num_key_value" in str(name) else ""
            queries = _first(fields, f"^{prefix}{_QUERIES}") or _first(around, f"^{prefix}{_QUERIES}")
            if queries:
                small[name] = HEADS if value >= queries else 1 if value == 1 else HEADS // 2
    for own, of in _HEADS:
        heads, few = _first(fields, of), _first(small, of)
        for name, value in fields.items():
            if not heads or not few or type(value) is not int or not re.search(own, str(name)):
                continue
            for width in _WIDTHS:
                if type(fields.get(width)) is int and heads * value / fields[width] in (0.5, 1, 2):
                    small[name] = max(2, int(heads * value / fields[width] * small[width] / few))
                    break
    _keep_sums(fields, small)


def _keep_sums(fields: Fields, small: dict[str, Any]) -> None:
    """A head is its part that rotary embeddings turn and the part that they do not, in some layer; parts add up to a width."""
    layers = [(fields, small)]
    layers += [({**fields, **own}, {**small, **new}) for own, new in zip(_layers_of(fields), _layers_of(small), strict=False)]
    for whole in ("qk_head_dim", "head_dim"):
        for defaults, new in layers:
            parts = [name for name in ("qk_nope_head_dim", "qk_rope_head_dim") if type(defaults.get(name)) is int]
            if len(parts) == 2 and type(fields.get(whole)) is int and fields[whole] == sum(defaults[name] for name in parts):
                small[whole] = sum(new[name] for name in parts)
    if type(fields.get("head_dim")) is int and fields["head_dim"] == fields.get("qk_rope_head_dim"):
        small["head_dim"] = small["qk_rope_head_dim"]
    for name, value in fields.items():
        if (
            isinstance(value, list | tuple)
            and len(value) > 1
            and "dim" in str(name)
            and all(type(part) is int for part in value)
        ):
            width = next((small[own] for own in _WIDTHS if type(fields.get(own)) is int and fields[own] == sum(value)), None)
            if width:
                small[name] = proportional(list(value), width)


def _layers_of(fields: Fields) -> list[Any]:
    own = fields.get("per_layer_config") or {}
    return list({repr(value): value for _, value in sorted(own.items())}.values())


def _first(fields: Fields, pattern: str) -> int | None:
    return next((value for name, value in fields.items() if type(value) is int and re.search(pattern, str(name))), None)


def head_dim(small: Fields) -> int:
    """Width of a head, or of its part that rotary embeddings turn."""
    for name in ("qk_rope_head_dim", "head_dim"):
        if type(small.get(name)) is int and small[name]:
            return int(small[name])
    heads, width = _first(small, f"^{_QUERIES}"), next((small[name] for name in _WIDTHS if type(small.get(name)) is int), None)
    return width // heads if heads and width else HEAD_DIM


def _keep_rotations(small: dict[str, Any]) -> None:
    """Rotary embeddings turn an even number of a head's entries; sections add up to half of them."""
    head = head_dim(small)
    for fields in _rotations(small):
        factor = fields.get("partial_rotary_factor")
        if isinstance(factor, float) and factor and (int(head * factor) < 2 or int(head * factor) % 2):
            fields["partial_rotary_factor"] = factor = 0.5
        turned = int(head * factor) if factor else head
        if fields.get("mrope_section"):
            fields["mrope_section"] = proportional(fields["mrope_section"], turned // 2)
        for name in ("short_factor", "long_factor"):
            if isinstance(fields.get(name), list):
                fields[name] = fields[name][: turned // 2]


def _rotations(small: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The fields themselves and what they say of rotary embeddings, which kinds of layers have of their own."""
    yield small
    for name, value in small.items():
        if isinstance(value, dict) and "rope" in str(name):
            yield value
            yield from (inner for inner in value.values() if isinstance(inner, dict))
