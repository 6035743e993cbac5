"""``benchmarks.attach`` on a GPU: MiCA from a bank against PEFT's own, on a model of an 8B's shapes that is cut to a few layers."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import checkpoints
from benchmarks import device as devices
from benchmarks.device import Goal, Results, timed
from benchmarks.solver_gpu import sine

RANK = 16
#: The least times faster than PEFT's own initialisation an attach is to be.
TARGET = 100.0


def factors(model: nn.Module) -> dict[str, Tensor]:
    """By weight name, the B that an adapter put beside it, on the CPU."""
    found = {}
    for name, module in model.named_modules():
        held = getattr(module, "lora_B", None)
        if held:
            weight = name.removeprefix("base_model.model.") + ".weight"
            found[weight] = held["default"].weight.detach().to("cpu", torch.float32, copy=True)
    return found


def attached(folder: Path, bank: Any, device: torch.device, *, repeat: int, results: Results) -> None:
    """Seconds of the bank, of PEFT's plain LoRA and of PEFT's MiCA, on one model on the device."""
    import peft
    from transformers import AutoModelForCausalLM

    from svdbank.peft import attachment, get_peft_model

    def config(init: bool | str) -> Any:
        return peft.LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights=init, target_modules="all-linear")

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device)
    seconds: dict[str, list[float]] = {"bank": [], "peft_plain_lora": []}
    splits: list[dict[str, float]] = []
    ours: dict[str, Tensor] = {}
    for _ in range(repeat):
        taken, wrapped = timed(device, lambda m=model: get_peft_model(m, config("mica"), bank=bank))
        seconds["bank"].append(taken)
        splits.append(attachment(wrapped).seconds)
        ours = ours or factors(wrapped)
        model = wrapped.unload()
        taken, wrapped = timed(device, lambda m=model: peft.get_peft_model(m, config(True)))
        seconds["peft_plain_lora"].append(taken)
        model = wrapped.unload()
    middle, plain = median(seconds["bank"]), median(seconds["peft_plain_lora"])
    results.add(
        {
            "section": "attach",
            "rank": RANK,
            "weights": len(ours),
            "bank seconds": middle,
            "first call seconds": seconds["bank"][0],
            **{f"of it {step}": median(split[step] for split in splits) for step in splits[0]},
            **{f"of the first {step}": taken for step, taken in splits[0].items()},
            "PEFT plain LoRA seconds": plain,
            "times plain LoRA": middle / plain,
        }
    )
    taken, wrapped = timed(device, lambda: peft.get_peft_model(model, config("mica")))
    theirs = factors(wrapped)
    row = {"section": "attach", "PEFT mica seconds": taken, "times faster": taken / middle}
    row["times faster, first call"] = taken / seconds["bank"][0]
    results.add(
        row,
        Goal(f"attach, {len(ours)} weights", f"{middle:.3f} s", f"PEFT's mica {taken:.1f} s", taken / middle, TARGET),
    )
    wanted = bank.left(list(ours), RANK)
    for who, found in (("the bank's", ours), ("PEFT's", theirs)):
        sines = sorted((sine(found[name].to(device), wanted[name].to(device)), name) for name in wanted)
        results.add(
            {
                "section": "exactness",
                "B": who,
                f"sin to the bank r={RANK}, worst": sines[-1][0],
                "median": sines[len(sines) // 2][0],
                "worst at": sines[-1][1],
            }
        )


def measure(options: argparse.Namespace) -> int:
    """The whole benchmark; its exit code."""
    import peft
    import transformers

    import svdbank

    device = torch.device(options.device)
    model = checkpoints.TINY if options.quick else checkpoints.EIGHT_BILLION
    layers = options.layers or (2 if options.quick else 4)
    facts = devices.environment(device, "attach") | {"peft": peft.__version__, "transformers": transformers.__version__}
    devices.start(device)
    with checkpoints.scratch(options.place, 2 * model.nbytes(layers)) as place:
        folder = place / "checkpoint"
        written, _ = timed(device, lambda: checkpoints.write(folder, model, layers, device, files=1))
        facts["place"] = str(place.parent)
        devices.show(facts)
        results = Results(facts, options.json)
        with results.section("attach"):
            seconds, bank = timed(
                device, lambda: svdbank.build(folder, place / "bank", rank=RANK, side="left", device=options.device)
            )
            results.add(
                {
                    "section": "build",
                    "weights": len(bank),
                    "rank": RANK,
                    "side": "left",
                    "seconds": seconds,
                    "GB of weights": model.nbytes(layers) / 1e9,
                    "checkpoint written in": written,
                }
            )
            attached(folder, bank, device, repeat=options.repeat, results=results)
    code = results.close()
    print(json.dumps({"environment": facts, "rows": results.rows}, ensure_ascii=False))
    return code
