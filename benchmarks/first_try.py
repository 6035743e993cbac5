"""What a first try does: ``svdbank train MODEL -o ADAPTER --data TEXT``, every other option as it is by default, on two models.

    python -m benchmarks.first_try --json FILE [--only smollm2,gemma] [--methods mica,…] [--seeds 0,1,2] [--folder FOLDER]

Licence texts, all methods and seeds, as command lines of one process. A run's figures are in the file as soon as it ends, and what is there
is not run again. SmolLM2 is given ``--length 64 --steps 8`` besides, so that a run is half a minute of one core and not an hour. Prints a
table of the file; with ``--table`` that alone.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import domains
from benchmarks.rates import CASES, METHODS
from svdbank_cli.main import run as cli

#: What is given besides, and how many of the documents there are to train on.
SHORT: dict[str, tuple[list[str], int]] = {"smollm2": (["--length", "64", "--steps", "8"], 500), "gemma": ([], 40)}


def run(model: Path, data: Path, method: str, seed: int, besides: list[str], output: Path) -> dict[str, Any]:
    """Figures of one command. Exit code 5 is one of a run that did harm, and is recorded as any other."""
    begun, processor, said = time.time(), time.process_time(), io.StringIO()
    for place in (output, output.with_name(f"{output.name}.checkpoints")):
        shutil.rmtree(place, ignore_errors=True)
    command = ["train", str(model), "-o", str(output), "--data", str(data), *besides]
    with contextlib.redirect_stdout(said):
        code = cli([*command, "--method", method, "--seed", str(seed), "--json"])
    if code not in (0, 5):
        raise SystemExit(code)
    report = json.loads(said.getvalue().splitlines()[-1])
    kept = ("learning_rate", "steps", "tokens", "kept", "kept_step", "held_out", "measuring_share", "calibration_share")
    return {
        "exit": code,
        **{name: report[name] for name in (*kept, "calibration", "notices", "stages")},
        "seconds": time.time() - begun,
        "processor_seconds": time.process_time() - processor,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: rate found and change of the loss held out with its error, by model, method and seed."""
    seeds = sorted({row["seed"] for row in rows})
    lines = ["| model | method | " + " | ".join(f"seed {seed}" for seed in seeds) + " |", "| --- " * (len(seeds) + 2) + "|"]
    for case in SHORT:
        for method in METHODS:
            own = {row["seed"]: row for row in rows if (row["case"], row["method"]) == (case, method)}
            cells = [_cell(own[seed]) if seed in own else "not run" for seed in seeds]
            if own:
                lines.append(f"| {case} | {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(row: dict[str, Any]) -> str:
    change = row["held_out"]
    return f"{row['learning_rate']:.2g}: {change['change']:+.3f} ± {change['change_error']:.3f}"


def main() -> None:
    import svdbank
    from svdbank import cache
    from svdbank.core.errors import BankNotFoundError

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--only", default=",".join(SHORT))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--folder", type=Path, default=cache.home() / "benchmarks" / "rates", help="models and texts")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = json.loads(options.json.read_text()) if options.json.is_file() else []
    if options.table:
        print(table(rows))
        return
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    for case in options.only.split(","):
        besides, documents = SHORT[case]
        text = domains.write(options.folder / f"texts-{documents}", documents=documents)["legal"]
        model = CASES[case][0](options.folder)
        try:
            svdbank.open(model)
        except BankNotFoundError:
            svdbank.build(model, rank=32, principal=32)
        for seed in map(int, options.seeds.split(",")):
            for method in options.methods.split(","):
                key = {"case": case, "method": method, "seed": seed}
                if any(key.items() <= row.items() for row in rows):
                    continue
                figures = run(model, text, method, seed, besides, options.folder / f"first-{os.getpid()}")
                rows.append({**key, "besides": besides, **figures, "commit": commit, "load": os.getloadavg()[0]})
                new = options.json.with_suffix(".new")
                new.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
                new.replace(options.json)
                print(key, _cell(rows[-1]), f"{figures['seconds']:.0f} s", file=sys.stderr, flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
