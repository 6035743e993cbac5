"""Attaching MiCA from a bank against PEFT's own initialisation, all linear weights, rank 16.

On a model of half a billion parameters (the shapes of Qwen2.5-0.5B: 24 layers, 168 weights, d 896, ff 4864, 14 heads, 2 of them for
keys and values; synthetic weights, few tokens) and on SmolLM2-135M (210 weights): as library calls in one process, with the time split.
On SmolLM2 also process against process, imports included: building a whole bank (rank 128, both sides) against a script that only runs
PEFT's initialisation.

    python -m benchmarks.attach [--repeat N] [--threads N] [--only half-billion|smollm2|auto] [--skip-processes]
    python -m benchmarks.attach --device cuda [--repeat N] [--layers N]
    python -m benchmarks.attach --device cpu --quick


``--only auto`` is the first start without a bank anywhere: ``bank="auto"`` on SmolLM2 with an empty cache, and PEFT's own
initialisation, in turns, ``--repeat`` times; in wall time and in processor time, which a busy machine leaves nearly as it is.

With ``--device`` the model has an 8B's shapes instead, four layers of them, 28 weights in bfloat16, and lies on that device, where its
bank is built too. Prints a table and, last, one line of JSON.
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


def half_billion(folder: Path) -> None:
    """Write a checkpoint of Qwen2.5-0.5B's shapes, but for a small vocabulary, in bfloat16; the spectrum is that of ``llm_like``."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    from benchmarks.solver_cases import llm_like

    shape = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
    config = Qwen2Config(vocab_size=1024, num_key_value_heads=2, tie_word_embeddings=True, **shape)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for seed, parameter in enumerate(model.parameters()):
            if parameter.ndim == 2 and parameter.shape[0] > 1:
                parameter.copy_(llm_like(*parameter.shape, seed=seed))
            else:
                parameter.fill_(1.0)
    model.save_pretrained(folder)


def on_half_billion(place: Path, *, repeat: int) -> dict[str, Any]:
    """Library calls on the half-billion model; its bank is built first, at the rank asked for, left vectors only."""
    import svdbank

    half_billion(place / "half-billion")
    begun = time.perf_counter()
    bank = svdbank.build(place / "half-billion", place / "half-billion.bank", rank=RANK, side="left")
    seconds = time.perf_counter() - begun
    calls = library_calls(place / "half-billion", bank, repeat=repeat)
    return {"model": "0.5B-shaped", "weights": len(bank), "library": calls, "build_seconds": seconds, "processes": None}


def on_smollm2(place: Path, *, repeat: int, with_processes: bool) -> dict[str, Any]:
    """Library calls on SmolLM2, and two processes."""
    import svdbank
    from svdbank.lm.packaged import smollm2_folder

    folder = smollm2_folder()
    both = processes(folder, place) if with_processes else None
    bank = svdbank.open(place / "bank") if both else svdbank.build(folder, place / "bank", rank=BANK_RANK)
    calls = library_calls(folder, bank, repeat=repeat)
    return {"model": folder.name, "weights": len(bank), "library": calls, "build_seconds": None, "processes": both}


