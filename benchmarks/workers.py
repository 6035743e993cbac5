"""Several workers at one build beside one: whole runs of the command, bookkeeping a weight with empty solves, and very many weights.

    python -m benchmarks.workers [--only smollm2,experts,empty,many] [--repeat N] [--pause SECONDS] [--weights N] [--folder FOLDER]

- ``smollm2`` (210 weights) and ``experts`` (512 of 768×2048): one worker of one thread, two workers of one thread each (threads of one
  process), one process as ``svdbank build`` runs by default, and two processes of one thread each, in turns, so that a busy moment meets
  all of them; medians over the rounds, of whole processes and of the work without start-up (from the first line of progress to the end).
- ``empty``: solves that return at once. What is left is reading, hashing, claiming, writing and recording, by engine; publishing is in
  ``many``.
- ``many``: ``--weights`` tiny experts (200,000). Seconds and memory of plan, build, publish, open and one lookup; files and bytes.

Prints tables and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.checkpoints import scratch
from benchmarks.device import Goal, table
from benchmarks.sections import add_option

SECTIONS = ("smollm2", "experts", "empty", "many")

#: How the same build is run: options of ``svdbank build``.
ENGINES = {
    "one worker, one thread": ("--threads", "1", "--jobs", "1", "--workers", "1"),
    "two workers, one thread each": ("--threads", "1", "--workers", "2"),
    "one process, as by default": (),
    "two processes, one thread each": ("--threads", "1", "--device", "cpu,cpu"),
}
_EMPTY = "import benchmarks.workers as own; own.empty_solves(); "

#: Two workers that Ray starts; where they run, Ray has them call the function that makes solves empty.
_ON_RAY = ("--threads", "1", "--workers", "2", "--ray")
_EMPTY_ON_RAY = (
    "import functools, ray; "
    "ray.init = functools.partial(ray.init, runtime_env={'worker_process_setup_hook': 'benchmarks.workers.empty_solves'}); "
)


def empty_solves() -> None:
    """Have this process solve each shape once and give that answer ever after."""
    from svdbank.building import solving

    real, known = solving.minor_basis, dict[tuple[int, ...], Any]()

    def remembered(matrix: Any, rank: int, **options: Any) -> Any:
        key = (*matrix.shape, rank)
        if key not in known:
            known[key] = real(matrix, rank, **options)
        return known[key]

    solving.minor_basis = remembered


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_option(parser, SECTIONS)
    parser.add_argument("--repeat", type=int, default=3, help="rounds of each comparison")
    parser.add_argument("--weights", type=int, default=200_000, help="weights of the section many")
    parser.add_argument("--experts", type=int, default=512, help="weights of the section experts")
    parser.add_argument(
        "--pause", type=float, default=0.0, help="seconds between runs that are compared, for whoever else is at work"
    )
    parser.add_argument("--folder", type=Path, help="where to write; by default memory, or the temporary folder")
    options = parser.parse_args()
    found: dict[str, Any] = {"processors": os.cpu_count(), "load": os.getloadavg()}
    goals: list[Goal] = []
    with scratch(options.folder, 6 << 30) as place:
        if "smollm2" in options.only:
            from svdbank.lm.packaged import smollm2_folder

            found["smollm2"] = compared("SmolLM2-135M", smollm2_folder(), place, options, goals)
        if "experts" in options.only:
            model = write_experts(place / "experts", options.experts, 768, 2048)
            found["experts"] = compared(f"{options.experts} experts", model, place, options, goals)
        if "empty" in options.only:
            found["empty"] = {
                "a file each": empty(write_layers(place / "layers", 400, 96, 64), 400, place, options.repeat),
                "4096x4096": empty(write_layers(place / "large", 24, 4096, 4096), 24, place, 1, rank=128),
                "shared files": empty(write_experts(place / "tiny", 40_000, 32, 64, files=4), 40_000, place, options.repeat),
            }
        if "many" in options.only:
            found["many"] = many(place, options.weights)
    if goals:
        print(table(goals))
    print(json.dumps(found))
    return 0


def compared(what: str, model: Path, place: Path, options: argparse.Namespace, goals: list[Goal]) -> dict[str, Any]:
    """Each engine's seconds, whole and without start-up, in turns."""
    taken: dict[str, list[tuple[float, float]]] = {engine: [] for engine in ENGINES}
    for number in range(options.repeat):
        for engine in list(ENGINES)[number % len(ENGINES) :] + list(ENGINES)[: number % len(ENGINES)]:
            time.sleep(options.pause)
            bank = place / "bank"
            taken[engine].append(timed_build(model, bank, *ENGINES[engine]))
            remove(bank)
            whole, work = taken[engine][-1]
            print(f"{what:14} {engine:30} {whole:7.2f} s, {work:7.2f} s of work", flush=True)
    medians = {engine: tuple(median(column) for column in zip(*times, strict=True)) for engine, times in taken.items()}
    one, two, default, processes = (medians[engine] for engine in ENGINES)
    for at, kind in enumerate(("whole run", "without start-up")):
        ours = f"{two[at]:.2f} s"
        goals.append(Goal(f"{what}: two workers, {kind}", ours, f"one of one thread {one[at]:.2f} s", one[at] / two[at], 1.8))
        goals.append(Goal(f"{what}: two workers, {kind}", ours, f"one process {default[at]:.2f} s", default[at] / two[at], 1.0))
        goals.append(
            Goal(f"{what}: two workers, {kind}", ours, f"two processes {processes[at]:.2f} s", processes[at] / two[at], 1.0)
        )
    return {"seconds": taken, "medians": medians}


