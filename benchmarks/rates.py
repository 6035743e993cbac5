"""Rates that ``svdbank train`` finds by itself against six fixed ones, for every method, on models of several families.

    python -m benchmarks.rates --json FILE [--only smollm2,…] [--methods mica,…] [--rates 1e-3,…,found] [--seeds 0,1,2] [--folder FOLDER]

Every run is ``svdbank.train`` with 40 steps on blocks of 128 tokens of licence texts, and what it measured on text held out from training
after its last step. Each run's figures are in the file as soon as it ends, and a run that is there is not repeated, so the script can be
stopped at any moment. ``found`` stands for no rate given. Prints a table of the file; with ``--table`` that alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import domains, small_llama

METHODS = ("mica", "milora", "pissa", "lora")
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
FOUND = "found"
RECIPE: dict[str, Any] = {
    "rank": 16,
    "length": 128,
    "steps": 40,
    "log_steps": 1,
    "held_out_blocks": 24,
    "save_minutes": None,
}


def smollm2(folder: Path) -> Path:
    """SmolLM2-135M as its package ships it."""
    from svdbank.lm.packaged import smollm2_folder

    return smollm2_folder()


def gemma(folder: Path) -> Path:
    """The small Gemma-3 of the tests: other norms, a sliding window, and a BOS that it depends on."""
    from tests.lm.gemma import gemma_folder

    return gemma_folder()


def llama(factor: float) -> Callable[[Path], Path]:
    """The small Llama with its norm gains written larger by a factor, and the weights after them smaller."""

    def make(folder: Path) -> Path:
        from tests.lm.models import rewritten

        return rewritten(small_llama.trained(folder), folder / f"small-llama-{factor:g}", factor)

    return make


#: Where a case's model comes from, and the blocks of a step.
CASES: dict[str, tuple[Callable[[Path], Path], int]] = {
    "smollm2": (smollm2, 1),
    "gemma": (gemma, 2),
    "llama": (llama(1), 2),
    "llama-x10": (llama(10), 2),
    "llama-x0.1": (llama(0.1), 2),
}


def run(model: Path, data: Path, method: str, rate: float | None, seed: int, batch: int, folder: Path) -> dict[str, Any]:
    """One training and what it measured. A run that ended in no number has no ``change``."""
    import svdbank
    from svdbank.training.ending import TrainingError

    output = folder / f"adapter-{os.getpid()}"
    for place in (output, output.with_name(f"{output.name}.checkpoints")):
        shutil.rmtree(place, ignore_errors=True)
    begun, processor = time.time(), time.process_time()
    try:
        report = svdbank.train(
            model, output=output, data=str(data), method=method, learning_rate=rate, seed=seed, batch_size=batch, **RECIPE
        )
    except TrainingError as error:
        return {"failed": str(error), "seconds": time.time() - begun}
    shutil.rmtree(output, ignore_errors=True)
    last, held_out = report.measured[-1], report.held_out
    assert held_out is not None
    found = report.calibration
    return {
        "learning_rate": report.learning_rate,
        "before": held_out.before,
        "change": last.change,
        "change_error": last.change_error,
        "kept": report.kept,
        "curve": [round(loss, 4) for _, loss in report.curve],
        **(
            {}
            if found is None
            else {"limit": found.limit, "calibration": found.curve, "calibration_share": report.calibration_share}
        ),
        "measuring_share": report.measuring_share,
        "notices": report.notices,
        "seconds": time.time() - begun,
        "processor_seconds": time.process_time() - processor,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: the change of the loss at each rate, at the rate found, and its share of the best fixed one's."""
    lines = ["| model | method | " + " | ".join(f"{rate:g}" for rate in RATES) + " | found | change | share of the best |"]
    lines.append("| --- " * (len(RATES) + 5) + "|")
    for case in CASES:
        for method in METHODS:
            own = {row["rate"]: row for row in rows if (row["case"], row["method"], row["seed"]) == (case, method, 0)}
            fixed = {rate: own[rate].get("change", float("nan")) for rate in RATES if rate in own}
            cells = [f"{fixed[rate]:+.3f}" if rate in fixed else "" for rate in RATES]
            found = own.get(FOUND, {})
            if fixed and "change" in found:
                best = min(value for value in fixed.values() if value == value)
                cells += [f"{found['learning_rate']:.2g}", f"{found['change']:+.3f}", f"{found['change'] / best:.0%}"]
            else:
                cells += ["", "", ""]
            if own:
                lines.append(f"| {case} | {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


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
    parser.add_argument("--folder", type=Path, default=cache.home() / "benchmarks" / "rates", help="models and texts")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = json.loads(options.json.read_text()) if options.json.is_file() else []
    if options.table:
        print(table(rows))
        return
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    text = domains.write(folder / "texts")["legal"]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    for case in options.only.split(","):
        make, batch = CASES[case]
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
                    figures = run(model, text, method, None if rate == FOUND else float(rate), seed, batch, folder)
                    rows.append({**key, **figures, "commit": commit, "load": os.getloadavg()[0]})
                    new = options.json.with_suffix(".new")
                    new.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
                    new.replace(options.json)
                    said = {name: value for name, value in figures.items() if name in ("learning_rate", "change", "failed")}
                    print(key, said, f"{figures['seconds']:.0f} s", file=sys.stderr, flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
