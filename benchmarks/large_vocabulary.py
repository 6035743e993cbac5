"""Peak memory and processor time of one step's loss over 262,144 words: whole logits beside pieces of them.

    python -m benchmarks.large_vocabulary [--tokens N] [--hidden N]

A Llama of one layer with LoRA on its attention, float32, one thread, each way in a process of its own; the figure is the most memory that
the process had, less what it had before the step. Prints one line of JSON a way.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

WORDS = 262_144


def step(way: str, tokens: int, hidden: int) -> dict[str, float | str]:
    """One forward and backward pass."""
    import peft
    import torch
    import transformers

    from svdbank.lm.head import head_of

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=WORDS,
        hidden_size=hidden,
        intermediate_size=hidden,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=tokens,
        tie_word_embeddings=True,
    )
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(transformers.LlamaForCausalLM(config), lora)
    ids = torch.randint(0, WORDS, (1, tokens))
    head = head_of(model)
    assert head is not None
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    if way == "whole":
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    else:
        head.take_apart()
        loss = head.loss(model(input_ids=ids, use_cache=False).logits, ids)
    loss.backward()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "way": way,
        "loss": float(loss.detach()),
        "peak_MB": (peak - before) / 1000,
        "processor_seconds": round(time.process_time() - begun, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--way", choices=["whole", "pieces"], help="one alone, in this process")
    options = parser.parse_args()
    if options.way is not None:
        print(json.dumps(step(options.way, options.tokens, options.hidden)))
        return
    for way in ("whole", "pieces"):
        given = ["--tokens", str(options.tokens), "--hidden", str(options.hidden), "--way", way]
        subprocess.run([sys.executable, "-m", "benchmarks.large_vocabulary", *given], check=True)


if __name__ == "__main__":
    main()
