"""An export is the same adapter: to the byte where it can be, within one rounding where scales are folded."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import svdbank
from svdbank.adapter.conversion import SERVED_RANKS
from svdbank.adapter.folder import read_folder
from svdbank.adapter.settings import CACHE, WEIGHTS
from svdbank.bank.reading import Bank
from svdbank.core.errors import BankError, CheckpointError, DamageError, OptionError, WrongBaseError
from tests.peft.models import quiet, without_svd


def hidden(minilm: Path, folder: Path) -> torch.Tensor:
    """Output of MiniLM with the adapter, loaded by PEFT's ordinary way, on a fixed input."""
    from transformers import AutoModel

    with quiet():
        base = AutoModel.from_pretrained(minilm)
    model = peft.PeftModel.from_pretrained(base, folder).eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(1000, 1016)[None]).last_hidden_state


#: Folding a scale rounds A once by 6e-8; six layers of float32 sums in another order make that some 1e-6 of outputs of size 1.
SAME_OUTPUT = 2e-5


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize(
    "options", [{}, {"rslora": True, "alpha": 5, "rank_pattern": {"value": 3}}, {"band": "3:9", "rank": None}]
)
def test_slim_and_back_is_the_same_folder_byte_for_byte(
    options: dict[str, object], trained: Callable[..., Path], pair_bank: Bank, tmp_path: Path
) -> None:
    folder = trained("law", **options)
    slim = svdbank.export(folder, to="slim", output=tmp_path / "slim", bank=pair_bank)
    assert slim.share == pytest.approx(0.5, abs=0.03)  # square weights: in / (in + out)
    with pytest.raises(CheckpointError, match="slim"):
        svdbank.read_adapter(tmp_path / "slim")
    svdbank.export(tmp_path / "slim", to="peft", output=tmp_path / "back", bank=pair_bank)
    assert contents(tmp_path / "back") == contents(folder)


def test_slim_needs_its_bank_and_notices_another(
    trained: Callable[..., Path], pair_bank: Bank, minilm: Path, tmp_path: Path
) -> None:
    folder = trained("law")
    svdbank.export(folder, to="slim", output=tmp_path / "slim", bank=pair_bank)
    with pytest.raises(BankError, match="needs the bank"):
        svdbank.export(tmp_path / "slim", output=tmp_path / "back")
    half = svdbank.build(minilm, tmp_path / "half", rank=4, side="left", dtype="float16", targets=("query", "value"))
    with pytest.raises(BankError, match="not those that the adapter was made with"):
        svdbank.export(tmp_path / "slim", output=tmp_path / "back", bank=half)
    tensors = load_file(tmp_path / "slim" / "coefficients.safetensors")
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name] + 1}, tmp_path / "slim" / "coefficients.safetensors")
    with pytest.raises(DamageError, match="was changed"):
        svdbank.export(tmp_path / "slim", output=tmp_path / "back", bank=pair_bank)
    assert not (tmp_path / "back").exists()


