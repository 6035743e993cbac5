"""A whole build on a GPU: from files to a published bank, end to end, and where its time goes.

    python -m benchmarks.build --device cuda                an 8B's shapes, 8 layers, 56 weights, rank 128, both sides
    python -m benchmarks.build --device cpu --quick         tiny shapes, some seconds

The checkpoint is written where it lies in memory and read once before anything is timed. Beside it in the same run: what PEFT calls for
one weight of each shape, times their count; and the floor, reading and hashing the same files. Verification comes last.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import checkpoints
from benchmarks import device as devices
from benchmarks.device import Goal, Results, timed, timed_median
from benchmarks.solver_gpu import float32_svd, sine

#: Bytes of weights a second that a build is to take.
TARGET = 1.2e9
PEFT_RANK = 16
#: Bytes that a thread of the floor reads and hashes at a time.
_PIECE = 1 << 26

Row = dict[str, Any]


def read_and_hash(files: list[Path], threads: int) -> float:
    """Seconds to read the files and take sha256 of them, in pieces, by so many threads."""

    def piece(path: Path, offset: int) -> str:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            return hashlib.sha256(file.read(_PIECE)).hexdigest()

    pieces = [(path, offset) for path in files for offset in range(0, path.stat().st_size, _PIECE)]
    begun = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda at: piece(*at), pieces))
    return time.perf_counter() - begun


def accepted(call: Callable[..., Any], **options: Any) -> dict[str, Any]:
    """Those of ``options`` that are not None and that ``call`` knows."""
    known = inspect.signature(call).parameters
    return {name: value for name, value in options.items() if value is not None and name in known}


def logged(bank: Path) -> Row:
    """What ``build.log.jsonl`` says: summed seconds by event and family, and the facts of its last line."""
    seconds: Counter[str] = Counter()
    last: Row = {}
    for line in (bank / "build.log.jsonl").read_text().splitlines():
        last = json.loads(line)
        for key, value in last.items():
            if key.endswith("seconds") and isinstance(value, (int, float)):
                seconds[" ".join(filter(None, (last["event"], last.get("family"), key)))] += value
    return {
        "log seconds": dict(seconds),
        "log end": {key: value for key, value in last.items() if key not in ("time", "event")},
    }


def sizes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def floors(files: list[Path], results: Results) -> float:
    """The floor by number of threads; the quickest, in seconds."""
    nbytes = sum(path.stat().st_size for path in files)
    cores = os.cpu_count() or 1
    found = []
    for threads in sorted({1, min(2, cores), min(4, cores), min(8, cores), cores}):
        seconds = read_and_hash(files, threads)
        found.append(seconds)
        row = {
            "section": "floor",
            "read and sha256, threads": threads,
            "seconds": seconds,
            "GB a second": nbytes / seconds / 1e9,
        }
        results.add(row)
    return min(found)


def builds(
    folder: Path, place: Path, device: torch.device, options: argparse.Namespace, floor: float, results: Results
) -> float:
    """Build into fresh folders, the last of which stays as ``place/bank``; median seconds."""
    import svdbank

    model = checkpoints.TINY if options.quick else checkpoints.EIGHT_BILLION
    nbytes = model.nbytes(options.layers)
    count = len(model.linears()) * options.layers
    taken = []
    more = accepted(svdbank.build, streams=options.streams) or accepted(svdbank.build, jobs=options.streams)
    for repeat in range(options.repeat):
        root = place / "bank"
        shutil.rmtree(root, ignore_errors=True)
        reports: list[Any] = []
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)

        def build(root: Path = root, reports: list[Any] = reports) -> Any:
            return svdbank.build(
                folder, root, rank=options.rank, side="both", device=options.device, on_report=reports.append, **more
            )

        processors = time.process_time()
        seconds, bank = timed(device, build)
        processors = time.process_time() - processors
        taken.append(seconds)
        report = reports[0]
        written = sizes(root)
        row: Row = {
            "section": "build",
            "run": repeat + 1,
            "weights": len(bank),
            "rank": options.rank,
            "seconds": seconds,
            "GB of weights": nbytes / 1e9,
            "GB of weights a second": nbytes / seconds / 1e9,
            "weights a second": count / seconds,
            "MB of bank": written / 1e6,
            "MB of bank a second": written / seconds / 1e6,
            "times the floor": seconds / floor,
            "CPU seconds": processors,
            "largest residual": report.largest_residual,
            "handed over": len(report.fallbacks),
            "paths": dict(Counter(bank[name].certificate.path for name in bank)),
        }
        if device.type == "cuda":
            row["peak device GB"] = torch.cuda.max_memory_allocated(device) / 1e9
        stages = getattr(report, "stages", None)
        row["stages"] = {name: round(float(value), 4) for name, value in dict(stages).items()} if stages else None
        goal = Goal(
            f"build, {count} weights, run {repeat + 1}",
            f"{seconds:.2f} s",
            "GB of weights a second",
            nbytes / seconds / 1e9,
            TARGET / 1e9,
        )
        results.add(row | logged(root), goal)
        if stages:
            print(
                "\n".join(
                    f"    {name:<12}{value:9.3f} s  {value / seconds:6.2f} of the run" for name, value in row["stages"].items()
                )
            )
        assert len(bank) == count
    return median(taken)


def verified(folder: Path, place: Path, device: torch.device, results: Results) -> None:
    """The bank against the checkpoint."""
    import svdbank

    more = accepted(svdbank.verify, device=str(device))
    seconds, report = timed(device, lambda: svdbank.verify(place / "bank", model=folder, **more))
    row = {
        "section": "verify",
        "seconds": seconds,
        "device": more.get("device", "cpu"),
        "level": report.level,
        "weights": report.weights,
        "sound": report.sound,
        "damage": [f"{damage.file}: {damage.what}" for damage in report.damage[:3]],
    }
    results.add(row, Goal("verify against the files", f"{seconds:.2f} s", "sound", float(report.sound), 1.0))


def rivals(
    folder: Path, place: Path, device: torch.device, options: argparse.Namespace, ours: float | None, results: Results
) -> None:
    """PEFT's call on one weight of each shape, extrapolated to all, and how far its directions lie from the bank's."""
    from safetensors import safe_open

    import svdbank

    bank = svdbank.open(place / "bank")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    model = checkpoints.TINY if options.quick else checkpoints.EIGHT_BILLION
    shapes = Counter(model.linears().values())
    total = 0.0
    for shape, count in shapes.items():
        name = next(f"model.layers.0.{linear}.weight" for linear, other in model.linears().items() if other == shape)
        with safe_open(folder / index[name], "pt") as file:
            weight = file.get_tensor(name).to(device)
        seconds, left = timed_median(device, lambda w=weight: float32_svd(w, options.rank), 1)
        total += seconds * count * options.layers
        row: Row = {
            "section": "rival",
            "weight": f"{shape[0]}×{shape[1]}",
            "svd fp32 seconds": seconds,
            "of them": count * options.layers,
        }
        for rank in (PEFT_RANK, options.rank):
            row[f"svd fp32 sin r={rank} to the bank"] = sine(left[:, -rank:], bank[name].left(rank).to(device))
        results.add(row)
    row = {"section": "rival", "svd fp32 seconds, extrapolated to all": total}
    if ours is not None:
        row["times faster than PEFT's calls"] = total / ours
    results.add(row)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cuda:1, cpu …")
    parser.add_argument("--layers", type=int, help="8, or 2 with --quick")
    parser.add_argument("--rank", type=int, help="128, or 32 with --quick")
    parser.add_argument("--place", type=Path, metavar="DIR", help="where checkpoint and bank are written; by default in memory")
    parser.add_argument("--streams", type=int, help="weights solved at a time; by default what a build takes")
    parser.add_argument("--repeat", type=int, default=2, help="builds, each into a fresh folder")
    parser.add_argument("--quick", action="store_true", help="tiny shapes")
    parser.add_argument("--json", type=Path, help="also write the results here")
    options = parser.parse_args()
    options.layers = options.layers or (2 if options.quick else 8)
    options.rank = options.rank or (32 if options.quick else 128)
    device = torch.device(options.device)
    model = checkpoints.TINY if options.quick else checkpoints.EIGHT_BILLION
    facts = devices.environment(device, "build")
    devices.start(device)
    with checkpoints.scratch(options.place, 2 * model.nbytes(options.layers)) as place:
        folder = place / "checkpoint"
        seconds, _ = timed(device, lambda: checkpoints.write(folder, model, options.layers, device))
        facts |= {"place": str(place.parent), "checkpoint written in": f"{seconds:.1f} s"}
        devices.show(facts)
        results = Results(facts, options.json)
        files = sorted(folder.glob("*.safetensors"))
        read_and_hash(files, os.cpu_count() or 1)  # so that it lies in the page cache
        floor, ours = float("nan"), None
        with results.section("floor"):
            floor = floors(files, results)
        with results.section("build"):
            ours = builds(folder, place, device, options, floor, results)
        with results.section("verify"):
            verified(folder, place, device, results)
        with results.section("rival"):
            rivals(folder, place, device, options, ours, results)
    return results.close()


if __name__ == "__main__":
    sys.exit(main())
