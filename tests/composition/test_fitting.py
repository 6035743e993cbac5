"""Weights chosen on text: what is reported is what the adapter that was written gives."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import svdbank
from svdbank.composition.fitting import FitOptions
from svdbank.core.errors import MissingExtraError, OptionError
from svdbank_cli.main import run


def _options(small: Path, legal: Path, **changes: object) -> FitOptions:
    return FitOptions(
        **({"model": str(small), "texts": (str(legal),), "length": 32, "tokens": 400, "evaluations": 9} | changes)
    )  # type: ignore[arg-type]


def test_fitted_scales_are_the_best_tried_and_give_what_they_promise(
    small: Path, legal: Path, trained: dict[str, Path], tmp_path: Path
) -> None:
    seen: list[str] = []
    report = svdbank.stack(
        [trained["law"], trained["med"]],
        output=tmp_path / "stack",
        scale={"law": 0.5},
        fit=_options(small, legal),
        progress=lambda progress: seen.append(progress.stage),
    )
    fit = report.fit
    assert fit is not None and 3 <= len(fit.trials) <= 9 and "fitting" in seen
    assert fit.trials[0].weights == (0.5, 1.0) and fit.start == fit.trials[0].loss
    assert fit.loss == min(trial.loss for trial in fit.trials) < fit.start
    assert tuple(fit.weights.values()) == next(trial.weights for trial in fit.trials if trial.loss == fit.loss)
    assert {name: domain.scale for name, domain in report.domains.items()} == fit.weights
    measured = svdbank.eval(small, data=[legal], adapters={"stack": tmp_path / "stack"}, length=32, tokens=400).scores
    # The same folder, tokens and arithmetic; batches of another adapter in the same pass do not change it.
    assert [score.loss for score in measured] == pytest.approx([fit.base, fit.loss], rel=1e-6)


def test_weights_of_any_method_can_be_fitted(small: Path, legal: Path, trained: dict[str, Path], tmp_path: Path) -> None:
    folders = [trained["law"], trained["code"]]
    report = svdbank.merge(
        folders, output=tmp_path / "m", method="ties", weights=[1, 1], fit=_options(small, legal, evaluations=6)
    )
    assert report.fit is not None and report.weights == report.fit.weights and report.fit.loss <= report.fit.start
    again = svdbank.merge(folders, output=tmp_path / "n", method="ties", weights=list(report.weights.values()))
    assert again.norm == report.norm


def test_what_cannot_be_fitted_is_refused_before_the_model_is_loaded(
    small: Path, legal: Path, trained: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [trained["law"], trained["code"]]
    monkeypatch.setattr("svdbank.lm.gauge.load_model", lambda *args, **options: pytest.fail("the model was loaded"))
    for changes, weights, said in [
        ({"evaluations": 1}, [1, 1], "two evaluations"),
        ({}, [3, 1], "from 0 to 2"),
        ({"texts": ()}, [1, 1], "nothing to measure on"),
        ({"length": 1}, [1, 1], "nothing to predict"),
    ]:
        with pytest.raises(OptionError, match=said):
            svdbank.merge(folders, output=tmp_path / "out", weights=weights, fit=_options(small, legal, **changes))
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(MissingExtraError, match="scipy") as caught:
        svdbank.merge(folders, output=tmp_path / "out", fit=_options(small, legal))
    assert r"svdbank[fit]" in str(caught.value.hint)
    assert not (tmp_path / "out").exists()


def test_the_command_fits(
    small: Path, legal: Path, trained: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["merge", str(trained["law"]), str(trained["code"]), "-o", str(tmp_path / "m"), "--fit", str(legal), "--json"]
    assert run(command) == 2
    assert "--model" in capsys.readouterr().err
    command += ["--model", str(small), "--fit-length", "32", "--fit-tokens", "100", "--fit-trials", "4"]
    assert run(command) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["fit"]["trials"]) <= 5 and report["weights"] == report["fit"]["weights"]
