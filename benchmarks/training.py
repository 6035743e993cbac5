"""MiCA against LoRA at the same number of trainable parameters and steps, through ``svdbank train``, on SmolLM2-135M.

Sections, each one or more runs of the command in a process of its own:

- ``sweep``: learning rates of both methods on legal text, a third of the steps;
- ``domains``: an adapter for legal, code and medical text by each method, at its best rate of the sweep;
- ``time``: seconds a step and peak memory, the methods in turn. Only a quiet machine gives figures worth keeping.

    python -m benchmarks.training [--only sweep,domains,time] [--folder FOLDER] [--steps N] [--rates mica=RATE,lora=RATE]

Runs that are finished in the folder are not repeated and an unfinished one goes on, so it can be stopped at any moment. The adapters stay
in the folder as ``domains/METHOD-DOMAIN``. Prints tables and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from benchmarks import domains, sections

#: LoRA trains (in + out) numbers a rank where MiCA trains in: on SmolLM2's layers half the rank is the same budget within 2 %.
RANKS = {"mica": 16, "lora": 8}
SWEEP = {"mica": (1e-3, 2e-3, 4e-3), "lora": (5e-4, 1e-3, 2e-3)}
RECIPE = {"length": 128, "batch_size": 1, "held_out_blocks": 24, "log_steps": 5, "save_steps": 10, "seed": 0, "keep": "last"}


def run(model: Path, output: Path, *, method: str, data: Path, steps: int, rate: float) -> dict[str, Any]:
    """One training, unless it is there already with the same options; its figures."""
    wanted = {**RECIPE, "rank": RANKS[method], "method": method, "steps": steps, "learning_rate": rate}
    record = output / "training.toml"
    done = tomllib.loads(record.read_text()) if record.is_file() else {}
    if any(done.get(name) != value for name, value in wanted.items()):
        output.parent.mkdir(parents=True, exist_ok=True)
        command = [str(Path(sys.executable).with_name("svdbank")), "train", str(model), "-o", str(output), "--data", str(data)]
        command += [part for name, value in wanted.items() for part in (f"--{name.replace('_', '-')}", str(value))]
        command += ["--force"] if done else []
        print(" ".join(command), file=sys.stderr, flush=True)
        ended = subprocess.run(command, stdout=subprocess.DEVNULL)
        if ended.returncode not in (0, 5):  # 5: written, and worse than before
            ended.check_returncode()
    found: dict[str, Any] = json.loads((output / "training.json").read_bytes())
    return found


def sweep(model: Path, folder: Path, texts: dict[str, Path], steps: int) -> list[dict[str, Any]]:
    """Held-out loss after a third of the steps, by method and rate."""
    rows = []
    for method, rates in SWEEP.items():
        for rate in rates:
            place = folder / "sweep" / f"{method}-{rate:g}"
            figures = run(model, place, method=method, data=texts["legal"], steps=steps // 3, rate=rate)
            rows.append({"method": method, "rate": rate, **_loss(figures["held_out"])})
    return rows


def best_rate(rows: list[dict[str, Any]], method: str) -> float:
    """The rate with the lowest held-out loss."""
    return float(min((row for row in rows if row["method"] == method), key=lambda row: row["after"])["rate"])


def over_domains(
    model: Path, folder: Path, texts: dict[str, Path], steps: int, rates: dict[str, float]
) -> list[dict[str, Any]]:
    """One adapter a domain and method."""
    rows = []
    for method, rate in rates.items():
        for domain, data in texts.items():
            figures = run(model, folder / "domains" / f"{method}-{domain}", method=method, data=data, steps=steps, rate=rate)
            rows.append(
                {
                    "domain": domain,
                    "method": method,
                    "rate": rate,
                    "trainable_parameters": figures["trainable_parameters"],
                    **_loss(figures["held_out"]),
                }
            )
    return rows


def timed(model: Path, folder: Path, texts: dict[str, Path], steps: int) -> list[dict[str, Any]]:
    """Seconds a step and peak memory, three runs a method in turn."""
    found: dict[str, list[dict[str, Any]]] = {method: [] for method in RANKS}
    for turn in range(3):
        for method in RANKS:
            place = folder / "time" / f"{method}-{turn}"
            found[method].append(run(model, place, method=method, data=texts["legal"], steps=max(6, steps // 6), rate=1e-3))
    rows = []
    for method, runs in found.items():
        seconds = [figures["step_seconds"] for figures in runs]
        rows.append(
            {
                "method": method,
                "rank": RANKS[method],
                "trainable_parameters": runs[0]["trainable_parameters"],
                "step_seconds": fmean(seconds),
                "step_seconds_error": stdev(seconds) / len(seconds) ** 0.5,
                "peak_bytes": max(figures["peak_bytes"] for figures in runs),
            }
        )
    return rows


def _loss(change: dict[str, Any]) -> dict[str, float]:
    return {name: change[name] for name in ("before", "before_error", "after", "after_error", "change", "change_error")}


def tables(figures: dict[str, Any]) -> str:
    """Markdown for docs/benchmarks.md."""
    parts = []
    if rows := figures.get("sweep"):
        parts.append("| method | rate | held-out loss | change |\n| --- | --- | --- | --- |")
        parts[-1] += "".join(f"\n| {r['method']} | {r['rate']:g} | {_plain(r)} | {_signed(r)} |" for r in rows)
    if rows := figures.get("domains"):
        parts.append("| text | method | rate | before | after | change |\n| --- | --- | --- | --- | --- | --- |")
        parts[-1] += "".join(
            f"\n| {r['domain']} | {r['method']} | {r['rate']:g} | {r['before']:.3f} ± {r['before_error']:.3f} | "
            f"{_plain(r)} | {_signed(r)} |"
            for r in rows
        )
    if rows := figures.get("time"):
        parts.append("| method | rank | trainable parameters | seconds a step | peak memory |\n| --- | --- | --- | --- | --- |")
        parts[-1] += "".join(
            f"\n| {r['method']} | {r['rank']} | {r['trainable_parameters']:,} | {r['step_seconds']:.3f} ± {r['step_seconds_error']:.3f} | "
            f"{r['peak_bytes'] / 1e9:.2f} GB |"
            for r in rows
        )
    return "\n\n".join(parts)


def _plain(row: dict[str, float]) -> str:
    return f"{row['after']:.3f} ± {row['after_error']:.3f}"


def _signed(row: dict[str, float]) -> str:
    return f"{row['change']:+.3f} ± {row['change_error']:.3f}"


def main() -> None:
    import svdbank
    from svdbank import cache
    from svdbank.core.errors import BankNotFoundError
    from svdbank.lm.packaged import smollm2_folder

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sections.add_option(parser, ("sweep", "domains", "time"))
    parser.add_argument("--folder", type=Path, default=cache.home() / "benchmarks" / "training", help="runs and adapters")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rates", metavar="mica=RATE,lora=RATE", help="instead of a sweep; only the methods named are trained")
    options = parser.parse_args()
    folder: Path = options.folder
    model = smollm2_folder()
    texts = domains.write(folder / "texts")
    try:
        svdbank.open(model)
    except BankNotFoundError:
        svdbank.build(model)
    figures: dict[str, Any] = {"cpus": os.cpu_count(), "load_at_start": os.getloadavg()[0], "steps": options.steps}
    given = {
        method: float(rate) for method, _, rate in (pair.partition("=") for pair in (options.rates or "").split(",") if pair)
    }
    if "sweep" in options.only or ("domains" in options.only and not given):
        figures["sweep"] = sweep(model, folder, texts, options.steps)
    if "domains" in options.only:
        rates = given or {method: best_rate(figures["sweep"], method) for method in RANKS}
        figures["domains"] = over_domains(model, folder, texts, options.steps, rates)
    if "time" in options.only:
        figures["time"] = timed(model, folder, texts, options.steps)
    print(tables(figures))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
