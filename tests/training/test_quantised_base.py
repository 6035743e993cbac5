"""The whole way on the whole model: ``svdbank train`` on a 4-bit SmolLM2, ``svdbank eval`` on the bfloat16 one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import svdbank
from svdbank.adapter.folder import read_folder
from svdbank.lm.packaged import licence_texts
from tests.lm.models import write_jsonl


def command(*arguments: str | Path) -> Any:
    """Run ``svdbank … --json`` in a process of its own; returns the last document it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "svdbank_cli.main", *map(str, arguments), "--json"],
        capture_output=True,
        text=True,
        timeout=540,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1] if arguments[0] == "train" else done.stdout)


@pytest.mark.soak
@pytest.mark.usefixtures("device")
def test_what_a_4_bit_smollm2_learns_the_bfloat16_one_knows(smollm2: Path, tmp_path: Path) -> None:
    texts = [text[:3000] for text in licence_texts()]
    legal = write_jsonl(tmp_path / "legal.jsonl", texts[:200])
    other = write_jsonl(tmp_path / "other.jsonl", texts[200:212])
    bank = svdbank.build(smollm2, tmp_path / "bank", rank=16, side="left")
    report = command(
        *("train", smollm2, "-o", tmp_path / "law", "--data", legal, "--bank", bank.path, "--load-in", "4bit"),
        *(
            "--length",
            "128",
            "--batch-size",
            "2",
            "--steps",
            "10",
            "--lr",
            "2e-3",
            "--held-out-blocks",
            "12",
            "--log-steps",
            "1",
        ),
    )
    held_out = report["held_out"]
    assert held_out["change"] < -2 * held_out["change_error"] < 0
    folder = read_folder(tmp_path / "law")
    assert len(folder.factors) == 210
    for module, pair in folder.factors.items():
        assert torch.equal(pair.B, bank[f"{module}.weight"].left(16)), module
        assert pair.A.any(), module
    whole = command(
        *("eval", smollm2, "--adapter", f"law={tmp_path / 'law'}", "--data", f"other={other}"),
        *("--length", "128", "--tokens", "2048", "--dtype", "bfloat16"),
    )
    base, law = whole["scores"]
    assert (base["adapter"], law["adapter"]) == ("base", "law")
    assert law["loss"] < base["loss"] and law["change"] < -2 * law["change_error"] < 0
    print(
        f"4-bit base: {held_out}\nbfloat16 base, text unseen: {base['loss']} → {law['loss']}, {law['change']} ± {law['change_error']}"
    )
