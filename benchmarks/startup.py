"""How long the command line takes to begin, and short commands to end, beside an empty Python and ``import torch``.

    python -m benchmarks.startup [--repeat N] [--folder FOLDER]

Every verb's ``--help``; then ls, info, verify, plan and compare on SmolLM2-135M, its bank of rank 16 and two adapters, made in FOLDER
the first time. All commands run once a round, one after another, so that a busy moment meets all of them; medians over the rounds.
Prints a table and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
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


def measure(commands: dict[str, list[str]], *, repeat: int, environment: dict[str, str]) -> dict[str, list[float]]:
    """Seconds of each run of each command; a round that nobody counts comes first."""
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for turn in range(repeat + 1):
        for name, command in commands.items():
            begun = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True, env=environment)
            if turn:
                seconds[name].append(time.perf_counter() - begun)
    return seconds


def main() -> None:
    from svdbank.cache import home

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=home() / "benchmarks" / "startup", help="bank and adapters")
    parser.add_argument("--short", action="store_true", help="the short commands alone, without every verb's --help")
    options = parser.parse_args()
    folder = options.folder.absolute()
    helps = {"svdbank --help": svdbank("--help")} | {f"svdbank {verb} --help": svdbank(verb, "--help") for verb in VERBS}
    commands = COMMANDS | ({} if options.short else helps) | prepared(folder)
    # What ls lists is the one bank made here.
    environment = os.environ | {"SVDBANK_HOME": str(folder)}
    seconds = measure(commands, repeat=options.repeat, environment=environment)
    middle = {name: median(taken) for name, taken in seconds.items()}
    print(f"median of {options.repeat} rounds; x: times an empty Python; + torch: seconds above import torch\n")
    print(f"{'':26}{'s':>8}{'min':>8}{'max':>8}{'x':>8}{'+ torch':>9}")
    for name, taken in seconds.items():
        ratio, above = middle[name] / middle[EMPTY], middle[name] - middle[TORCH]
        print(f"{name:26}{middle[name]:8.3f}{min(taken):8.3f}{max(taken):8.3f}{ratio:8.1f}{above:9.2f}")
    print(json.dumps({"benchmark": "startup", "repeat": options.repeat, "cpus": os.cpu_count(), "seconds": middle}))


if __name__ == "__main__":
    main()
