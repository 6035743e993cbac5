"""A plan of a config.json alone is that of the model's weights, and a build of it says what is lacking."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import svdbank
from svdbank.core.errors import CheckpointError
from svdbank.verbs.plan import PlanReport
from tests.architectures import small

#: Decoders, Conv1D, tied ends, experts, towers; types of the table and others.
TYPES = ("gpt2", "gemma2", "mixtral", "gpt_oss", "qwen3_5_moe", "minimax_m2", "glm_moe_dsa", "gemma3", "llama4")


def weights(report: PlanReport) -> dict[str, tuple[int, int, int]]:
    return {
        name: (family.out_features, family.in_features, family.rank)
        for family in report.plan.families
        for name in family.weights
    }


@pytest.mark.parametrize("model_type", TYPES)
def test_the_plan_is_that_of_the_weights(model_type: str, tmp_path: Path) -> None:
    small.small_model(model_type).save_pretrained(tmp_path / "model")  # type: ignore[operator]
    (tmp_path / "alone").mkdir()
    shutil.copy(tmp_path / "model" / "config.json", tmp_path / "alone")
    for targets in (("all-linear",), (".*",)):
        real, alone = (
            svdbank.plan(tmp_path / name, tmp_path / "bank", rank=4, targets=targets, device="cpu")
            for name in ("model", "alone")
        )
        assert weights(alone) == weights(real) and alone.plan.aliases == real.plan.aliases
        assert (alone.fetch_bytes, alone.write_bytes) == (real.fetch_bytes, real.write_bytes)
        assert real.weights_here and not alone.weights_here


def test_the_file_may_be_named_and_a_build_is_refused(tmp_path: Path) -> None:
    small.small_model("gpt2").config.save_pretrained(tmp_path)  # type: ignore[union-attr,operator]
    assert svdbank.plan(tmp_path / "config.json", tmp_path / "bank", rank=4).families
    for model in (tmp_path, tmp_path / "config.json"):
        with pytest.raises(CheckpointError, match="no weights") as refused:
            svdbank.build(model, tmp_path / "bank", rank=4)
        assert "safetensors beside it" in str(refused.value.hint)
    assert not (tmp_path / "bank").exists()


def test_what_nobody_knows_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "of_my_own", "auto_map": {}}))
    with pytest.raises(CheckpointError, match="knows no model type 'of_my_own'"):
        svdbank.plan(tmp_path, tmp_path / "bank")
    monkeypatch.setattr("svdbank.checkpoint.configured.transformers_version", lambda: None)
    with pytest.raises(CheckpointError, match="not installed"):
        svdbank.plan(tmp_path, tmp_path / "bank")
