"""Merging and stacking adapters of three domains of SmolLM2-135M, beside PEFT's ``add_weighted_adapter``.

Sections:

- ``merging``: error against the dense float64 sum of the files' own A and B (of ``ties``: against TIES on the entries of the dense ΔW),
  rank, file size and time. PEFT's side runs twice: on MiCA adapters as PEFT knows them, and on the same files saved with
  ``init_lora_weights: true``, so that it runs no SVD. *call* is the merge of adapters in memory; *job* is from adapter folders to a
  folder, PEFT's with the base model in memory already.
- ``many``: two to eight adapters, in one band and in several, merged and stacked: error against the dense float64 sum.
- ``losses``: held-out loss of the base, of each adapter and of every way to put them together, domain by domain.

    python -m benchmarks.composition [--only merging,many,losses] [--folder FOLDER] [--steps N]

Adapters are trained where they are missing in the folder: one a domain in the band 0:16, code and medical once more on top of the
others in bands of their own, and one a domain on other documents. Prints tables and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import svdbank
from benchmarks import domains, sections
from svdbank.composition.fitting import FitOptions
from svdbank.composition.inputs import Places

NAMES = ("legal", "code", "medical")

#: Adapters of ``--on-top-of``, each in a band that those before it leave free.
BESIDE = ("legal", "code-beside", "medical-beside")

#: Adapters of other documents of the same domains, in the band 0:16.
AGAIN = ("legal-again", "code-again", "medical-again")

WEIGHTS = (0.5, 0.3, 0.2)
DENSITY = 0.5

#: Documents of a domain: trained on, fitted on, measured on. Those fitted and measured on are cut to so many characters.
PARTS = {"train": (0, 400), "again": (408, 450), "fit": (400, 408), "test": (450, 474)}
CUT = 384


def texts(folder: Path) -> dict[str, dict[str, Path]]:
    """By part and domain, a file of documents."""
    written: dict[str, dict[str, Path]] = {part: {} for part in PARTS}
    for name, path in domains.write(folder / "whole").items():
        lines = path.read_text().splitlines()
        for part, (start, stop) in PARTS.items():
            place = folder / f"{name}-{part}.jsonl"
            cut = [{"text": json.loads(line)["text"][: CUT if part in ("fit", "test") else None]} for line in lines[start:stop]]
            content = "".join(json.dumps(document) + "\n" for document in cut)
            if not place.is_file() or place.read_text() != content:
                place.write_text(content)
            written[part][name] = place
    return written


def trained(model: Path, folder: Path, steps: int) -> dict[str, Path]:
    """Eight adapters, trained unless they are there."""
    data = texts(folder / "texts")
    places = {}
    for name in (*NAMES, *BESIDE[1:], *AGAIN):
        places[name] = folder / "adapters" / name
        if (places[name] / "adapter_config.json").is_file():
            continue
        beneath = BESIDE[: BESIDE.index(name)] if name in BESIDE else ()
        command = [str(Path(sys.executable).with_name("svdbank")), "train", str(model), "-o", str(places[name])]
        text = data["again" if name in AGAIN else "train"][name.partition("-")[0]]
        command += ["--data", str(text), "-r", "16", "--length", "128", "--batch-size", "2"]
        command += ["--held-out-blocks", "8", "--steps", str(steps), "--lr", "2e-3", "--seed", "0"]
        command += [word for other in beneath for word in ("--on-top-of", str(places[other]))]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return places


# Merging


def dense(folder: Path) -> dict[str, Tensor]:
    """``s B A`` of every weight, float64, from the file's own A and B."""
    from svdbank.adapter.folder import read_folder

    read = read_folder(folder)
    return {module: read.scale(module) * (pair.B.double() @ pair.A.double()) for module, pair in read.factors.items()}


def error(folder: Path, wanted: Callable[[str], Tensor], modules: Sequence[str]) -> float:
    """Relative Frobenius error over all weights."""
    found = dense(folder)
    off = whole = 0.0
    for module in modules:
        target = wanted(module)
        off += float((found[module] - target).square().sum())
        whole += float(target.square().sum())
    return (off / whole) ** 0.5


def size_and_rank(folder: Path) -> tuple[int, int]:
    from svdbank.adapter.folder import read_folder

    read = read_folder(folder)
    return (folder / "adapter_model.safetensors").stat().st_size, max(pair.A.shape[0] for pair in read.factors.values())


