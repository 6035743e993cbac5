"""A plan records who knew which matrices a model has: the table, Transformers, or nobody."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

import svdbank
from svdbank.verbs.build import BuildReport
from tests.architectures import small


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A listed type, one that Transformers knows, and one that nobody does."""
    root = tmp_path_factory.mktemp("decided")
    for model_type in ("llama", "vaultgemma"):
        small.saved(small.small_model(model_type), root / model_type)
    shutil.copytree(root / "llama", root / "own")
    config = json.loads((root / "own" / "config.json").read_text())
    config |= {"model_type": "my_llama", "auto_map": {"AutoModelForCausalLM": "modeling.MyLlama"}, "architectures": ["MyLlama"]}
    (root / "own" / "config.json").write_text(json.dumps(config))
    shutil.copytree(root / "llama", root / "bare")
    (root / "bare" / "config.json").unlink()
    return {name: root / name for name in ("llama", "vaultgemma", "own", "bare")}


def built(model: Path, bank: Path, **options: object) -> tuple[dict[str, object], BuildReport]:
    """The first plan of the bank as it stands in its file, and the report."""
    reports: list[BuildReport] = []
    svdbank.build(model, bank, rank=2, device="cpu", on_report=reports.append, **options)  # type: ignore[arg-type]
    return json.loads((bank / "plan.json").read_text()), reports[0]


def test_the_table_is_not_spoken_of(models: dict[str, Path], tmp_path: Path) -> None:
    plan, report = built(models["llama"], tmp_path / "bank")
    assert "decided" not in plan and "doubt" not in plan
    assert (report.decided, report.doubt, report.decided_before) == ("table", None, ())


def test_transformers_is_named_with_its_version_and_class(models: dict[str, Path], tmp_path: Path) -> None:
    import transformers

    said = f"Transformers {transformers.__version__}: VaultGemmaForCausalLM"
    assert svdbank.plan(models["vaultgemma"], tmp_path / "bank", rank=2).decided == said
    plan, report = built(models["vaultgemma"], tmp_path / "bank")
    assert (plan["decided"], report.decided, report.doubt) == (said, said, None)


@pytest.mark.parametrize(("name", "why"), [("own", "my_llama.*own code .auto_map. is not run"), ("bare", "no config.json")])
def test_names_alone_are_said_to_be_that_and_built(models: dict[str, Path], tmp_path: Path, name: str, why: str) -> None:
    planned = svdbank.plan(models[name], tmp_path / "bank", rank=2)
    plan, report = built(models[name], tmp_path / "bank")
    assert plan["decided"] == planned.decided == report.decided == "names"
    for doubt in (plan["doubt"], planned.doubt, report.doubt):
        assert re.search(why, str(doubt))
    known = svdbank.build(models["llama"], tmp_path / "known", rank=2, device="cpu")
    assert sorted(svdbank.open(tmp_path / "bank")) == sorted(known)


def test_a_machine_without_transformers_says_so(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("svdbank.checkpoint.naming.matrices.transformers_version", lambda: None)
    report = svdbank.plan(models["vaultgemma"], tmp_path / "bank", rank=2)
    assert report.decided == "names" and "is not installed" in str(report.doubt)
    assert svdbank.plan(models["llama"], tmp_path / "bank", rank=2).decided == "table"


def test_a_bank_is_extended_whoever_named_it_and_the_difference_is_said(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built(models["llama"], tmp_path / "bank")
    monkeypatch.setattr("svdbank.checkpoint.naming.matrices.KNOWN", ((0, 0), (0, 0)))
    report = svdbank.plan(models["llama"], tmp_path / "bank", rank=2, targets=["all-linear", "embed_tokens"])
    assert report.decided.endswith(": LlamaForCausalLM") and report.decided_before == ("table",)
    _, report = built(models["llama"], tmp_path / "bank", targets=["all-linear", "embed_tokens"])
    assert report.solved == 1 and report.decided_before == ("table",)
    assert json.loads((tmp_path / "bank" / "plan-1.json").read_text())["decided"] == report.decided
