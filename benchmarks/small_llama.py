"""A small Llama trained here on code and medical text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks import domains

VOCABULARY = 2048
STEPS = 600
LENGTH = 128
BATCH = 16


def trained(folder: Path) -> Path:
    """The model's folder: 4 layers of width 128, float32, its own byte-level BPE. Made once: some minutes on a core."""
    import transformers

    place = folder / "small-llama"
    if (place / "model.safetensors").is_file():
        return place
    texts = [text[:4000] for domain in ("code", "medical") for text in domains.DOMAINS[domain]()]
    tokenizer = _tokenizer(texts)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=0,
        )
    )
    stream = torch.tensor([token for ids in tokenizer(texts)["input_ids"] for token in [*ids, 0]])
    blocks = stream[: len(stream) // LENGTH * LENGTH].view(-1, LENGTH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=STEPS, pct_start=0.1)
    order = torch.randint(len(blocks), (STEPS, BATCH), generator=torch.Generator().manual_seed(0))
    for chosen in order:
        rows = blocks[chosen]
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def _tokenizer(texts: list[str]) -> Any:
    import tokenizers
    import transformers

    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<end>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")