def timed(action: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return median(times)


def saved_as(folders: Sequence[Path], init: bool | str, place: Path) -> list[Path]:
    """Copies of adapter folders with another ``init_lora_weights``, holding only what PEFT knows."""
    copies = []
    for folder in folders:
        copy = place / folder.name
        copy.mkdir(parents=True, exist_ok=True)
        config = json.loads((folder / "adapter_config.json").read_text()) | {"init_lora_weights": init}
        (copy / "adapter_config.json").write_text(json.dumps(config))
        shutil.copy(folder / "adapter_model.safetensors", copy)
        copies.append(copy)
    return copies


def by_peft(base: Any, folders: Sequence[Path], method: str, weights: Sequence[float], output: Path) -> tuple[float, float]:
    """Seconds of the call, and of the job: load adapters, merge, save."""
    from peft import PeftModel

    start = time.perf_counter()
    model = PeftModel.from_pretrained(base, folders[0], adapter_name="a0", low_cpu_mem_usage=True)
    names = ["a0"]
    for number, folder in enumerate(folders[1:], 1):
        model.load_adapter(str(folder), f"a{number}", low_cpu_mem_usage=True)
        names.append(f"a{number}")
    options: dict[str, Any] = {"density": DENSITY} if method == "ties" else {}
    if method == "svd":
        options = {"svd_rank": 16, "svd_full_matrices": False}
    called = time.perf_counter()
    model.add_weighted_adapter(names, list(weights), "merged", combination_type=method, **options)
    seconds = time.perf_counter() - called
    shutil.rmtree(output, ignore_errors=True)
    model.save_pretrained(str(output), selected_adapters=["merged"])
    job = time.perf_counter() - start
    model.unload()
    for path in (output / "merged").iterdir():
        path.replace(output / path.name)
    return seconds, job


def by_svdbank(
    folders: Sequence[Path], method: str, weights: Sequence[float], output: Path, repeats: int
) -> tuple[float, float]:
    from svdbank.composition.inputs import read_inputs
    from svdbank.composition.merging import merged

    read = read_inputs(folders)
    options: dict[str, Any] = {"method": method} | ({"density": DENSITY} if method != "linear" else {})
    job = timed(lambda: svdbank.merge(folders, output=output, weights=weights, force=True, **options), repeats)
    return timed(lambda: merged(read, weights, **options), repeats), job


def dense_ties(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """TIES on the entries of the dense ΔW (arXiv 2306.01708): trim, elect, mean of those that agree."""
    kept = []
    for delta in deltas:
        flat = delta.flatten()
        chosen = flat.abs().topk(int(DENSITY * len(flat))).indices
        kept.append(torch.zeros_like(flat).index_copy(0, chosen, flat[chosen]).view_as(delta))
    weighted = torch.stack([weight * part for weight, part in zip(weights, kept, strict=True)])
    sign = torch.where(weighted.sum(dim=0) >= 0, 1.0, -1.0)
    agreeing = weighted * sign > 0
    return (weighted * agreeing).sum(dim=0) / agreeing.sum(dim=0).clamp(min=1)


def merging(model: Path, folders: Sequence[Path], place: Path, repeats: int) -> list[dict[str, Any]]:
    """Rows of the table of merges."""
    from transformers import AutoModelForCausalLM

    place.mkdir(parents=True, exist_ok=True)
    deltas: list[dict[str, Tensor]] = []

    def weighted_sum(module: str) -> Tensor:
        return sum((weight * delta[module] for weight, delta in zip(WEIGHTS, deltas, strict=True)), torch.zeros(()))

    @cache
    def ties_of_entries(module: str) -> Tensor:
        return dense_ties([delta[module] for delta in deltas], (1.0,) * len(deltas)).float()

    rows = []

    def row(who: str, method: str, output: Path, call: float, job: float) -> None:
        nbytes, rank = size_and_rank(output)
        rows.append(
            {"who": who, "method": method, "rank": rank, "bytes": nbytes, "call": call, "job": job, "folder": str(output)}
        )
        print(rows[-1], file=sys.stderr, flush=True)

    for method in ("linear", "ties"):
        weights = (1.0,) * len(folders) if method == "ties" else WEIGHTS
        call, job = by_svdbank(folders, method, weights, place / f"svdbank-{method}", repeats)
        row("svdbank", method, place / f"svdbank-{method}", call, job)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        for init in (True, "mica"):
            copies = saved_as(folders, init, place / f"saved-{init}".lower())
            for method in ("linear", "cat", "ties", "svd"):
                weights = (1.0,) * len(folders) if method == "ties" else WEIGHTS
                output = place / f"peft-{method}-{init}".lower()
                runs = [
                    by_peft(base, copies, method, weights, output)
                    for _ in range(1 if init == "mica" or method == "svd" else repeats)
                ]
                row(
                    "PEFT, no SVD" if init is True else "PEFT, mica",
                    method,
                    output,
                    median(call for call, _ in runs),
                    median(job for _, job in runs),
                )
    print("timed; errors follow", file=sys.stderr, flush=True)
    deltas += [dense(folder) for folder in folders]
    modules = list(deltas[0])
    for found in rows:
        target = ties_of_entries if found["method"] == "ties" else weighted_sum
        found["error"] = error(Path(found.pop("folder")), target, modules)
    return rows


def many(places: Mapping[str, Path], place: Path) -> list[dict[str, Any]]:
    """Merges and stacks of the first two to eight adapters, each with a weight of its own."""
    place.mkdir(parents=True, exist_ok=True)
    deltas = {name: dense(folder) for name, folder in places.items()}
    rows = []
    for count in range(2, len(places) + 1):
        chosen = dict(list(places.items())[:count])
        weights = {name: 1 / (number + 2) for number, name in enumerate(chosen)}

        def wanted(module: str, weights: Mapping[str, float] = weights) -> Tensor:
            return sum((weight * deltas[name][module] for name, weight in weights.items()), torch.zeros(()))

        report = svdbank.merge(chosen, output=place / "merged", weights=list(weights.values()), force=True)
        svdbank.stack(chosen, output=place / "stacked", scale=weights, force=True)
        off = {how: error(place / how, wanted, list(deltas["legal"])) for how in ("merged", "stacked")}
        rows.append({"adapters": count, "rank": report.rank, **off})
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


# Losses


def losses(model: Path, places: Mapping[str, Path], folder: Path) -> dict[str, Any]:
    """The table of losses, and what fitting found."""
    data = texts(folder / "texts")
    made = folder / "composed"
    shared = [places[name] for name in NAMES]
    apart = {name: places[own] for name, own in zip(NAMES, BESIDE, strict=True)}
    third = [1 / 3] * 3
    fit = FitOptions(
        model=str(model), texts=tuple(str(path) for path in data["fit"].values()), tokens=1024, length=256, evaluations=12
    )
    svdbank.merge(shared, output=made / "linear", force=True)
    svdbank.merge(shared, output=made / "ties", method="ties", density=DENSITY, force=True)
    svdbank.merge(shared, output=made / "dare", method="dare_linear", density=DENSITY, force=True)
    svdbank.stack(shared, output=made / "stack", force=True)
    svdbank.stack(apart, output=made / "stack-apart", force=True)
    svdbank.stack(apart, output=made / "apart-0.7", scale=dict.fromkeys(NAMES, 0.7), force=True)
    fitted = {name: _fitted(adapters, made, name, fit) for name, adapters in {"one-band": shared, "bands-apart": apart}.items()}
    by_peft_ = {f"PEFT {method}": _from_peft(model, shared, method, third, made) for method in ("linear", "cat", "ties")}
    adapters = {name: places[name] for name in NAMES} | {
        "linear, 1/3 each": made / "linear",
        "ties": made / "ties",
        "dare_linear, 1/3 each": made / "dare",
        "stack, one band": made / "stack",
        "stack, one band, fitted": made / "fitted-one-band",
        "stack, bands apart": made / "stack-apart",
        "stack, bands apart, 0.7 each": made / "apart-0.7",
        "stack, bands apart, fitted": made / "fitted-bands-apart",
        **by_peft_,
    }
    report = svdbank.eval(str(model), data=data["test"], adapters=adapters, length=256, tokens=4096)
    scores = [
        {
            "adapter": s.adapter,
            "text": s.text,
            "loss": s.loss,
            "error": s.error,
            "change": s.change,
            "change_error": s.change_error,
        }
        for s in report.scores
    ]
    return {"scores": scores, "fitted": fitted, "documents": PARTS["test"][1] - PARTS["test"][0]}


def _fitted(adapters: Places, made: Path, name: str, fit: FitOptions) -> dict[str, Any]:
    """Scales chosen on held-out text; what is there already is not fitted again."""
    figures, output = made / f"fitted-{name}.json", made / f"fitted-{name}"
    if not figures.is_file():
        report = svdbank.stack(adapters, output=output, fit=fit, force=True).fit
        assert report is not None
        found = {"scales": report.weights, "start": report.start, "loss": report.loss, "base": report.base}
        figures.write_text(json.dumps(found | {"trials": len(report.trials)}))
    return dict(json.loads(figures.read_text()))


def _from_peft(model: Path, folders: Sequence[Path], method: str, weights: Sequence[float], made: Path) -> Path:
    from transformers import AutoModelForCausalLM

    output = made / f"peft-{method}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        copies = saved_as(folders, True, made / "saved")
        by_peft(base, copies, method, (1.0,) * len(folders) if method == "ties" else weights, output)
    return output


def tables(figures: Mapping[str, Any]) -> str:
    """Markdown for docs/benchmarks.md."""
    parts = []
    if rows := figures.get("merging"):
        lines = ["| who | method | error | rank | file | call | job |", "| --- | --- | --- | --- | --- | --- | --- |"]
        lines += [
            f"| {r['who']} | {r['method']} | {r['error']:.1e} | {r['rank']} | {r['bytes'] / 1e6:.1f} MB | "
            f"{r['call']:.3f} s | {r['job']:.2f} s |"
            for r in rows
        ]
        parts.append("\n".join(lines))
    if rows := figures.get("many"):
        lines = ["| adapters | rank | error, merged | error, stacked |", "| --- | --- | --- | --- |"]
        lines += [f"| {r['adapters']} | {r['rank']} | {r['merged']:.1e} | {r['stacked']:.1e} |" for r in rows]
        parts.append("\n".join(lines))
    if found := figures.get("losses"):
        by_adapter: dict[str, dict[str, Any]] = {}
        for score in found["scores"]:
            by_adapter.setdefault(score["adapter"], {})[score["text"]] = score
        lines = [f"| adapter | {' | '.join(NAMES)} | mean change |", "| --- |" + " --- |" * (len(NAMES) + 1)]
        for name, by_text in by_adapter.items():
            if name == "base":
                cells = [f"{by_text[text]['loss']:.3f} ± {by_text[text]['error']:.3f}" for text in NAMES]
            else:
                cells = [
                    f"{by_text[text]['loss']:.3f} ({by_text[text]['change']:+.3f} ± {by_text[text]['change_error']:.3f})"
                    for text in NAMES
                ]
            mean = sum(by_text[text]["change"] for text in NAMES) / len(NAMES)
            spread = sum(by_text[text]["change_error"] ** 2 for text in NAMES) ** 0.5 / len(NAMES)
            lines.append(f"| {name} | {' | '.join(cells)} | " + ("– |" if name == "base" else f"{mean:+.3f} ± {spread:.3f} |"))
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def main() -> None:
    from svdbank import cache
    from svdbank.core.errors import BankNotFoundError
    from svdbank.lm.packaged import smollm2_folder

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sections.add_option(parser, ("merging", "many", "losses"))
    parser.add_argument("--folder", type=Path, default=cache.home() / "benchmarks" / "composition", help="adapters and results")
    parser.add_argument("--steps", type=int, default=30, help="of training, where adapters are missing")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    model = smollm2_folder()
    try:
        svdbank.open(model)
    except BankNotFoundError:
        svdbank.build(model)
    places = trained(model, options.folder, options.steps)
    figures: dict[str, Any] = {"cpus": os.cpu_count(), "load_at_start": os.getloadavg()[0], "steps": options.steps}
    if "merging" in options.only:
        figures["merging"] = merging(model, [places[name] for name in NAMES], options.folder / "merged", options.repeats)
    if "many" in options.only:
        figures["many"] = many(places, options.folder / "many")
    if "losses" in options.only:
        figures["losses"] = losses(model, places, options.folder)
    print(tables(figures))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
