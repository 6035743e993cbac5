"""One page of everything that a report shows, from small banks and adapters: made once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import svdbank
from svdbank.adapter.settings import TRAINING_FIGURES, WEIGHTS
from svdbank.core.specs import Progress
from svdbank.verbs.report import WrittenReport
from tests.building.small import write_made_checkpoint, write_small_checkpoint

#: A name that would be a program in a page, a formula in a figure, and an error in XML.
HOSTILE = "</td><script>document.title='taken'</script><img src=x onerror=alert(1)>\"'&amp;$\\frac{$\x00\x1b[2J\u202e\ud800"

#: Ordinary spectra, one with two equal singular values, one that lacks rank.
SPECTRA = [
    [float(20 - i) for i in range(20)],
    [*(float(20 - i) for i in range(16)), 3.0, 2.0, 2.0, 1.0],
    [*(float(20 - i) for i in range(19)), 0.0],
]

#: JSON has no lone surrogates.
IN_JSON = HOSTILE.replace("\ud800", "")

TRAINING = {
    "model": "org/model",
    "steps": 40,
    "tokens": 10240,
    "learning_rate": 1e-3,
    "seconds": 12.0,
    "kept": "best",
    "kept_step": 30,
    "curve": [[10, 3.1], [20, 2.9], [30, 2.8], [40, 2.79]],
    "measured": [
        {"step": 20, "loss": 2.95, "change": -0.1, "change_error": 0.01},
        {"step": 30, "loss": 2.9, "change": -0.15, "change_error": 0.01},
    ],
    "held_out": {
        "text": "law.jsonl",
        "blocks": 16,
        "tokens": 2048,
        "before": 3.05,
        "before_error": 0.1,
        "after": 2.9,
        "after_error": 0.1,
        "change": -0.15,
        "change_error": 0.01,
    },
    "retained": [{"text": IN_JSON, "tokens": 10, "before": 2.0, "after": 2.03, "change": 0.03, "change_error": None}],
    "notices": ["the rate may be high"],
    "a_field_of_a_later_version": 1,
}

EVALUATION = {
    "model": "org/model",
    "length": 128,
    "dtype": "float32",
    "scores": [
        {
            "adapter": "base",
            "text": "law",
            "loss": 3.0,
            "error": 0.1,
            "perplexity": 20.1,
            "change": 0.0,
            "change_error": 0.0,
            "tokens": 100,
        },
        {
            "adapter": "law",
            "text": "law",
            "loss": 2.8,
            "error": 0.1,
            "perplexity": 16.4,
            "change": -0.2,
            "change_error": 0.02,
            "tokens": 100,
        },
        {
            "adapter": IN_JSON,
            "text": IN_JSON,
            "loss": 3.1,
            "error": None,
            "perplexity": 22.2,
            "change": 0.1,
            "change_error": None,
        },
    ],
    "tasks": [{"task": "hellaswag", "adapter": "law", "metric": "acc", "value": 0.3, "error": 0.01}],
}


def write_trained(folder: Path, bank: svdbank.Bank, band: tuple[int, int], seed: int) -> Path:
    """A MiCA adapter whose A is drawn, as a training loop of somebody else's would leave it."""
    svdbank.init(bank, output=folder, rank=band[1] - band[0], band=band)
    tensors = load_file(folder / WEIGHTS)
    drawn = torch.Generator().manual_seed(seed)
    for name, value in tensors.items():
        if "lora_A" in name:
            tensors[name] = torch.randn(value.shape, generator=drawn)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def made_bank(tmp_path_factory: pytest.TempPathFactory) -> svdbank.Bank:
    folder = tmp_path_factory.mktemp("reported")
    return svdbank.build(write_made_checkpoint(folder / "model", SPECTRA), folder / "bank", rank=8, principal=2)


@pytest.fixture(scope="session")
def adapters(made_bank: svdbank.Bank) -> dict[str, Path]:
    """Two adapters that meet, one on a band of its own with the figures of a run, and the stack of two of them."""
    root = made_bank.path.parent
    made = {
        "law": write_trained(root / "law", made_bank, (0, 4), 0),
        "code": write_trained(root / "code", made_bank, (0, 4), 1),
        "med": write_trained(root / "med", made_bank, (4, 8), 2),
    }
    (made["med"] / TRAINING_FIGURES).write_text(json.dumps(TRAINING))
    svdbank.stack([made["law"], made["med"]], output=root / "domains")
    return made | {"domains": root / "domains"}


@pytest.fixture(scope="session")
def unfinished(minilm: Path, made_bank: svdbank.Bank) -> Path:
    """A build that was stopped after its first weights."""

    def stop(progress: Progress) -> None:
        if progress.stage == "decompose" and progress.done >= 2:
            raise KeyboardInterrupt

    folder = made_bank.path.parent
    model = write_small_checkpoint(folder / "half", minilm, layers=6)
    with pytest.raises(KeyboardInterrupt):
        svdbank.build(model, folder / "half.bank", rank=4, progress=stop, jobs=1)
    return folder / "half.bank"


@pytest.fixture(scope="session")
def evaluation(made_bank: svdbank.Bank) -> Path:
    path = made_bank.path.parent / "eval.json"
    path.write_text(json.dumps(EVALUATION))
    return path


@pytest.fixture(scope="session")
def everything(made_bank: svdbank.Bank, adapters: dict[str, Path], unfinished: Path, evaluation: Path) -> WrittenReport:
    sources = [made_bank.path, adapters["law"], adapters["code"], adapters["domains"], adapters["med"], unfinished, evaluation]
    return svdbank.report(sources, made_bank.path.parent / "report.html")
