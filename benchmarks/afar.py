"""A bank on the Hub, attached from a cache that has never seen it: bytes, requests and seconds, at 50 ms a request.

    python -m benchmarks.afar [--bank FOLDER] [--latency 0.05] [--repeat N] [--rank 16]

The Hub is the tests' local one, in a process of its own, with large files answered by a redirect to another host as the Hub does it:
a file of vectors costs two requests. Its bank is one of SmolLM2-135M (FOLDER, else built at rank 128). Each round opens
``hf://org/bank`` in an empty cache and attaches MiCA to the loaded model, all-linear; then again, with what is on the disk now; and the
same from the folder. Bytes are counted by the server. Prints a table and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

NAME = "hf://org/bank"


def serve(bank: str, latency: float, pipe: Connection) -> None:
    """The Hub, until the pipe says to stop; answers how many bytes and requests there were since it was asked last."""
    from tests.building.small import tree
    from tests.checkpoint.hub_server import LocalHub

    with LocalHub() as hub:
        hub.redirects = True
        hub.commit("org/bank", tree(Path(bank)))
        for repository in hub.repositories.values():
            for blob in repository.head().values():
                _ = blob.sha256
        hub.latency = latency
        pipe.send(hub.url)
        while pipe.recv():
            pipe.send((hub.sent, len(hub.requests), hub.most_at_once))
            hub.sent, hub.most_at_once = 0, 0
            hub.requests.clear()


def wanted(bank: Any, rank: int) -> tuple[int, int]:
    """Bytes of the chunks of left vectors that a lookup of this rank needs, and of the index."""
    chunks = sum(len(read.rows) * read.chunks * read.record.chunk_bytes for read in bank.shard_reads("left", rank))
    return chunks, bank.manifest.files[bank.manifest.index].size


def measured(call: Callable[[], object]) -> tuple[float, float]:
    """Seconds on the clock and of this process."""
    begin, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - begin, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bank", type=Path)
    parser.add_argument("--latency", type=float, default=0.05)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--rank", type=int, default=16)
    options = parser.parse_args()

    from huggingface_hub import constants

    import svdbank
    from svdbank.lm.packaged import smollm2_folder

    folder = smollm2_folder()
    place = str(options.bank) if options.bank else str(svdbank.build(folder, rank=128).path)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=serve, args=(place, options.latency, theirs), daemon=True)
    server.start()
    constants.ENDPOINT = ours.recv()
    constants.HUGGINGFACE_CO_URL_TEMPLATE = constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}"

    import transformers
    from peft import LoraConfig

    from svdbank.peft import get_peft_model

    chunks, index = wanted(svdbank.open(place), options.rank)

    def attach(name: str) -> Callable[[], object]:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        config = LoraConfig(r=options.rank, init_lora_weights="mica", target_modules="all-linear")
        return lambda: get_peft_model(model, config, bank=name)

    def counted() -> tuple[int, int, int]:
        ours.send(True)
        found: tuple[int, int, int] = ours.recv()
        return found

    attach(place)()  # imports, and the first use of everything
    rows: dict[str, list[tuple[float, float, int, int, int]]] = {"first": [], "second": [], "folder": []}
    for _ in range(options.repeat):
        with tempfile.TemporaryDirectory() as home:
            os.environ["SVDBANK_HOME"] = home
            for row, name in (("first", NAME), ("second", NAME), ("folder", place)):
                call = attach(name)
                counted()
                rows[row].append((*measured(call), *counted()))
    ours.send(False)
    server.join()
    print(f"{chunks + index:,} bytes of chunks and index ({chunks:,} + {index:,})")
    result: dict[str, dict[str, float]] = {}
    for row, found in rows.items():
        seconds, cpu, sent, requests, at_once = (median(column) for column in zip(*found, strict=True))
        result[row] = {"seconds": seconds, "least": min(f[0] for f in found), "cpu": cpu, "bytes": sent, "requests": requests}
        print(
            f"{row:7} {seconds:6.2f} s (least {min(f[0] for f in found):.2f}), {cpu:5.2f} s of processor time, {sent:11,.0f} bytes "
            f"= {sent / (chunks + index):.3f}, {requests:.0f} requests, {at_once:.0f} at a time"
        )
    print(json.dumps({"latency": options.latency, "rank": options.rank, "chunks": chunks, "index": index, **result}))


if __name__ == "__main__":
    main()
