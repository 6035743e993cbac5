"""What goes wrong is said while it runs, with what to change, and the state that is written is the best one."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
from safetensors.torch import load_file

import svdbank
from svdbank.bank.reading import Bank
from svdbank.core.errors import OptionError
from svdbank.core.specs import Progress
from svdbank.training.best import FORWARDS, SHARE, blocks_measured, measured_every
from svdbank.training.ending import TrainingError
from svdbank.training.noticing import Noticing
from tests.training.test_training import held_out, load, loss

#: ``patience`` has the text held out measured after every step of so short a run.
RECIPE: dict[str, Any] = {
    "rank": 4,
    "length": 32,
    "batch_size": 2,
    "steps": 3,
    "log_steps": 1,
    "held_out": 0.2,
    "held_out_blocks": 6,
    "seed": 1,
    "dtype": "float32",
    "patience": 100,
}

#: At the first rate the small model's loss, 18.9 on the text held out, jumps by 30, falls by 5 and jumps again; at the other by 29.
JUMPS, HARMS = 1.2, 3.0


def train(model: Path, output: Path, data: Path, **options: Any) -> Any:
    return svdbank.train(model, output=output, data=str(data), **{**RECIPE, **options})


def noticing(clip: float = 0.3) -> tuple[Noticing, list[str]]:
    said: list[str] = []
    return Noticing(said.append, clip=clip), said


def test_a_loss_that_rises_is_said_once_and_one_that_scatters_is_not() -> None:
    drawn = random.Random(0)
    rises, said = noticing()
    for step in range(60):
        rises.logged(step, 3 + 0.05 * max(0, step - 20) + drawn.gauss(0, 0.1), None, 2e-3)
    assert len(said) == 1 and "the training loss rises" in said[0] and "--learning-rate than 0.002" in said[0]
    for _ in range(50):  # 50 runs of 60 points, none of which rises
        flat, said = noticing()
        for step in range(60):
            flat.logged(step, 3 - 0.01 * step + drawn.gauss(0, 0.3), None, 2e-3)
        assert not said


def test_a_gradient_that_is_always_clipped_is_said_at_the_end_with_a_norm_that_would_do() -> None:
    always, said = noticing()
    sometimes, nothing = noticing()
    for step in range(10):
        always.logged(step, 3.0, 2.0 + 0.1 * step, 1e-3)
        sometimes.logged(step, 3.0, 0.2 if step == 5 else 2.0, 1e-3)
    always.ended()
    sometimes.ended()
    assert len(said) == 1 and "--clip 5" in said[0] and not nothing


def test_worse_is_beyond_two_standard_errors() -> None:
    watched, said = noticing()
    watched.measured(10, 0.19, 0.1, 1e-3)
    assert not said
    watched.measured(20, 0.21, 0.1, 1e-3)
    watched.measured(30, 0.31, 0.1, 1e-3)
    assert len(said) == 1 and said[0].startswith("step 20") and watched.said == said


@pytest.mark.parametrize("steps", [1, 2, 5, 40, 300, 10_000])
@pytest.mark.parametrize("a_step", [1, 4, 64])
@pytest.mark.parametrize("blocks", [None, 1, 16, 500])
def test_measuring_while_training_takes_no_more_than_a_tenth_in_all(steps: int, a_step: int, blocks: int | None) -> None:
    measured = blocks_measured(steps, a_step) if blocks is None else blocks
    every = measured_every(steps, a_step, measured)
    times = len([step for step in range(1, steps) if every and step % every == 0])
    if times:
        assert (2 + times) * measured / FORWARDS <= SHARE * steps * a_step
    if steps * a_step >= 2000 and blocks is None:
        assert times >= 2  # a run of some size is looked at on its way


@pytest.fixture(scope="module")
def jumping(small: Path, small_bank: Bank, legal: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("jumping")
    return train(small, folder / "adapter", legal, learning_rate=JUMPS, schedule="constant")


def test_the_best_state_is_the_one_that_is_written(jumping: Any, small: Path, legal: Path) -> None:
    by_step = {state.step: state.loss for state in jumping.measured}
    assert list(by_step) == [1, 2, 3]
    assert jumping.kept == "best" and jumping.kept_step == 2 and not jumping.worse
    assert jumping.held_out.after == min(by_step.values()) == by_step[jumping.kept_step] < jumping.held_out.before
    model = peft.PeftModel.from_pretrained(load(small), jumping.adapter, low_cpu_mem_usage=True)
    # Sums in another order.
    assert loss(model, held_out(small, legal, held_out_blocks=6)) == pytest.approx(jumping.held_out.after, abs=1e-4)
    assert by_step[3] > jumping.held_out.before and any(
        "text held out is worse than before" in notice for notice in jumping.notices
    )


def test_the_last_state_is_written_when_asked_for_and_called_worse(
    jumping: Any, small: Path, legal: Path, tmp_path: Path
) -> None:
    last = train(small, tmp_path / "last", legal, learning_rate=JUMPS, schedule="constant", keep="last")
    assert last.kept == "last" and last.kept_step == 3 and last.worse
    # Nothing about the run itself was another; so wild a one makes much of the order in which threads add up.
    assert last.held_out.after == pytest.approx(jumping.measured[-1].loss, rel=1e-2)
    assert not same(tmp_path / "last", Path(jumping.adapter))


def same(one: Path, other: Path) -> bool:
    weights = [load_file(folder / "adapter_model.safetensors") for folder in (one, other)]
    return all(weights[0][name].equal(weights[1][name]) for name in weights[0])


def test_patience_ends_a_run(small: Path, small_bank: Bank, legal: Path, tmp_path: Path) -> None:
    """So short a run is measured once more than patience lasts: after step 3 of 8, which is one of those that jump up."""
    ended = train(small, tmp_path / "ended", legal, learning_rate=JUMPS, schedule="constant", patience=1, steps=8)
    assert ended.steps == 3 and [state.step for state in ended.measured] == [3]
    assert ended.kept == "nothing" and ended.worse and not (tmp_path / "ended").exists()
    with pytest.raises(OptionError, match="patience waits for the text held out"):
        train(small, tmp_path / "none", legal, held_out=0.0)


def command(model: Path, output: Path, data: Path, *more: str) -> subprocess.CompletedProcess[str]:
    options = [part for name, value in RECIPE.items() for part in ("--" + name.replace("_", "-"), str(value))]
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "svdbank_cli.main",
            "train",
            str(model),
            "-o",
            str(output),
            "--data",
            str(data),
            *options,
            *more,
        ],
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_a_run_that_only_harms_writes_nothing_says_so_and_ends_with_5(
    small: Path, small_bank: Bank, legal: Path, tmp_path: Path
) -> None:
    harm = command(small, tmp_path / "harm", legal, "--learning-rate", str(HARMS), "--schedule", "constant", "--patience", "1")
    assert harm.returncode == 5, harm.stderr[-2000:]
    assert not (tmp_path / "harm").exists() and not (tmp_path / "harm.checkpoints").exists()
    assert "Nothing was written" in harm.stdout and "--keep last" in harm.stdout
    assert "Note: step" in harm.stderr and "a lower --learning-rate than 3" in harm.stderr


def test_a_loss_that_is_no_number_is_said_and_nothing_is_written(
    small: Path, small_bank: Bank, legal: Path, tmp_path: Path
) -> None:
    notes: list[str] = []

    def listen(progress: Progress) -> None:
        if progress.unit == "note":
            notes.append(progress.item)

    with pytest.raises(TrainingError, match="not a number") as caught:
        train(small, tmp_path / "nan", legal, learning_rate=1e30, schedule="constant", progress=listen)
    assert "--learning-rate" in (caught.value.hint or "") and any("no number" in note for note in notes)
    # Nothing is left that a run with the lower rate would be told to go on from.
    assert not (tmp_path / "nan").exists() and not (tmp_path / "nan.checkpoints").exists()


def test_progress_tells_loss_rate_speed_and_time_left(small: Path, small_bank: Bank, legal: Path, tmp_path: Path) -> None:
    items: list[str] = []

    def listen(progress: Progress) -> None:
        if progress.stage == "training":
            items.append(progress.item)

    report = train(small, tmp_path / "a", legal, learning_rate=1e-3, method="lora", steps=3, patience=None, progress=listen)
    assert all(word in items[-1] for word in ("loss ", "rate ", "tokens/s", "left"))
    figures = json.loads((Path(report.adapter) / "training.json").read_bytes())
    assert figures["measuring_share"] > 0 and figures["learning_rate"] == 1e-3 and figures["kept"] == "best"
