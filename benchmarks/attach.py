"""Attaching MiCA from a bank against PEFT's own initialisation, on SmolLM2-135M (210 linear weights).

As library calls in one process, with the time split; and process against process, imports included: building a whole bank (rank 128,
both sides) against a script that only runs PEFT's initialisation at rank 16.

    python -m benchmarks.attach [--repeat N] [--threads N] [--skip-processes]

Prints a table and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

RANK = 16
BANK_RANK = 128

PEFT_SCRIPT = """
import sys, torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
get_peft_model(model, LoraConfig(r=16, lora_alpha=16, init_lora_weights="mica", target_modules="all-linear"))
"""


def library_calls(folder: Path, bank: Any, *, repeat: int) -> dict[str, Any]:
    """Seconds of PEFT's MiCA, PEFT's plain LoRA (no decomposition: the floor of module surgery) and the bank, on one model."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    from svdbank.peft import attachment, get_peft_model

    def config(init: bool | str) -> Any:
        return peft.LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights=init, target_modules="all-linear")

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    times: dict[str, list[float]] = {"lookup": [], "peft_plain_lora": [], "peft_mica": []}
    splits: list[dict[str, float]] = []
    for _ in range(repeat):
        begun = time.perf_counter()
        wrapped = get_peft_model(model, config("mica"), bank=bank)
        times["lookup"].append(time.perf_counter() - begun)
        splits.append(attachment(wrapped).seconds)
        model = wrapped.unload()
        begun = time.perf_counter()
        wrapped = peft.get_peft_model(model, config(True))
        times["peft_plain_lora"].append(time.perf_counter() - begun)
        model = wrapped.unload()
    begun = time.perf_counter()
    peft.get_peft_model(model, config("mica"))
    times["peft_mica"].append(time.perf_counter() - begun)
    middle = {name: median(values) for name, values in times.items()}
    return {
        "seconds": middle,
        "first_lookup_seconds": times["lookup"][0],
        "split_seconds": {step: median(split[step] for split in splits) for step in splits[0]},
        "times_faster": middle["peft_mica"] / middle["lookup"],
        "first_times_faster": middle["peft_mica"] / times["lookup"][0],
    }


def processes(folder: Path, place: Path) -> dict[str, float]:
    """Wall seconds of two processes, from start to exit."""
    svdbank = Path(sys.executable).with_name("svdbank")
    build = [str(svdbank), "build", str(folder), "-o", str(place / "bank"), "--rank", str(BANK_RANK), "--side", "both", "-q"]
    return {"svdbank_build": _wall(build), "peft_mica": _wall([sys.executable, "-c", PEFT_SCRIPT, str(folder)])}


def _wall(command: list[str]) -> float:
    begun = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - begun


def measure(*, repeat: int = 5, with_processes: bool = True) -> dict[str, Any]:
    """All figures, with what they were measured on."""
    import peft
    import torch

    import svdbank
    from svdbank.demonstration import smollm2_folder

    folder = smollm2_folder()
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        load = os.getloadavg()[0]
        both = processes(folder, place) if with_processes else None
        bank = svdbank.open(place / "bank") if both else svdbank.build(folder, place / "bank", rank=BANK_RANK)
        calls = library_calls(folder, bank, repeat=repeat)
    return {
        "model": folder.name,
        "weights": len(bank),
        "rank": RANK,
        "library": calls,
        "processes": both,
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load_at_start": load,
            "torch": torch.__version__,
            "peft": peft.__version__,
        },
    }


def table(figures: dict[str, Any]) -> str:
    """The figures for people."""
    calls = figures["library"]
    rows = [
        ("attach from the bank, median", calls["seconds"]["lookup"]),
        ("  of it " + ", ".join(calls["split_seconds"]), None),
        *((f"    {step}", seconds) for step, seconds in calls["split_seconds"].items()),
        ("attach from the bank, first call in the process", calls["first_lookup_seconds"]),
        ("PEFT plain LoRA, no decomposition", calls["seconds"]["peft_plain_lora"]),
        ("PEFT mica", calls["seconds"]["peft_mica"]),
    ]
    if figures["processes"]:
        rows += [
            (f"process: svdbank build, rank {BANK_RANK}, both sides", figures["processes"]["svdbank_build"]),
            (f"process: PEFT mica, rank {RANK}", figures["processes"]["peft_mica"]),
        ]
    lines = [f"{figures['model']}, {figures['weights']} weights, rank {RANK}"]
    lines += [f"{name:<52}" + ("" if seconds is None else f"{seconds:9.3f} s") for name, seconds in rows]
    lines.append(
        f"{calls['times_faster']:.0f} times faster than PEFT, {calls['first_times_faster']:.0f} times in the first call"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5, help="attachments to take the median of")
    parser.add_argument("--threads", type=int, help="OpenMP threads of everything; one is fairer to PEFT on a busy machine")
    parser.add_argument("--skip-processes", action="store_true", help="library calls only")
    options = parser.parse_args()
    if options.threads:
        os.environ["OMP_NUM_THREADS"] = str(options.threads)  # read when torch is first imported, here and in the processes
    figures = measure(repeat=options.repeat, with_processes=not options.skip_processes)
    print(table(figures))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
