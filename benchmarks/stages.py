"""Where the seconds of a short ``svdbank train`` go, from the start of its process to its end.

    python -m benchmarks.stages [--device cuda|cpu] [--steps N] [--json FILE] [--quick] [--folder FOLDER]

A Llama of 30 layers of width 576 with random weights (``--quick``: 2 layers of 64), words at random, ``--method lora`` and no rate given,
as a process of its own, twice: what a machine does the first time (a GPU's kernels, a disk's cache) is in the first alone. The stages are
those of ``training.json``; ``outside`` is what lies before and after them: the interpreter, the imports that reading options takes,
writing the adapter, the process's end. Prints a table and, with ``--json``, writes the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WORDS = [f"w{number}" for number in range(4000)]


def prepared(folder: Path, *, quick: bool) -> tuple[Path, Path]:
    """(model, text), made in ``folder``."""
    import torch
    import transformers

    from tests.lm.models import word_tokenizer, write_jsonl

    width, layers = (64, 2) if quick else (576, 30)
    torch.manual_seed(0)
    model, generator = folder / "model", random.Random(0)
    transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=len(WORDS) + 4,
            hidden_size=width,
            intermediate_size=8 * width // 3,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            num_key_value_heads=width // 64,
            max_position_embeddings=2048,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    ).save_pretrained(model)
    word_tokenizer(WORDS, model)
    texts = [" ".join(generator.choices(WORDS, k=1500)) for _ in range(60)]
    return model, write_jsonl(folder / "text.jsonl", texts)


def run(model: Path, text: Path, output: Path, environment: dict[str, str], given: list[str]) -> dict[str, Any]:
    """Seconds of one command by stage, ``outside`` them and ``whole``; of a step; the device's name stands in its own figures."""
    shutil.rmtree(output, ignore_errors=True)
    command = ["train", str(model), "-o", str(output), "--data", str(text), "--method", "lora", "--keep", "last", *given]
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "svdbank_cli.main", *command, "--json"], capture_output=True, text=True, env=environment
    )
    whole = time.perf_counter() - begun
    if done.returncode not in (0, 5):
        raise SystemExit(done.stderr)
    report = json.loads(done.stdout.splitlines()[-1])
    stages = report["stages"]
    return {
        "stages": stages | {"outside": whole - sum(stages.values())},
        "whole": whole,
        **{name: report[name] for name in ("steps", "step_seconds", "dtype", "calibration_share", "measuring_share")},
    }


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown: seconds by stage, first and second run."""
    lines = ["| stage | first, s | second, s |", "| --- | --- | --- |"]
    lines += [f"| {stage} | " + " | ".join(f"{own['stages'][stage]:.2f}" for own in runs) + " |" for stage in runs[0]["stages"]]
    lines.append("| whole command | " + " | ".join(f"{own['whole']:.2f}" for own in runs) + " |")
    lines.append("| a step | " + " | ".join(f"{own['step_seconds']:.3f}" for own in runs) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="a tiny model and short blocks")
    parser.add_argument("--folder", type=Path, help="model, text and caches; a temporary one by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).absolute()
        model, text = prepared(folder, quick=options.quick)
        caches = {"SVDBANK_HOME": str(folder / "home"), "HF_DATASETS_CACHE": str(folder / "datasets"), "HF_HUB_OFFLINE": "1"}
        environment = os.environ | caches | ({"CUDA_VISIBLE_DEVICES": ""} if options.device == "cpu" else {})
        given = ["--steps", str(options.steps), *(["--length", "64"] if options.quick else [])]
        runs = [run(model, text, folder / "adapter", environment, given) for _ in range(2)]
    print(table(runs))
    if options.json is not None:
        options.json.write_text(json.dumps({"benchmark": "stages", "device": options.device, "runs": runs}, indent=2) + "\n")


if __name__ == "__main__":
    main()