def without_a_bank(*, repeat: int) -> dict[str, Any]:
    """Wall and processor seconds of a first start and the next with ``bank="auto"``, and of PEFT's own start, in turns; medians."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    from svdbank.lm.packaged import smollm2_folder
    from svdbank.peft import attachment, get_peft_model

    def config() -> Any:
        return peft.LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="mica", target_modules="all-linear")

    folder = smollm2_folder()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    home = os.environ.get("SVDBANK_HOME")
    times: dict[str, list[tuple[float, float]]] = {"peft_mica": [], "auto_first": [], "auto_next": []}
    decomposed = []
    try:
        for _ in range(repeat):
            with tempfile.TemporaryDirectory() as empty:
                os.environ["SVDBANK_HOME"] = empty
                for name in times:
                    begun = time.perf_counter(), time.process_time()
                    if name == "peft_mica":
                        wrapped = peft.get_peft_model(model, config())
                    else:
                        wrapped = get_peft_model(model, config(), bank="auto")
                        decomposed.append(attachment(wrapped).decomposed)
                    times[name].append((time.perf_counter() - begun[0], time.process_time() - begun[1]))
                    model = wrapped.unload()
    finally:
        if home is None:
            del os.environ["SVDBANK_HOME"]
        else:
            os.environ["SVDBANK_HOME"] = home
    wall, processor = ({name: median(pair[which] for pair in pairs) for name, pairs in times.items()} for which in (0, 1))
    return {
        "model": folder.name,
        "decomposed": decomposed,
        "wall_seconds": wall,
        "processor_seconds": processor,
        "first_over_peft": {
            name: took["auto_first"] / took["peft_mica"] for name, took in (("wall", wall), ("processor", processor))
        },
    }


def auto_table(figures: dict[str, Any]) -> str:
    """Those figures for people."""
    labels = {
        "peft_mica": "PEFT mica",
        "auto_first": 'bank="auto", nothing in the cache',
        "auto_next": 'bank="auto", the next start',
    }
    lines = [f"{figures['model']}, no bank anywhere, rank {RANK}{'wall':>20}{'processor':>12}"]
    for name, label in labels.items():
        lines.append(f"{label:<50}{figures['wall_seconds'][name]:8.2f} s{figures['processor_seconds'][name]:10.2f} s")
    ratio = figures["first_over_peft"]
    lines.append(f"{'first start over PEFT':<50}{ratio['wall']:8.2f}  {ratio['processor']:10.2f}")
    return "\n".join(lines)


def measure(*, repeat: int = 5, only: str | None = None, with_processes: bool = True) -> dict[str, Any]:
    """All figures, with what they were measured on."""
    import peft
    import torch

    load = os.getloadavg()[0]
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        if only in (None, "half-billion"):
            found.append(on_half_billion(Path(scratch), repeat=repeat))
        if only in (None, "smollm2"):
            found.append(on_smollm2(Path(scratch), repeat=repeat, with_processes=with_processes))
    auto = without_a_bank(repeat=repeat) if only in (None, "auto") else None
    return {
        "rank": RANK,
        "models": found,
        "auto": auto,
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
    """The figures of one model for people."""
    calls = figures["library"]
    rows = [
        ("attach from the bank, median", calls["seconds"]["lookup"]),
        ("  of it " + ", ".join(calls["split_seconds"]), None),
        *((f"    {step}", seconds) for step, seconds in calls["split_seconds"].items()),
        ("attach from the bank, first call in the process", calls["first_lookup_seconds"]),
        ("PEFT plain LoRA, no decomposition", calls["seconds"]["peft_plain_lora"]),
        ("PEFT mica", calls["seconds"]["peft_mica"]),
    ]
    if figures["build_seconds"]:
        rows.append((f"the bank, built once: rank {RANK}, left side", figures["build_seconds"]))
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
    parser.add_argument("--only", choices=["half-billion", "smollm2", "auto"], help="one of the sections")
    parser.add_argument("--skip-processes", action="store_true", help="library calls only")
    on_device = parser.add_argument_group("a model of an 8B's shapes on a device")
    on_device.add_argument("--device", help="cuda, cuda:1, cpu …")
    on_device.add_argument("--layers", type=int, help="4, or 2 with --quick")
    on_device.add_argument("--quick", action="store_true", help="tiny shapes")
    on_device.add_argument(
        "--place", type=Path, metavar="DIR", help="where checkpoint and bank are written; by default in memory"
    )
    on_device.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args()
    if options.threads:
        os.environ["OMP_NUM_THREADS"] = str(options.threads)  # read when torch is first imported, here and in the processes
    if options.device:
        from benchmarks import attach_gpu

        sys.exit(attach_gpu.measure(options))
    figures = measure(repeat=options.repeat, only=options.only, with_processes=not options.skip_processes)
    shown = [table(model) for model in figures["models"]]
    if figures["auto"] is not None:
        shown.append(auto_table(figures["auto"]))
    print("\n\n".join(shown))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
