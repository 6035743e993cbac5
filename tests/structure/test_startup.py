"""What each command may not load: where people wait for an answer, they do not wait for what it does not use."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import svdbank
from tests.structure.source import ROOT

#: Packages of models and trainers, which cost seconds.
TRAINING = ("transformers", "peft", "accelerate", "datasets", "matplotlib")

#: The shortest run of ``train``, and of ``eval``.
SHORT = ["-o", "TRAINED", "--data", "TEXT", "--length", "32", "--batch-size", "1"]

#: A command's arguments (BANK stands for a bank's folder, MODEL for a model's, LM for one that predicts tokens, TEXT for a text,
#: PLANNED and TRAINED for folders that are not there, LAW and MED for adapters of the bank's base), and the packages that it must
#: answer without on a machine without a GPU.
COMMANDS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "help": (["--help"], ("torch", "zarr", "numpy", "huggingface_hub", *TRAINING)),
    "ls": (["ls"], ("torch", "zarr", "numpy", *TRAINING)),
    "info": (["info", "BANK"], ("torch", "zarr", "numpy", "huggingface_hub", *TRAINING)),
    "info --weights": (["info", "BANK", "--weights"], ("torch", "zarr", "numpy", "pandas", "huggingface_hub", *TRAINING)),
    "verify": (["verify", "BANK"], ("torch", "zarr", "numpy", "huggingface_hub", *TRAINING)),
    "verify --data": (["verify", "BANK", "--data"], ("torch", "zarr", "numpy", "huggingface_hub", *TRAINING)),
    "plan": (["plan", "MODEL", "-o", "PLANNED"], ("torch", "zarr", "huggingface_hub", *TRAINING)),
    "compare": (["compare", "LAW", "MED"], ("zarr", "huggingface_hub", "scipy", *TRAINING)),
    "train": (
        ["train", "LM", *SHORT, "--steps", "1", "--method", "lora", "--lr", "1e-3", "--held-out", "0"],
        ("bitsandbytes", "matplotlib"),
    ),
    "eval": (["eval", "LM", *SHORT[2:]], ("bitsandbytes", "peft", "matplotlib")),
}

_PROBE = """
import json, sys
from svdbank_cli.main import main
place = sys.argv.pop(1)
try:
    main()
finally:
    loaded = {name.partition(".")[0] for name, module in sys.modules.items() if module is not None}
    open(place, "w").write(json.dumps(sorted(loaded)))
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with one bank in it, and two adapters beside it."""
    folder = tmp_path_factory.mktemp("home")
    bank = shutil.copytree(ROOT / "tests" / "data" / "format-1", folder / "banks" / "model-0" / "r18-both-float32")
    for name in ("law", "med"):
        svdbank.init(bank, output=folder / name, rank=2)
    return folder


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_loads_only_what_it_uses(
    name: str, home: Path, minilm: Path, small: Path, legal: Path, tmp_path: Path
) -> None:
    arguments, absent = COMMANDS[name]
    places = {
        "BANK": home / "banks" / "model-0" / "r18-both-float32",
        "LAW": home / "law",
        "MED": home / "med",
        "MODEL": minilm,
        "PLANNED": tmp_path / "planned",
        "TRAINED": tmp_path / "trained",
        "LM": small,
        "TEXT": legal,
    }
    command = [sys.executable, "-c", _PROBE, str(tmp_path / "loaded"), *(str(places.get(a, a)) for a in arguments)]
    environment = os.environ | {"SVDBANK_HOME": str(home), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() and "no banks yet" not in done.stdout
    loaded = json.loads((tmp_path / "loaded").read_text())
    assert "svdbank_cli" in loaded
    assert set(absent).isdisjoint(loaded), sorted(set(absent).intersection(loaded))


def test_reading_vectors_loads_torch_but_not_zarr(home: Path) -> None:
    probe = f"""
import sys, svdbank
bank = svdbank.open({str(home / "banks" / "model-0" / "r18-both-float32")!r})
assert "torch" not in sys.modules
bank.left(bank.names, 16), bank.sigma(bank.names, 16), bank.probes(bank.names)
print("torch" in sys.modules, "zarr" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert done.stdout == "True False\n", done.stderr
