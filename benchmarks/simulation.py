"""How near the simulated schedule comes to real builds of one and of two workers, on this machine's own rates.

    python -m benchmarks.simulation [--rates FILE] [--pairs N] [--pause SECONDS] [--json FILE]

Measures the rates (a minute), simulates SmolLM2-135M and a model of mixed shapes, then builds both, one worker and two in turn, each worker
a process of one thread that does what the workers of ``build`` do. Start-up is left out of both sides: what is timed is from the moment
when all workers stand ready until the last record, and the publish. Medians over the pairs; exit 1 where one is farther off than 10 %
(SmolLM2) or 15 % (mixed). Nothing else should be running. Prints a table and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.checkpoints import scratch

#: How far a prediction may be off.
LIMITS = {"SmolLM2-135M": 0.10, "mixed shapes": 0.15}

#: (out, in) of the linears of a layer, and how many layers have them: small ones beside large, wide and tall ones.
MIXED = {
    "self_attn.q_proj": ((2048, 2048), 2),
    "self_attn.k_proj": ((512, 2048), 8),
    "self_attn.v_proj": ((512, 2048), 8),
    "self_attn.o_proj": ((1024, 1024), 8),
    "mlp.gate_proj": ((1536, 768), 12),
    "mlp.up_proj": ((5632, 2048), 1),
    "mlp.down_proj": ((768, 3072), 12),
}

_WORKER = """
import pickle, sys, time
import torch
from svdbank.building.joining import finished, joined, work_through
from svdbank.building.shares import Share
from svdbank.core.specs import ignore_progress
from svdbank.solver import minor_basis, pinned_threads
request, index, count = pickle.loads(bytes.fromhex(sys.argv[1]))
with pinned_threads(1):
    minor_basis(torch.randn(64, 96), 8)
with joined(request, device="cpu", join=True, on_cpu=True, progress=ignore_progress) as here:
    print("ready", flush=True)
    sys.stdin.readline()
    work_through(here, Share(index, count), device=torch.device("cpu"), request=request, progress=ignore_progress)
    print(time.time(), flush=True)
    sys.stdin.readline()
    begun = time.perf_counter()
    finished(here.prepared, progress=ignore_progress)
    print(time.perf_counter() - begun, flush=True)
"""


def mixed(folder: Path) -> Path:
    """A checkpoint of :data:`MIXED`, with spectra like those of trained weights."""
    from safetensors.torch import save_file

    from benchmarks.solver_cases import llm_like

    folder.mkdir(parents=True)
    tensors = {
        f"model.layers.{layer}.{linear}.weight": llm_like(*shape, seed=layer)
        for linear, (shape, layers) in MIXED.items()
        for layer in range(layers)
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    return folder


def request(model: Path, bank: Path) -> Any:
    """What each worker is asked for: one thread, one weight at a time."""
    from svdbank.building.request import build_request

    return build_request(model, bank, rank=128, device="cpu", jobs=1, threads=1)


def built(model: Path, bank: Path, workers: int) -> dict[str, float]:
    """Seconds of the work and of the publish of a fresh bank, by so many processes."""
    shutil.rmtree(bank, ignore_errors=True)
    crew = []
    for index in range(workers):
        order = pickle.dumps((request(model, bank), index, workers)).hex()
        process = subprocess.Popen(
            [sys.executable, "-c", _WORKER, order], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        crew.append(process)
    for process in crew:
        _said(process)
    begun = time.time()
    for process in crew:
        _tell(process)
    # Whoever made the last record sees at once that all is done; the others look every half second.
    work = min(float(_said(process)) for process in crew) - begun
    published = []
    for process in crew:
        _tell(process)
        published.append(float(_said(process)))
        if process.wait():
            raise SystemExit(f"a worker ended with {process.returncode}")
    return {"work": work, "publish": published[0], "seconds": work + published[0]}


def _said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"a worker ended with {process.wait()}")
    return line


def _tell(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


def main() -> int:
    import svdbank
    from svdbank.lm.packaged import smollm2_folder

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=Path, help="a file of svdbank env --rates; measured now where there is none")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--pause", type=float, default=0.0, help="seconds between builds, for whoever else is at work")
    parser.add_argument("--place", type=Path, help="folder for the banks and the mixed model, on the disk that is meant")
    parser.add_argument("--json", type=Path, help="also write the results there")
    parser.add_argument("--only", choices=list(LIMITS), help="one of the models")
    options = parser.parse_args()
    rows, worst = [], 0
    with scratch(options.place or Path.cwd(), 2 << 30) as folder:
        rates = options.rates or folder / "rates.json"
        if not rates.exists():
            svdbank.env(rates=rates, device="cpu")
        models = {"SmolLM2-135M": smollm2_folder(), "mixed shapes": mixed(folder / "mixed")}
        for name, model in models.items():
            if options.only not in (None, name):
                continue
            bank = folder / f"{model.name}.bank"
            planned = {
                workers: svdbank.plan(model, bank, device="cpu", workers=workers, threads=1, device_rate=rates)
                for workers in (1, 2)
            }
            runs: dict[int, list[dict[str, float]]] = {1: [], 2: []}
            for _ in range(options.pairs):
                for workers, taken in runs.items():
                    time.sleep(options.pause)
                    taken.append(built(model, bank, workers))
                    print(f"{name}, {workers} workers: {taken[-1]['seconds']:.2f} s", file=sys.stderr, flush=True)
            for workers, taken in runs.items():
                schedule = planned[workers].schedule
                assert schedule is not None
                predicted = {"work": schedule.asked.work, "publish": schedule.asked.publish}
                predicted["seconds"] = sum(predicted.values())
                middle = {part: median(run[part] for run in taken) for part in predicted}
                off = predicted["seconds"] / middle["seconds"] - 1
                worst |= abs(off) > LIMITS[name]
                shapes = {cost.family: cost.basis for cost in schedule.solves}
                row = {"model": name, "workers": workers, "predicted": predicted, "measured": middle, "off": off}
                rows.append(row | {"limit": LIMITS[name], "runs": taken, "shapes": shapes})
        known = json.loads(rates.read_text())
    print(f"\n{'':16}{'workers':>8}{'predicted':>11}{'measured':>10}{'off':>8}{'limit':>8}")
    for row in rows:
        seconds = row["predicted"]["seconds"], row["measured"]["seconds"]
        print(f"{row['model']:16}{row['workers']:8}{seconds[0]:11.2f}{seconds[1]:10.2f}{row['off']:+8.1%}{row['limit']:8.0%}")
    result = {"benchmark": "simulation", "cpus": os.cpu_count(), "pairs": options.pairs, "rows": rows, "rates": known}
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1))
    print(json.dumps(result))
    return int(worst)


if __name__ == "__main__":
    sys.exit(main())
