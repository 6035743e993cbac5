"""A run killed by SIGKILL goes on and ends where an undisturbed one ends, to the bit."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import svdbank
from svdbank.bank.reading import Bank
from svdbank.core.errors import CheckpointError, LockedError, OptionError
from svdbank.training import checkpoints

#: More than one pass over the blocks, so that kills and checkpoints fall before, on and after the end of a pass.
STEPS = 16


def options(legal: Path) -> dict[str, Any]:
    return {
        "data": (str(legal),),
        "rank": 4,
        "length": 32,
        "batch_size": 2,
        "steps": STEPS,
        "log_steps": 3,
        "save_steps": 3,
        "dropout": 0.1,
        "held_out_blocks": 4,
        "held_out": 0.8,
        "patience": 100,  # so short a run is measured after every step then
    }


def weights(folder: Path | str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "adapter_model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def killed_at(step: int, model: Path, output: Path, wanted: dict[str, Any]) -> None:
    """Run the command and kill its process as soon as it reports that step."""
    arguments = [str(model), "-o", str(output), "--json"]
    for name, value in wanted.items():
        arguments += ["--" + name.replace("_", "-"), value[0] if isinstance(value, tuple) else str(value)]
    process = subprocess.Popen(
        [sys.executable, "-m", "svdbank_cli.main", "train", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
    )
    assert process.stdout is not None and process.stderr is not None
    for line in process.stdout:
        report = json.loads(line)
        if report.get("stage") == "training" and report["done"] >= step:
            process.send_signal(signal.SIGKILL)
            break
    else:
        pytest.fail(f"ended before step {step}: {process.stderr.read()}")
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    process.stderr.close()


@pytest.fixture(scope="module")
def undisturbed(small: Path, small_bank: Bank, legal: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    torch.set_num_threads(1)
    report = svdbank.train(small, output=tmp_path_factory.mktemp("whole") / "adapter", **options(legal))
    assert STEPS / 3 < report.blocks / 2 < STEPS - 1
    return report


def test_a_killed_run_ends_with_the_weights_of_an_undisturbed_one(
    undisturbed: Any, small: Path, legal: Path, tmp_path: Path
) -> None:
    output = tmp_path / "adapter"
    step = random.Random(2026).randrange(5, STEPS)
    killed_at(step, small, output, options(legal))
    folder = checkpoints.folder_of(output)
    assert not output.exists() and folder.is_dir()
    report = svdbank.train(small, output=output, **options(legal))
    # Saved every 3 steps, and a step is reported before the checkpoint that it may bring is written.
    assert report.resumed_from in ((step - 1) // 3 * 3, step // 3 * 3)
    assert same(weights(output), weights(undisturbed.adapter))
    assert report.held_out == undisturbed.held_out
    assert report.curve == undisturbed.curve
    # The rate that was found at the start, and what was measured and kept before the kill.
    assert report.learning_rate == undisturbed.learning_rate and report.calibration.curve == undisturbed.calibration.curve
    assert report.measured == undisturbed.measured and report.kept_step == undisturbed.kept_step
    assert [state.step for state in report.measured] == list(range(1, STEPS + 1))
    assert not folder.exists()


@pytest.mark.soak
@pytest.mark.parametrize("step", [1, 2, 3, 7, 9, 11, 12, 13, 15, 16])
def test_it_does_not_matter_when_it_is_killed(undisturbed: Any, small: Path, legal: Path, tmp_path: Path, step: int) -> None:
    killed_at(step, small, tmp_path / "adapter", options(legal))
    svdbank.train(small, output=tmp_path / "adapter", **options(legal))
    assert same(weights(tmp_path / "adapter"), weights(undisturbed.adapter))


class StoppedError(Exception):
    pass


@pytest.fixture
def unfinished(small: Path, small_bank: Bank, legal: Path, tmp_path: Path) -> Path:
    """An output whose run was stopped after step 8, with checkpoints of steps 3 and 6."""
    output = tmp_path / "adapter"

    def stop(progress: svdbank.Progress) -> None:
        if progress.stage == "training" and progress.done == 8:
            raise StoppedError

    with pytest.raises(StoppedError):
        svdbank.train(small, output=output, progress=stop, **options(legal))
    found = sorted(path.name for path in checkpoints.folder_of(output).glob("checkpoint-*"))
    assert found == ["checkpoint-3", "checkpoint-6"]
    return output


def test_a_checkpoint_without_every_byte_is_not_taken_for_whole(
    undisturbed: Any, small: Path, legal: Path, unfinished: Path
) -> None:
    newest = checkpoints.folder_of(unfinished) / "checkpoint-6"
    assert checkpoints.is_whole(newest)
    for name in sorted(path.name for path in newest.iterdir()):
        for damage in (torn, removed):
            copy = newest.with_name("checkpoint-7")
            shutil.copytree(newest, copy)
            damage(copy / name)
            assert not checkpoints.is_whole(copy), (name, damage.__name__)
            assert checkpoints.last_whole(newest.parent) == newest
            shutil.rmtree(copy)
    # The Trainer writes into checkpoint-9 when it comes there: what a kill left must be gone by then.
    shutil.copytree(newest, newest.with_name("checkpoint-9"))
    torn(newest.with_name("checkpoint-9") / "optimizer.pt")
    torn(newest / "adapter_model.safetensors")
    report = svdbank.train(small, output=unfinished, **options(legal))
    assert report.resumed_from == 3
    assert same(weights(unfinished), weights(undisturbed.adapter))


def torn(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])


def removed(file: Path) -> None:
    file.unlink()


def test_a_run_does_not_go_on_with_other_options_or_other_text(
    small: Path, legal: Path, unfinished: Path, tmp_path: Path
) -> None:
    wanted = options(legal)
    with pytest.raises(OptionError, match="unfinished run with other alpha, learning_rate, rank"):
        svdbank.train(small, output=unfinished, **wanted | {"rank": 8, "learning_rate": 1e-3})
    text = legal.read_text()
    try:
        legal.write_text(text.replace("software", "hardware"))
        with pytest.raises(OptionError, match="other text: the files changed since"):
            svdbank.train(small, output=unfinished, **wanted)
    finally:
        legal.write_text(text)
    report = svdbank.train(small, output=unfinished, force=True, **wanted | {"steps": 2})
    assert report.resumed_from is None and report.steps == 2


def test_of_two_runs_into_one_output_one_goes_on(tmp_path: Path) -> None:
    """They would write one another's checkpoints. One that never came to a checkpoint binds nobody, once its process is gone."""
    folder = tmp_path / "adapter.checkpoints"
    record = checkpoints.RunRecord("rank = 4\n", "text", 1)
    other = checkpoints.RunRecord("rank = 8\n", "text", 1)
    with checkpoints.begun(folder, record):
        for second in (record, other):
            with (
                pytest.raises(LockedError, match="another process is writing here"),
                checkpoints.begun(folder, second, force=True),
            ):
                pass
        (folder / "before.json").write_text("{}")
    with checkpoints.begun(folder, record):
        assert (folder / "before.json").is_file()
    with checkpoints.begun(folder, other):
        assert {path.name for path in folder.iterdir()} == {"run.json", ".lock", ".lock.owner"}
    (folder / "run.json").unlink()
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(OptionError, match="no folder of checkpoints"), checkpoints.begun(folder, record, force=True):
        pass
    assert [path.name for path in folder.iterdir()] == ["thesis.txt"]


def test_an_adapter_that_appeared_meanwhile_is_said_before_training(
    small: Path, small_bank: Bank, legal: Path, tmp_path: Path
) -> None:
    """A second run may look at its output before the first one has written it, and have its turn after."""
    output = tmp_path / "adapter"

    def appear(progress: svdbank.Progress) -> None:
        assert progress.stage != "loading the model"
        if progress.stage == "reading the text" and progress.done == 1:
            output.mkdir()
            (output / "adapter_config.json").write_text("{}")

    with pytest.raises(OptionError, match="not empty"):
        svdbank.train(small, output=output, progress=appear, **options(legal))
    assert not checkpoints.folder_of(output).exists()


def test_a_full_disk_is_said_to_be_that(tmp_path: Path) -> None:
    """/dev/full is a disk without space: torch's writer says no more than how far it came."""
    full = Path("/dev/full")
    tensors = {"a": torch.zeros(100_000)}
    with pytest.raises(CheckpointError, match="could not be written"), checkpoints.disk_errors(tmp_path):
        torch.save(tensors, full)
    with pytest.raises(RuntimeError, match="another"), checkpoints.disk_errors(tmp_path):
        raise RuntimeError("another")
