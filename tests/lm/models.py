"""A small real language model: the first two layers of SmolLM2 with the first 4096 tokens of its vocabulary, and real texts for it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file

#: Tokens kept. A byte-level BPE numbers its tokens in the order of its merges, so a prefix of the vocabulary is a tokenizer.
VOCABULARY = 4096


def cut_smollm2(source: Path, folder: Path, *, layers: int = 2) -> Path:
    """SmolLM2 cut to its first layers and tokens, as an ordinary model folder (bfloat16)."""
    kept = {}
    with safe_open(source / "model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            layer = re.match(r"model\.layers\.(\d+)\.", name)
            if layer is None or int(layer[1]) < layers:
                tensor = file.get_tensor(name)
                kept[name] = tensor[:VOCABULARY].clone() if "embed_tokens" in name else tensor
    config = json.loads((source / "config.json").read_text())
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers, "vocab_size": VOCABULARY}))
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    cut_tokenizer(source, folder)
    return folder


def cut_tokenizer(source: Path, folder: Path) -> None:
    """The tokenizer with the first tokens and the merges that make them."""
    document = json.loads((source / "tokenizer.json").read_text())
    model = document["model"]
    model["vocab"] = {token: index for token, index in model["vocab"].items() if index < VOCABULARY}
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    model["merges"] = [pair for pair in pairs if "".join(pair) in model["vocab"]]
    document["added_tokens"] = [token for token in document["added_tokens"] if token["id"] < VOCABULARY]
    (folder / "tokenizer.json").write_text(json.dumps(document))
    shutil.copy(source / "tokenizer_config.json", folder)


def write_jsonl(path: Path, texts: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def word_tokenizer(words: Sequence[str], folder: Path) -> None:
    """A tokenizer of whole words, for models whose vocabulary is a hundred tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    numbers = {word: i for i, word in enumerate(dict.fromkeys([*special.values(), *words]))}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


#: Linears whose input is what a norm gives, by the norm.
_AFTER = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


def rewritten(model: Path, folder: Path, factor: float) -> Path:
    """A Llama that computes the same, in float32: gains of norms before linears times ``factor``, those linears' weights divided by it."""
    tensors = {name: tensor.float() for name, tensor in load_file(model / "model.safetensors").items()}
    for name in tensors:
        norm = re.fullmatch(r"(model\.layers\.\d+)\.(\w+layernorm)\.weight", name)
        if norm is None:
            continue
        tensors[name] = tensors[name] * factor
        for linear in _AFTER[norm[2]]:
            tensors[f"{norm[1]}.{linear}.weight"] = tensors[f"{norm[1]}.{linear}.weight"] / factor
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for file in model.iterdir():
        if file.name != "model.safetensors":
            shutil.copy(file, folder)
    return folder