def test_slim_finds_the_cached_bank_of_the_base_that_is_recorded(
    minilm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SVDBANK_HOME", str(tmp_path / "home"))
    svdbank.build(minilm, rank=4, targets=("query",))
    svdbank.init(minilm, rank=4, output=tmp_path / "law", targets=("query",))
    svdbank.init(minilm, rank=4, output=tmp_path / "milora", targets=("query",), method="milora")
    svdbank.export(tmp_path / "law", to="slim", output=tmp_path / "slim")
    svdbank.export(tmp_path / "slim", output=tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tmp_path / "law")
    svdbank.export(tmp_path / "milora", to="lora", output=tmp_path / "lora")
    assert svdbank.read_adapter(tmp_path / "lora").base.name == str(minilm)
    monkeypatch.setenv("SVDBANK_HOME", str(tmp_path / "nothing"))
    for folder, form in (("law", "slim"), ("slim", "peft"), ("milora", "lora")):
        with pytest.raises(BankError, match="needs the bank") as caught:
            svdbank.export(tmp_path / folder, to=form, output=tmp_path / "out")  # type: ignore[arg-type]
        assert caught.value.hint == f"svdbank build {minilm}" and "--bank" in str(caught.value)


def test_a_cached_bank_of_other_weights_is_not_taken_for_the_recorded_one(
    minilm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SVDBANK_HOME", str(tmp_path / "home"))
    model = shutil.copytree(minilm, tmp_path / "model")
    svdbank.build(model, rank=4, targets=("query",))
    svdbank.init(model, rank=4, output=tmp_path / "milora", targets=("query",), method="milora")
    tensors = load_file(model / "model.safetensors")
    name = next(key for key in tensors if key.endswith("query.weight"))
    save_file({**tensors, name: tensors[name] * 2}, model / "model.safetensors", metadata={"format": "pt"})
    svdbank.build(model, rank=4, targets=("query",))
    with pytest.raises(WrongBaseError, match="other weights"):
        svdbank.export(tmp_path / "milora", to="lora", output=tmp_path / "out")


def test_an_inference_export_loads_without_an_svd_and_gives_the_same_outputs(
    trained: Callable[..., Path], minilm: Path, tmp_path: Path
) -> None:
    folder = trained("law", rslora=True, alpha=8, rank_pattern={"value": 9}, alpha_pattern={"query": 3})
    report = svdbank.export(folder, inference=True, output=tmp_path / "served")
    assert report.rank == 16 and report.flag == "--max-lora-rank 16"
    settings = read_folder(tmp_path / "served").settings
    assert settings.r == settings.lora_alpha == 16 and not settings.rank_pattern and not settings.alpha_pattern
    assert settings.init_lora_weights is True and not settings.use_rslora
    assert {t.shape[0] for k, t in load_file(tmp_path / "served" / WEIGHTS).items() if "lora_A" in k} == {16}
    expected = hidden(minilm, folder)
    with without_svd() as called:
        found = hidden(minilm, tmp_path / "served")
    assert called == []
    assert float((found - expected).abs().max()) <= SAME_OUTPUT
    assert 16 in SERVED_RANKS


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("method", ["milora", "pissa"])
def test_a_trained_residual_adapter_becomes_a_plain_lora_on_the_unchanged_base(
    method: str, rslora: bool, trained: Callable[..., Path], pair_bank: Bank, minilm: Path, tmp_path: Path
) -> None:
    options = {"method": method, "rslora": rslora, "alpha": 6, "rank_pattern": {"value": 3}, "base_model": str(minilm)}
    folder = trained("law", residual_out=tmp_path / "residual", **options)
    expected = hidden(tmp_path / "residual", folder)
    report = svdbank.export(folder, to="lora", output=tmp_path / "lora", bank=pair_bank)
    settings = read_folder(tmp_path / "lora").settings
    assert report.rank == 8 and settings.r == 8
    assert settings.lora_alpha == pytest.approx(6 * (math.sqrt(2) if rslora else 2))
    found = hidden(minilm, tmp_path / "lora")
    assert float((found - expected).abs().max()) <= SAME_OUTPUT
    # Saved again by PEFT, the folder no longer says what it was.
    (folder / CACHE).unlink()
    svdbank.export(folder, to="lora", output=tmp_path / "again", bank=pair_bank, method=method)
    assert load_file(tmp_path / "again" / WEIGHTS).keys() == load_file(tmp_path / "lora" / WEIGHTS).keys()
    assert torch.equal(hidden(minilm, tmp_path / "again"), found)
    fresh = tmp_path / "fresh"
    svdbank.init(
        pair_bank, output=fresh, rank=4, targets=("query", "value"), **{k: v for k, v in options.items() if k != "base_model"}
    )
    svdbank.export(folder, to="lora", output=tmp_path / "third", method=method, initial=fresh)
    assert torch.equal(hidden(minilm, tmp_path / "third"), found)


@pytest.mark.parametrize("method", ["milora", "pissa"])
def test_a_fresh_residual_adapter_gives_the_base_s_outputs(method: str, pair_bank: Bank, minilm: Path, tmp_path: Path) -> None:
    from transformers import AutoModel

    report = svdbank.init(
        pair_bank,
        output=tmp_path / "fresh",
        rank=8,
        alpha=3,
        method=method,
        targets=("query", "value"),
        residual_out=tmp_path / "residual",
        base_model=str(minilm),
    )
    assert (
        report.residual == str(tmp_path / "residual") and 0 < report.residual_rounding < 2e-7
    )  # float32: sum and rounding, 6e-8 each
    with quiet():
        base = AutoModel.from_pretrained(minilm).eval()
    with torch.no_grad():
        expected = base(input_ids=torch.arange(1000, 1016)[None]).last_hidden_state
    assert float((hidden(tmp_path / "residual", tmp_path / "fresh") - expected).abs().max()) <= SAME_OUTPUT
    kept, changed = load_file(minilm / "model.safetensors"), load_file(tmp_path / "residual" / "model.safetensors")
    different = {name for name in kept if not torch.equal(kept[name], changed[name])}
    assert different == set(report.ranks)
    assert (tmp_path / "residual" / "tokenizer.json").read_bytes() == (minilm / "tokenizer.json").read_bytes()
    zero = svdbank.read_adapter(tmp_path / "fresh", bank=pair_bank)
    assert zero.norm() < 1e-6 * math.sqrt(sum(float(kept[name].double().square().sum()) for name in report.ranks))


def test_what_cannot_be_exported_says_why(trained: Callable[..., Path], pair_bank: Bank, tmp_path: Path) -> None:
    folder = trained("law")
    with pytest.raises(OptionError, match="PEFT folder already"):
        svdbank.export(folder, output=tmp_path / "x", bank=pair_bank)
    tensors = load_file(folder / WEIGHTS)
    save_file({k: v * 1.5 if "lora_B" in k else v for k, v in tensors.items()}, folder / WEIGHTS)
    with pytest.raises(OptionError, match="to the bit"):
        svdbank.export(folder, to="slim", output=tmp_path / "x", bank=pair_bank)
    save_file({**tensors, "base_model.model.pooler.dense.weight": torch.zeros(2, 2)}, folder / WEIGHTS)
    with pytest.raises(OptionError, match=r"pooler\.dense\.weight: servers take factors alone"):
        svdbank.export(folder, inference=True, output=tmp_path / "x")
    assert not (tmp_path / "x").exists()
