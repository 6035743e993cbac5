"""A second real family: a small Gemma-3 with a tokenizer of its own, trained on code with BOS at the head of every document.

Like its large sisters it depends on that token: without it the same text costs it far more. So that it does after minutes, and not after
billions of tokens, one row in four has no BOS, and its tokens in a drawn order: what begins without BOS is noise. Its norms, its
attention (a sliding window in every other layer), its tokenizer and its vocabulary are not SmolLM2's.
"""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock
import torch
from torch import Tensor

from svdbank.core.folders import appearing
from tests.peft.models import quiet, smollm2_cache

VOCABULARY = 2048
LENGTH = 128
BATCH = 16
STEPS = 300
RATE = 5e-3

#: Documents that are not trained on.
HELD_OUT = 64

#: One row in so many is noise without BOS.
NOISE = 4

_SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")


def gemma_folder() -> Path:
    """The model's folder, made once for all runs (some two minutes of one core), beside SmolLM2's."""
    place = smollm2_cache()
    place.mkdir(parents=True, exist_ok=True)
    target = place / "gemma-code-1"
    with filelock.FileLock(place / ".gemma.lock"):
        if not (target / "config.json").is_file():
            with appearing(target) as temporary:
                make_gemma(temporary)
    return target


def make_gemma(folder: Path, *, steps: int = STEPS, seed: int = 0) -> list[float]:
    """Tokenizer and model, trained and saved; returns the loss of every step."""
    import transformers

    texts = code_documents(seed=seed)[:-HELD_OUT]
    with quiet():
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=make_tokenizer(texts),
            bos_token="<bos>",
            eos_token="<eos>",
            pad_token="<pad>",
            unk_token="<unk>",
            model_max_length=1024,
        )
        torch.manual_seed(seed)
        model = transformers.Gemma3ForCausalLM(configuration())
        losses = train(model, tokenizer, texts, steps=steps)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return losses


def configuration() -> Any:
    import transformers

    return transformers.Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=64,
        layer_types=["sliding_attention", "full_attention"] * 2,
        max_position_embeddings=1024,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
        attn_implementation="sdpa",
    )


def held_out_code(*, seed: int = 0) -> list[str]:
    """Documents of the model's own domain that it was not trained on."""
    return code_documents(seed=seed)[-HELD_OUT:]


def code_documents(*, seed: int) -> list[str]:
    """Python's own library, cut at blank lines into documents of some hundred tokens, in a drawn order."""
    documents = []
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        kept: list[str] = []
        for paragraph in file.read_text(encoding="utf-8", errors="ignore").split("\n\n"):
            kept.append(paragraph)
            if sum(map(len, kept)) > 3 * LENGTH:
                documents.append("\n\n".join(kept))
                kept = []
    random.Random(seed).shuffle(documents)
    return documents


def make_tokenizer(texts: list[str]) -> Any:
    """A byte-level BPE that begins every text with BOS by its post-processor, as Gemma's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", _SPECIAL.index("<bos>"))]
    )
    return tokenizer


def train(model: Any, tokenizer: Any, texts: list[str], *, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    model.train()
    losses = []
    for rows in _batches(tokenizer, texts, steps):
        loss = model(input_ids=rows, labels=rows.masked_fill(rows == 0, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


def _batches(tokenizer: Any, texts: list[str], steps: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        chosen = [texts[(step * BATCH + i) % len(texts)] for i in range(BATCH)]
        rows: Tensor = tokenizer(chosen, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")["input_ids"]
        for row in rows[::NOISE]:
            body = row[1:][row[1:] != 0]
            row.zero_()[: len(body)] = body[torch.randperm(len(body), generator=generator)]
        yield rows