def timed_build(model: Path, bank: Path, *arguments: str) -> tuple[float, float]:
    """Seconds of ``svdbank build`` as a process, and from its first step of solving to its end."""
    command = [sys.executable, "-m", "svdbank_cli.main", "build", str(model), "-o", str(bank), "--device", "cpu", "--json"]
    begun = time.perf_counter()
    first = None
    with subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if first is None and json.loads(line).get("stage") == "decompose":
                first = time.perf_counter()
    if process.returncode or first is None:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    ended = time.perf_counter()
    return ended - begun, ended - first


def empty(model: Path, count: int, place: Path, repeat: int, rank: int = 16) -> dict[str, float]:
    """Milliseconds a weight of each engine where solves take no time; start-up, and the one real solve of a process, apart."""
    found = {}
    for engine in (*ENGINES, "two processes, --shard", "two workers, --ray"):
        taken = []
        for _ in range(repeat):
            bank = place / "bank"
            taken.append(_empty_build(model, bank, rank, engine, count))
            remove(bank)
        found[engine] = round(1e3 * median(taken), 4)
        print(f"{model.name:10} {engine:30} {found[engine]:8.3f} ms a weight, solves empty", flush=True)
    return found


def _empty_build(model: Path, bank: Path, rank: int, engine: str, count: int) -> float:
    """Seconds a weight from the first shard written to the last but a tenth: the last may wait for a worker who came late."""
    on_ray = engine == "two workers, --ray"
    program = (
        _EMPTY + (_EMPTY_ON_RAY if on_ray else "") + "import svdbank_cli.main as cli, svdbank.building.crew as crew; "
        f"crew._PROGRAM = {_EMPTY!r} + crew._PROGRAM; cli.main()"
    )
    command = [sys.executable, "-c", program, "build", str(model), "-o", str(bank), "--rank", str(rank), "-q"]
    shards = [("--shard", "1/2", "--threads", "1"), ("--shard", "2/2", "--threads", "1")]
    alone = _ON_RAY if on_ray else ENGINES.get(engine)
    processes = [subprocess.Popen((*command, *more)) for more in (shards if alone is None else [alone])]
    for process in processes:
        if process.wait():
            raise RuntimeError(f"a build with empty solves ended with {process.returncode}")
    written = sorted(path.stat().st_mtime for path in bank.glob("*/left/c/**/*") if path.is_file())
    most = len(written) * 9 // 10
    return (written[most] - written[0]) / (count * most / len(written))


#: A step of ``many`` in a process of its own: prints what it found, seconds and the peak of its memory.
_STEP = """
import json, sys, time
from benchmarks.workers import steps
begun = time.perf_counter()
seen = steps[sys.argv[1]](*sys.argv[2:])
import resource
print(json.dumps({"seconds": round(time.perf_counter() - begun, 3),
                  "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024), **(seen or {})}))
"""


