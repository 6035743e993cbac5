"""Under ``accelerate launch`` two processes train what one trains with batches twice as large; the main one writes and talks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import svdbank
from svdbank.bank.reading import Bank

#: Without dropout, which each process draws for itself.
RECIPE: dict[str, Any] = {"rank": 4, "length": 32, "steps": 8, "log_steps": 1, "save_steps": 3, "dropout": 0.0, "held_out": 0.3}


@pytest.mark.soak
def test_two_processes_train_what_one_trains(small: Path, small_bank: Bank, legal: Path, tmp_path: Path) -> None:
    alone = svdbank.train(small, output=tmp_path / "alone", data=str(legal), batch_size=2, **RECIPE)
    arguments = [part for name, value in RECIPE.items() for part in ("--" + name.replace("_", "-"), str(value))]
    launched = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
            *("--mixed_precision", "no", "--dynamo_backend", "no", "-m", "svdbank_cli.main", "train", str(small)),
            *("-o", str(tmp_path / "both"), "--data", str(legal), "--batch-size", "1", "--json", *arguments),
        ],
        capture_output=True,
        text=True,
        timeout=540,
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )
    assert launched.returncode == 0, launched.stderr[-3000:]
    report = json.loads(launched.stdout.splitlines()[-1])
    assert sum('"adapter"' in line for line in launched.stdout.splitlines()) == 1, "one process talks"
    assert report["processes"] == 2 and report["tokens"] == alone.tokens and report["steps"] == 8
    # The same blocks in the same steps: what is left is the order of float32 sums, which Adam's first steps enlarge.
    for (step, loss), (other, theirs) in zip(alone.curve, report["curve"], strict=True):
        assert step == other and theirs == pytest.approx(loss, abs=2e-2)
    assert alone.held_out is not None
    assert report["held_out"]["before"] == pytest.approx(alone.held_out.before, abs=1e-4)
    assert report["held_out"]["after"] == pytest.approx(alone.held_out.after, abs=2e-2)
    assert alone.held_out.change < -0.1
