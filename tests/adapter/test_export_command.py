"""``svdbank export`` as a user types it: forms, figures, JSON, errors with their exit codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

import svdbank
from svdbank.adapter.folder import read_folder
from svdbank.adapter.settings import WEIGHTS
from svdbank.bank.reading import Bank
from svdbank_cli.main import run

Capture = pytest.CaptureFixture[str]


def tensors(folder: Path) -> bytes:
    return (folder / WEIGHTS).read_bytes()


def test_slim_and_back_to_peft(trained: Callable[..., Path], pair_bank: Bank, tmp_path: Path, capsys: Capture) -> None:
    law, bank = trained("law"), str(pair_bank.path)
    slim, back = tmp_path / "law.slim", tmp_path / "back"
    assert run(["export", str(law), "--to", "slim", "--bank", bank, "-o", str(slim)]) == 0
    printed = capsys.readouterr().out
    assert "12 weights, rank 4" in printed and "50." in printed and printed.splitlines()[-1] == str(slim)
    assert run(["export", str(slim), "--bank", bank, "-o", str(back), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["form"] == "peft" and report["output"] == str(back) and report["rank"] == 4
    assert {p.name: p.read_bytes() for p in back.iterdir()} == {p.name: p.read_bytes() for p in law.iterdir()}


def test_lora_of_a_trained_milora(trained: Callable[..., Path], pair_bank: Bank, tmp_path: Path, capsys: Capture) -> None:
    folder = trained("law", method="milora")
    assert run(["export", str(folder), "--to", "lora", "-o", str(tmp_path / "lora")]) == 1
    said = capsys.readouterr()
    assert said.out == "" and "needs the bank" in said.err and "--bank" in said.err
    assert not (tmp_path / "lora").exists()
    arguments = ["export", str(folder), "--to", "lora", "-o", str(tmp_path / "lora"), "--bank", str(pair_bank.path), "--json"]
    assert run(arguments) == 0
    assert json.loads(capsys.readouterr().out)["rank"] == 8
    settings = read_folder(tmp_path / "lora").settings
    assert settings.init_lora_weights is True and settings.r == 8
    # Not twice to one place, but with --force.
    before = tensors(tmp_path / "lora")
    assert run(arguments) == 2
    assert "--force" in capsys.readouterr().err and tensors(tmp_path / "lora") == before
    assert run([*arguments, "--force"]) == 0


def test_for_inference_names_the_flag_of_the_server(trained: Callable[..., Path], tmp_path: Path, capsys: Capture) -> None:
    folder = trained("law", rslora=True, alpha=7)
    assert run(["export", str(folder), "--for", "inference", "-o", str(tmp_path / "served")]) == 0
    assert "vLLM needs: --max-lora-rank 8" in capsys.readouterr().out
    settings = read_folder(tmp_path / "served").settings
    assert settings.r == settings.lora_alpha == 8 and settings.init_lora_weights is True and not settings.use_rslora
    one, other = svdbank.read_adapter(folder), svdbank.read_adapter(tmp_path / "served")
    assert (one - other.named("law")).norm() <= 1e-6 * one.norm()  # folding a scale rounds to float32 once
    assert {value.shape[0] for key, value in load_file(tmp_path / "served" / WEIGHTS).items() if "lora_A" in key} == {8}


@pytest.mark.parametrize(
    ("arguments", "code", "why"),
    [
        (["{law}"], 2, "PEFT folder already"),
        (["{law}", "--to", "slim"], 1, "needs the bank"),
        (["{law}", "--to", "slim", "--for", "inference", "--bank", "{bank}"], 2, "it lacks B"),
        (["{law}", "--to", "onnx"], 2, "onnx"),
        (["{law}", "--to", "slim", "--bank", "{nothing}"], 10, "nothing"),
        (["{nothing}", "--to", "lora"], 1, "no such folder"),
        (["{law}", "--to", "lora", "--method", "milora"], 1, "needs the bank"),
    ],
)
def test_what_cannot_be_meant_is_said_before_anything_is_written(
    arguments: list[str], code: int, why: str, trained: Callable[..., Path], pair_bank: Bank, tmp_path: Path, capsys: Capture
) -> None:
    places = {"law": trained("law"), "bank": pair_bank.path, "nothing": tmp_path / "nothing"}
    given = [argument.format(**places) for argument in arguments]
    assert run(["export", *given, "-o", str(tmp_path / "out")]) == code
    said = capsys.readouterr()
    assert why in said.err and said.out == ""
    assert not (tmp_path / "out").exists()