def many(place: Path, count: int) -> dict[str, Any]:
    """A model of very many tiny experts, step by step."""
    model, bank = place / "many", place / "bank"
    begun = time.perf_counter()
    write_experts(model, count, 16, 32, files=8)
    found: dict[str, Any] = {"weights": count, "seconds to write the model": round(time.perf_counter() - begun, 1)}
    for step in ("plan", "work", "publish", "open", "lookup"):
        done = subprocess.run(
            [sys.executable, "-c", _STEP, step, str(model), str(bank)], stdout=subprocess.PIPE, text=True, check=True
        )
        found[step] = json.loads(done.stdout.splitlines()[-1])
        print(f"{count} weights: {step:8} {json.dumps(found[step])}", flush=True)
    files = [path for path in bank.rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    found["files"] = len(files)
    found["bytes"] = sum(path.stat().st_size for path in files)
    found["largest file"] = [largest.relative_to(bank).as_posix(), largest.stat().st_size]
    found["index bytes"] = sum(path.stat().st_size for path in bank.glob("index-*.json"))
    print(f"{count} weights: {found['files']} files, {found['bytes'] / 1e6:.0f} MB, index {found['index bytes'] / 1e6:.1f} MB")
    remove(bank)
    return found


def _plan(model: str, bank: str) -> None:
    import svdbank

    svdbank.plan(model, bank, rank=4)


def _request(model: str, bank: str) -> Any:
    from svdbank.building.request import build_request

    return build_request(model, bank, rank=4, device="cpu")


def _work(model: str, bank: str) -> dict[str, Any]:
    """Prepare, and all solves of one worker, real ones; nothing is published."""
    import torch

    from svdbank.building.joining import joined, work_through
    from svdbank.building.shares import Share
    from svdbank.core.specs import ignore_progress

    request, begun = _request(model, bank), time.perf_counter()
    with joined(request, device="cpu", join=False, on_cpu=True, progress=ignore_progress) as here:
        prepared, peak = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        shards = len(here.prepared.plan.shards)
        done = work_through(here, Share(0, 1), device=torch.device("cpu"), request=request, progress=ignore_progress)
    frozen = {path.name[:7]: path.stat().st_size for path in (*Path(bank).glob("plan.json"), *Path(bank).glob("sources-*"))}
    stages = {stage: round(seconds, 1) for stage, seconds in done.stages.items()}
    return {"prepare": round(prepared, 2), "prepare_peak_mb": peak, "shards": shards, "stages": stages, "frozen_bytes": frozen}


def _publish(model: str, bank: str) -> None:
    import svdbank

    svdbank.publish(bank)


def _open(model: str, bank: str) -> dict[str, Any]:
    import svdbank

    return {"opened": len(svdbank.open(bank))}


def _lookup(model: str, bank: str) -> dict[str, Any]:
    import svdbank

    opened = svdbank.open(bank)
    name = list(opened)[len(opened) // 2]
    taken = []
    for _ in range(5):
        begun = time.perf_counter()
        opened[name].left(4)
        taken.append(1e3 * (time.perf_counter() - begun))
    return {"lookup_ms": [round(one, 3) for one in taken]}


steps: dict[str, Callable[[str, str], dict[str, Any] | None]] = {
    "plan": _plan,
    "work": _work,
    "publish": _publish,
    "open": _open,
    "lookup": _lookup,
}


def write_experts(folder: Path, count: int, out_features: int, in_features: int, *, files: int = 1) -> Path:
    """``count`` expert matrices of one role, 128 a layer, of a model that goes by its names; bfloat16 with decaying spectra."""
    names = (f"layers.{number // 128}.mlp.experts.{number % 128}.up.weight" for number in range(count))
    return _write(folder, names, count, out_features, in_features, files, "toy")


def write_layers(folder: Path, count: int, out_features: int, in_features: int) -> Path:
    """``count`` matrices of a Llama's four attention roles, each in a file of its own in the bank."""
    roles = ("q_proj", "k_proj", "v_proj", "o_proj")
    names = (f"model.layers.{number // 4}.self_attn.{roles[number % 4]}.weight" for number in range(count))
    return _write(folder, names, count, out_features, in_features, 1, "llama")


def _write(folder: Path, names: Iterator[str], count: int, out_features: int, in_features: int, files: int, kind: str) -> Path:
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    decay = torch.linspace(1, 0.05, in_features)
    each, index = -(-count // files), {}
    for number in range(files):
        file = f"model-{number + 1:05}-of-{files:05}.safetensors"
        part = [name for _, name in zip(range(min(each, count - number * each)), names, strict=False)]
        values = torch.randn(len(part), out_features, in_features, generator=generator) * decay
        tensors = {name: value.clone() for name, value in zip(part, values.to(torch.bfloat16), strict=True)}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    return folder


def remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
