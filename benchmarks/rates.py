"""Rates that ``svdbank train`` finds by itself against six fixed ones, for every method, on models of several families.

    python -m benchmarks.rates --json FILE [--only smollm2,…] [--methods mica,…] [--rates 1e-3,…,found] [--seeds 0,1,2]

Every run is ``svdbank.train`` with ``--steps 40`` on blocks of 128 tokens, two at a time, and what it measured on text held out from
training after the last step. Each run's figures are in the file as soon as it ends, and a run that is there is not repeated, so the script
can be stopped at any moment. ``found`` stands for no rate given. Prints a table.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import domains

METHODS = ("mica", "milora", "pissa", "lora")
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
FOUND = "found"
RECIPE: dict[str, Any] = {
    "rank": 16,
    "length": 128,
    "batch_size": 2,
    "steps": 40,
    "log_steps": 1,
    "held_out_blocks": 24,
    "save_minutes": None,
}


def smollm2(folder: Path) -> Path:
    from svdbank.lm.packaged import smollm2_folder

    return smollm2_folder()


#: Where a case's model comes from, and its domain.
CASES = {"smollm2": (smollm2, "legal")}


def run(model: Path, data: Path, method: str, rate: float | None, seed: int, folder: Path) -> dict[str, Any]:
    """One training and what it measured. A run that ended in no number has no ``after``."""
    import svdbank
    from svdbank.training.loop import TrainingError

    output = folder / "adapter"
    shutil.rmtree(output, ignore_errors=True)
    shutil.rmtree(output.with_name("adapter.checkpoints"), ignore_errors=True)
    begun, cpu = time.time(), time.process_time()
    try:
        report = svdbank.train(model, output=output, data=str(data), method=method, learning_rate=rate, seed=seed, **RECIPE)
    except TrainingError as error:
        return {"failed": str(error), "seconds": time.time() - begun, "cpu_seconds": time.process_time() - cpu}
    held_out = report.held_out
    assert held_out is not None
    figures = {
        name: getattr(held_out, name) for name in ("before", "before_error", "after", "after_error", "change", "change_error")
    }
    return {
        **figures,
        "curve": [round(loss, 4) for _, loss in report.curve],
        "seconds": time.time() - begun,
        "cpu_seconds": time.process_time() - cpu,
        "step_seconds": report.step_seconds,
    }


def main() -> None:
    import svdbank
    from svdbank import cache
    from svdbank.core.errors import BankNotFoundError

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--only", default=",".join(CASES))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--rates", default=",".join([*map(str, RATES), FOUND]))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--folder", type=Path, default=cache.home() / "benchmarks" / "rates")
    options = parser.parse_args()
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    texts = domains.write(folder / "texts")
    rows: list[dict[str, Any]] = json.loads(options.json.read_text()) if options.json.is_file() else []
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    for case in options.only.split(","):
        make, domain = CASES[case]
        model = make(folder)
        try:
            svdbank.open(model)
        except BankNotFoundError:
            svdbank.build(model, rank=32, principal=32)
        for seed in map(int, options.seeds.split(",")):
            for rate in (rate if rate == FOUND else float(rate) for rate in options.rates.split(",")):
                for method in options.methods.split(","):
                    key = {"case": case, "method": method, "rate": rate, "seed": seed}
                    if any(key.items() <= row.items() for row in rows):
                        continue
                    figures = run(model, texts[domain], method, None if rate == FOUND else float(rate), seed, folder)
                    rows.append({**key, **figures, "commit": commit, "load": os.getloadavg()[0]})
                    new = options.json.with_suffix(".new")
                    new.write_text(json.dumps(rows, indent=1))
                    new.replace(options.json)
                    print(
                        key,
                        {n: v for n, v in figures.items() if n in ("change", "seconds", "failed")},
                        file=sys.stderr,
                        flush=True,
                    )


if __name__ == "__main__":
    main()
