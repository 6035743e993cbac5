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

#: A command's arguments (BANK stands for a bank's folder, MODEL for a model's, PLANNED for one that is not there, LAW and MED for
#: adapters of the bank's base), and the packages that it must answer without on a machine without a GPU.
COMMANDS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "help": (["--help"], ("torch", "zarr", "numpy", "huggingface_hub", *TRAINING)),
    "ls": (["ls"], ("torch", "zarr", "numpy", *TRAINING)),
    "info": (["info", "BANK"], ("torch", "zarr", "numpy", "huggingface_hub", *TRAINING)),
    "info --weights": (["info", "BANK", "--weights"], ("torch", "zarr", "numpy", "pandas", "huggingface_hub", *TRAINING)),
    "verify": (["verify", "BANK"], ("torch", "zarr", "numpy", "huggingface_hub", *TRAINING)),
    "verify --data": (["verify", "BANK", "--data"], ("torch", "zarr", "numpy", "huggingface_hub", *TRAINING)),
    "plan": (["plan", "MODEL", "-o", "PLANNED"], ("torch", "zarr", "huggingface_hub", *TRAINING)),
    "compare": (["compare", "LAW", "MED"], ("zarr", "huggingface_hub", "scipy", *TRAINING)),
}

_PROBE = """
import json, sys
from svdbank_cli.main import run
code = run(sys.argv[2:])
open(sys.argv[1], "w").write(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
sys.exit(code)
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
def test_a_command_loads_only_what_it_uses(name: str, home: Path, minilm: Path, tmp_path: Path) -> None:
    arguments, absent = COMMANDS[name]
    places = {
        "BANK": home / "banks" / "model-0" / "r18-both-float32",
        "LAW": home / "law",
        "MED": home / "med",
        "MODEL": minilm,
        "PLANNED": tmp_path / "planned",
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
