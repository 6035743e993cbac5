"""``svdbank fuse`` against a plain copy of the same files, and against PEFT and mergekit doing the same merge, in one run.

Each way is a process of its own, imports included; "work" is the time without imports. The error is that of the change in the files
against the one intended, ‖(W' − W) − ΔW‖ / ‖ΔW‖ over all adapted weights.

    python -m benchmarks.fusion [--model FOLDER] [--repeat N] [--mergekit PATH] [--json]

"recorded" is the same LoRA as svdbank writes it, with the hash of each weight that it belongs to, so that ``fuse`` hashes the base as well.
"of the copy" is the median over the rounds of work divided by the work of that round's copy, which ends with an fsync of every file as
``fuse`` does; the copy without fsync shows what of it is the disk.

The model is SmolLM2-135M-Instruct as the demo makes it, the adapter a rank-16 LoRA on every linear weight. mergekit is no dependency:
install it apart (``python -m venv mk && mk/bin/pip install mergekit==0.1.5``) and name its command: ``--mergekit mk/bin/mergekit-yaml``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

RANK = 16

COPY_ALONE = """
import os, shutil, sys, time
from pathlib import Path
begun = time.perf_counter()
target = Path(sys.argv[3])
target.mkdir()
for file in Path(sys.argv[1]).iterdir():
    shutil.copyfile(file, target / file.name)
"""

COPY = """
import os, shutil, sys, time
from pathlib import Path
begun = time.perf_counter()
target = Path(sys.argv[3])
target.mkdir()
for file in Path(sys.argv[1]).iterdir():
    shutil.copyfile(file, target / file.name)
    descriptor = os.open(target / file.name, os.O_RDONLY)
    os.fsync(descriptor)
"""

FUSE = """
import sys, time
import svdbank
svdbank.fuse
begun = time.perf_counter()
svdbank.fuse(sys.argv[1], sys.argv[2], sys.argv[3])
"""

PEFT = """
import os, sys, time
import torch, transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
AutoModelForCausalLM.from_pretrained
begun = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
model = PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload()
model.save_pretrained(sys.argv[3])
AutoTokenizer.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[3])
for name in os.listdir(sys.argv[3]):
    os.fsync(os.open(os.path.join(sys.argv[3], name), os.O_RDONLY))
"""

ENDING = """
work = time.perf_counter() - begun
import json, re
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024
print(json.dumps({"work": work, "peak_mib": peak}))
"""


def make_adapter(model: Path, folder: Path) -> None:
    """A LoRA of PEFT's own making on every linear weight, its ΔW about 1 % of the weights."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", init_lora_weights=False)
    wrapped = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.mul_(0.1)
    wrapped.save_pretrained(folder)


def record_base(model: Path, adapter: Path, folder: Path) -> None:
    """The adapter as svdbank writes it, with the hash of every weight of the base that it changes."""
    from svdbank.adapter.reading import read_adapter
    from svdbank.adapter.weights import BaseWeight
    from svdbank.adapter.writing import write_adapter
    from svdbank.checkpoint.source import open_checkpoint
    from svdbank.fusion.matching import match_weights

    opened = read_adapter(adapter)
    with open_checkpoint(model) as checkpoint:
        pairs = zip(opened.weights, match_weights(opened, checkpoint, other=False), strict=True)
        weights = {
            key: replace(weight, source=BaseWeight(spec.name, checkpoint.read_hashed(spec)[1])) for key, (spec, weight) in pairs
        }
    write_adapter(replace(opened, weights=weights), folder)


def run(command: list[str], output: Path) -> dict[str, float]:
    """One process from start to end; what it printed last, and its seconds."""
    shutil.rmtree(output, ignore_errors=True)
    os.sync()
    begun = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.perf_counter() - begun
    if done.returncode:
        raise SystemExit(f"{command[0]} failed:\n{done.stderr[-3000:]}")
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
    return {"process": seconds} | (json.loads(last) if last.startswith("{") else {})


def mergekit_command(program: str, folder: Path, model: Path, adapter: Path, output: Path) -> list[str]:
    """The same merge as mergekit does it: the LoRA merged by its loader, the result copied through."""
    cache = folder / "mergekit-cache"
    recipe = {"merge_method": "passthrough", "models": [{"model": f"{model}+{adapter}"}], "dtype": "bfloat16"}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return [program, str(folder / "recipe.yaml"), str(output), "--lora-merge-cache", str(cache), "--copy-tokenizer", "--quiet"]


