"""How long the command line takes to begin, and short commands to end, beside an empty Python and ``import torch``.

    python -m benchmarks.startup [--repeat N] [--folder FOLDER]

Every verb's ``--help``; then ls, info, verify, plan and compare on SmolLM2-135M, its bank of rank 16 and two adapters, made in FOLDER
the first time. ``--training`` instead: ``train`` up to the text, which it refuses for being too short, and ``eval`` of some words, beside
a plain script that imports and loads the same. All commands run once a round, one after another, so that a busy moment meets all of them;
medians over the rounds, of seconds and of the processor's. Prints a table and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from svdbank_cli.main import VERBS

EMPTY, TORCH = "python -c pass", "python -c 'import torch'"
COMMANDS = {
    EMPTY: [sys.executable, "-c", "pass"],
    TORCH: [sys.executable, "-c", "import torch"],
}


def svdbank(*arguments: str) -> list[str]:
    """The command line with these arguments."""
    return [sys.executable, "-m", "svdbank_cli.main", *arguments]


def prepared(folder: Path) -> dict[str, list[str]]:
    """Short commands on a real model. Its bank and adapters are made where they are not in ``folder`` yet."""
    import svdbank as library
    from svdbank.lm.packaged import smollm2_folder

    model = smollm2_folder()
    bank = folder / "banks" / "smollm2" / "r16-both-float32"
    if not (bank / "manifest.json").exists():
        library.build(model, bank, rank=16)
    adapters = [folder / name for name in ("law", "medicine")]
    for seed, adapter in enumerate(adapters):
        if not adapter.exists():
            library.init(bank, output=adapter, rank=8)
            _trained(adapter, seed)
    return {
        "svdbank ls": svdbank("ls"),
        "svdbank info": svdbank("info", str(bank)),
        "svdbank verify": svdbank("verify", str(bank)),
        "svdbank plan": svdbank("plan", str(model), "--rank", "16", "-o", str(folder / "planned")),
        "svdbank compare": svdbank("compare", *map(str, adapters)),
    }


#: What ``train`` needs before it reads a text, and what ``eval`` needs, by hand.
PLAIN = """
import sys, torch, transformers, datasets, peft
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Trainer
AutoConfig.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1])
"""
PLAIN_EVAL = """
import sys, torch, transformers, datasets
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
tokens = tokenizer("Permission is hereby granted", return_tensors="pt")["input_ids"]
with torch.inference_mode():
    model(input_ids=tokens, labels=tokens)
"""
PLAIN_TRAIN, PLAIN_LOAD = "by hand: Trainer, PEFT, tokenizer", "by hand: model, a forward"


def training(folder: Path) -> dict[str, list[str]]:
    """``train`` up to its text and ``eval``, each after the plain script that it is compared with."""
    from svdbank.lm.packaged import smollm2_folder

    folder.mkdir(parents=True, exist_ok=True)
    model, words = str(smollm2_folder()), folder / "words.jsonl"
    words.write_text('{"text": "Permission is hereby granted"}\n')
    given = ["--data", str(words), "--length", "64"]
    return {
        PLAIN_TRAIN: [sys.executable, "-c", PLAIN, model],
        "svdbank train, up to the text": svdbank("train", model, "-o", str(folder / "none"), "--method", "lora", *given),
        PLAIN_LOAD: [sys.executable, "-c", PLAIN_EVAL, model],
        "svdbank eval": svdbank("eval", model, *given),
    }


def _trained(adapter: Path, seed: int) -> None:
    """Give a fresh adapter an A that is not zero, as training would."""
    import torch
    from safetensors.torch import load_file, save_file

    path = adapter / "adapter_model.safetensors"
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(tensor.shape, generator=generator) / 100 if "lora_A" in name else tensor
        for name, tensor in load_file(path).items()
    }
    save_file(tensors, path, metadata={"format": "pt"})


def measure(
    commands: dict[str, list[str]], *, repeat: int, environment: dict[str, str]
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of each run of each command, and seconds of the processor; a round that nobody counts comes first."""
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    processor: dict[str, list[float]] = {name: [] for name in commands}
    for turn in range(repeat + 1):
        for name, command in commands.items():
            begun, spent = time.perf_counter(), _processor()
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            # What is up to the text ends where the text is refused.
            if done.returncode and "too little text" not in done.stderr:
                raise SystemExit(done.stderr)
            if turn:
                seconds[name].append(time.perf_counter() - begun)
                processor[name].append(_processor() - spent)
    return seconds, processor


def _processor() -> float:
    """Seconds of the processor of all commands so far."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    from svdbank.cache import home

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=home() / "benchmarks" / "startup", help="bank and adapters")
    parser.add_argument("--short", action="store_true", help="the short commands alone, without every verb's --help")
    parser.add_argument("--training", action="store_true", help="train and eval beside plain scripts, and nothing else")
    options = parser.parse_args()
    folder = options.folder.absolute()
    helps = {"svdbank --help": svdbank("--help")} | {f"svdbank {verb} --help": svdbank(verb, "--help") for verb in VERBS}
    commands = training(folder) if options.training else COMMANDS | ({} if options.short else helps) | prepared(folder)
    # What ls lists is the one bank made here.
    environment = os.environ | {"SVDBANK_HOME": str(folder)}
    seconds, processor = measure(commands, repeat=options.repeat, environment=environment)
    middle = {name: median(taken) for name, taken in seconds.items()}
    spent = {name: median(taken) for name, taken in processor.items()}
    if options.training:
        print(f"median of {options.repeat} rounds\n\n{'':36}{'s':>8}{'processor s':>13}{'min':>8}")
        for name in seconds:
            print(f"{name:36}{middle[name]:8.2f}{spent[name]:13.2f}{min(processor[name]):8.2f}")
        figures = {"benchmark": "startup of training", "seconds": middle, "processor_seconds": spent}
        print(json.dumps(figures | {"repeat": options.repeat, "cpus": os.cpu_count()}))
        return
    print(f"median of {options.repeat} rounds; x: times an empty Python; + torch: seconds above import torch\n")
    print(f"{'':26}{'s':>8}{'min':>8}{'max':>8}{'x':>8}{'+ torch':>9}")
    for name, taken in seconds.items():
        ratio, above = middle[name] / middle[EMPTY], middle[name] - middle[TORCH]
        print(f"{name:26}{middle[name]:8.3f}{min(taken):8.3f}{max(taken):8.3f}{ratio:8.1f}{above:9.2f}")
    print(json.dumps({"benchmark": "startup", "repeat": options.repeat, "cpus": os.cpu_count(), "seconds": middle}))


if __name__ == "__main__":
    main()