def error_of(model: Path, adapter: Path, output: Path) -> float:
    """‖(W' − W) − ΔW‖ / ‖ΔW‖ over the adapted weights, with ΔW in float64."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    factors = load_file(adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    fused = {name: tensor for file in output.glob("*.safetensors") for name, tensor in load_file(file).items()}
    lost = intended = 0.0
    with safe_open(model / "model.safetensors", framework="pt") as base:
        for key in factors:
            if not key.endswith("lora_A.weight"):
                continue
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight") + ".weight"
            delta = (
                factors[key.replace("lora_A", "lora_B")].double() @ factors[key].double() * (config["lora_alpha"] / config["r"])
            )
            realised = fused[name].double() - base.get_tensor(name).double()
            lost += float((realised - delta).square().sum())
            intended += float(delta.square().sum())
    return float((lost / intended) ** 0.5)


def measure(model: Path, *, repeat: int, mergekit: str | None) -> dict[str, Any]:
    nbytes = (model / "model.safetensors").stat().st_size
    rows: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        adapter, output = folder / "adapter", folder / "output"
        make_adapter(model, adapter)
        record_base(model, adapter, folder / "recorded")
        programs = {
            "copy without fsync": (COPY_ALONE, adapter),
            "plain copy": (COPY, adapter),
            "svdbank fuse": (FUSE, adapter),
            "svdbank fuse, recorded": (FUSE, folder / "recorded"),
            "PEFT merge_and_unload": (PEFT, adapter),
        }
        commands = {
            way: [sys.executable, "-c", program + ENDING, str(model), str(lora), str(output)]
            for way, (program, lora) in programs.items()
        }
        if mergekit is not None:
            commands["mergekit"] = mergekit_command(mergekit, folder, model, adapter, output)
        for _ in range(repeat):
            for way, command in commands.items():
                shutil.rmtree(folder / "mergekit-cache", ignore_errors=True)
                row = rows.setdefault(way, {})
                for key, value in run(command, output).items():
                    row.setdefault(key, []).append(value)
                if "copy" not in way and "error" not in row:
                    row["error"] = [error_of(model, adapter, output)]
    for row in rows.values():
        if "work" in row:
            row["of_copy"] = [own / copy for own, copy in zip(row["work"], rows["plain copy"]["work"], strict=True)]
    ways = {way: {key: median(values) for key, values in row.items()} for way, row in rows.items()}
    return {"bytes": nbytes, "repeat": repeat, "machine": platform.machine(), "cpus": os.cpu_count(), "ways": ways}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a checkpoint with one model.safetensors")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--mergekit", default=shutil.which("mergekit-yaml"), metavar="PATH")
    parser.add_argument("--json", action="store_true", help="the JSON line alone")
    options = parser.parse_args()
    model = options.model
    if model is None:
        from svdbank.cache import home
        from svdbank.lm.packaged import smollm2_folder

        model = smollm2_folder(home() / "models")
    result = measure(model, repeat=options.repeat, mergekit=options.mergekit)
    if not options.json:
        megabytes = result["bytes"] / 1e6
        print(f"{model.name}, {megabytes:.0f} MB, LoRA r {RANK} on every linear weight; median of {options.repeat}\n")
        print(f"{'':24}{'process s':>10}{'work s':>9}{'work MB/s':>11}{'of the copy':>13}{'peak MiB':>10}{'error of ΔW':>13}")
        for way, row in result["ways"].items():
            work = row.get("work", row["process"])
            figures = f"{row['process']:10.2f}{work:9.2f}{megabytes / work:11.0f}"
            figures += f"{row['of_copy']:13.2f}" if "of_copy" in row else f"{'':>13}"
            peak = f"{row['peak_mib']:10.0f}" if "peak_mib" in row else f"{'':>10}"
            print(f"{way:24}{figures}{peak}" + (f"{row['error']:13.2%}" if "error" in row else ""))
        if options.mergekit is None:
            print("\nmergekit is not installed, so it is not in this table; --help says how to name it")
        print()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
