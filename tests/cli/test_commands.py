"""The commands as a user types them: output, JSON, exit codes, errors."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

import svdbank
from svdbank.training.report import TrainReport
from svdbank_cli.eval import _error
from svdbank_cli.main import _noted, run
from svdbank_cli.output import printable


@pytest.fixture(scope="module")
def bank(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "bank"
    assert run(["build", str(minilm), "-o", str(folder), "--rank", "8", "-q"]) == 0
    return folder


def test_build_json_is_lines_of_progress_and_then_a_summary(
    minilm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["build", str(minilm), "-o", str(tmp_path / "bank"), "--rank", "4", "--targets", "query", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    done = [line["done"] for line in lines[:-1] if line["stage"] == "decompose"]
    # A number comes again where a worker waits for bytes meanwhile: the line then says who waits.
    assert done == sorted(done) and sorted(set(done)) == list(range(7))
    assert lines[-1]["solved"] == 6 and lines[-1]["bank"] == str(tmp_path / "bank")


def test_a_second_build_says_what_it_reused(minilm: Path, bank: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["build", str(minilm), "-o", str(bank), "--rank", "8"]) == 0
    assert "reused 37 of 37 weights" in capsys.readouterr().out


@pytest.mark.parametrize("command", [["info"], ["verify"], ["verify", "--data"], ["ls"], ["env"]])
def test_json_is_one_document_on_stdout(command: list[str], bank: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*command, *([str(bank)] if command[0] in ("info", "verify") else []), "--json"]) == 0
    json.loads(capsys.readouterr().out)


def test_dry_run_is_plan_and_writes_nothing(minilm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(minilm), "-o", str(tmp_path / "bank"), "--rank", "4", "--json"]
    assert run(["build", "--dry-run", *arguments]) == 0
    dry = json.loads(capsys.readouterr().out)
    assert run(["plan", *arguments]) == 0
    plan = json.loads(capsys.readouterr().out)
    timed = ("seconds", "free_bytes")  # measured anew at each call
    assert {k: v for k, v in dry.items() if k not in timed} == {k: v for k, v in plan.items() if k not in timed}
    assert not (tmp_path / "bank").exists()


def test_plan_shows_families_skips_with_reasons_and_costs(minilm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", str(minilm)]) == 0
    shown = capsys.readouterr().out
    for part in ("1536x384", "37 of", "43.1 MB to read", "free", "memory", "time", "an embedding", "a vector"):
        assert part in shown


def test_init_says_which_band_it_found_free(bank: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    law, med = str(tmp_path / "law"), str(tmp_path / "med")
    assert run(["init", str(bank), "-r", "4", "-o", law]) == 0 and "band" not in capsys.readouterr().err
    assert run(["init", str(bank), "-r", "4", "--beside", law, "-o", med]) == 0
    shown = capsys.readouterr()
    assert "band 4:8, free beside 1 adapter" in shown.err and shown.out == f"{med}\n"


def test_a_warning_of_ours_is_a_note_and_of_others_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    from svdbank.peft import UnverifiedBaseWarning

    _noted("names alone", UnverifiedBaseWarning, "injection.py", 78)
    _noted("old", FutureWarning, "theirs.py", 3)
    ours, theirs = capsys.readouterr().err.split("\n", 1)
    assert ours == "Note: names alone" and theirs.startswith("theirs.py:3: FutureWarning: old")


def test_init_writes_an_adapter_and_refuses_to_overwrite_it(
    bank: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["init", str(bank), "-r", "4", "-o", str(tmp_path / "adapter")]
    assert run(arguments) == 0
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size > 0
    assert run(arguments) == 2
    assert "--force" in capsys.readouterr().err
    assert run([*arguments, "--force"]) == 0


@pytest.mark.parametrize(
    "arguments, code, said",
    [
        (["build", "/nowhere/model"], 1, "/nowhere/model"),
        (["info", "/nowhere/bank"], 10, "no such path"),
        (["info", "/nowhere/bank"], 10, "svdbank ls shows"),
        (["open"], 2, "no such command 'open'"),
        (["biuld"], 2, "did you mean 'build'?"),
        (["build"], 2, "Missing argument 'MODEL'"),
        (["plan", "{minilm}", "--rank", "0"], 2, "positive number"),
        (["plan", "{minilm}", "--rank", "many"], 2, "neither a number nor 'all'"),
        (["plan", "{minilm}", "--targets", "q_proj"], 2, "query ×6"),
        (["plan", "{minilm}", "--solver", "magic"], 2, "magic"),
        (["build", "{minilm}", "--device", "cuda", "-o", "{tmp}/x"], 2, "no CUDA device"),
        (["init", "{bank}", "-r", "9", "-o", "{tmp}/a"], 1, "--rank 9"),
    ],
)
def test_errors_say_what_and_the_next_command_and_have_their_exit_code(
    arguments: list[str], code: int, said: str, minilm: Path, bank: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [argument.format(minilm=minilm, bank=bank, tmp=tmp_path) for argument in arguments]
    assert run(filled) == code
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.out == ""
    assert "Traceback" not in captured.err


def test_damage_has_exit_code_4_and_names_the_file(minilm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "bank"
    assert run(["build", str(minilm), "-o", str(folder), "--rank", "2", "--targets", "query", "-q"]) == 0
    lost = next(iter(folder.glob("*/left/c/3/0/0")))
    lost.unlink()
    assert run(["verify", str(folder)]) == 4
    shown = capsys.readouterr().out
    assert lost.relative_to(folder).as_posix() in shown and "missing" in shown and f"svdbank repair {folder} --source" in shown


def test_another_base_has_exit_code_12(minilm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.building.small import write_small_checkpoint

    folder = tmp_path / "bank"
    assert run(["build", str(write_small_checkpoint(tmp_path / "m", minilm)), "-o", str(folder), "--rank", "2", "-q"]) == 0
    assert run(["build", str(minilm), "-o", str(folder), "--rank", "2", "-q"]) == 12
    assert "another model" in capsys.readouterr().err


def test_a_lock_has_exit_code_11(minilm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = "import sys, pathlib\nfrom svdbank.core.locks import locked\n"
    code += "with locked(pathlib.Path(sys.argv[1])):\n    print(flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "bank")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        assert run(["build", str(minilm), "-o", str(tmp_path / "bank"), "-q"]) == 11
        holder.kill()
    assert f"process {holder.pid}" in capsys.readouterr().err


def test_ctrl_c_has_exit_code_130_and_says_that_work_is_kept(minilm: Path, tmp_path: Path) -> None:
    import signal

    command = [
        sys.executable,
        "-m",
        "svdbank_cli.main",
        "build",
        str(minilm),
        "-o",
        str(tmp_path / "bank"),
        "--rank",
        "all",
        "--jobs",
        "1",
        "--json",
    ]
    # A shell starts what it puts into the background with SIGINT ignored, which children inherit: this suite may have been.
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert any('"decompose"' in line for line in process.stdout)
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        said = process.stderr.read()
    assert process.returncode == 130, said
    assert "goes on from there" in said and "Traceback" not in said
    assert not (tmp_path / "bank" / ".lock").exists()


def test_a_traceback_shows_only_when_asked_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("SVDBANK_DEBUG", "1")
    assert run(["info", "/nowhere"]) == 10
    assert "Traceback" in capsys.readouterr().err


def test_options_are_read_from_the_environment(
    minilm: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SVDBANK_PLAN_RANK", "5")
    assert run(["plan", str(minilm), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["plan"]["options"]["rank"] == 5


def test_a_disk_budget_that_is_no_size_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    for budget in ("9" * 400, "-1", "nan", "1e9", ""):
        assert run(["plan", "org/model", f"--disk-budget={budget}"]) == 2
        assert "is not a size" in capsys.readouterr().err


def test_control_characters_from_outside_do_not_reach_the_terminal() -> None:
    assert printable("model\x1b[2J\x07.weight\u202e") == "model\\x1b[2J\\x07.weight\\u202e"


def test_a_terminal_gets_a_bar_and_a_pipe_gets_lines(minilm: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "svdbank_cli.main", "build", str(minilm), "--rank", "2", "--targets", "query", "-o"]
    piped = subprocess.run([*command, str(tmp_path / "piped")], capture_output=True, text=True, check=True)
    assert "decompose: 6 of 6 weights" in piped.stderr and "\r" not in piped.stderr
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    with subprocess.Popen([*command, str(tmp_path / "terminal")], stdout=subprocess.DEVNULL, stderr=child) as process:
        os.close(child)
        shown = b""
        while True:
            try:
                chunk = os.read(parent, 4096)
            except OSError:  # the terminal closes with its last writer
                break
            if not chunk:
                break
            shown += chunk
    os.close(parent)
    assert process.returncode == 0
    assert b"100%" in shown and b"6/6" in shown


def test_one_document_alone_has_no_error_to_show() -> None:
    assert (_error(float("nan")), _error(0.1)) == ("", " ± 0.1000")


@pytest.mark.parametrize(("error", "shown"), [(0.25, "10.90 ± 0.25 s"), (float("nan"), "10.90 s")])
def test_a_single_timed_step_has_no_error_to_show(
    error: float, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = TrainReport(
        adapter="law",
        model="org/model",
        method="mica",
        rank=16,
        bank=None,
        trainable_parameters=1000,
        blocks=1,
        length=32,
        steps=2,
        tokens=64,
        processes=1,
        dtype="float32",
        seconds=21.8,
        step_seconds=10.9,
        step_seconds_error=error,
        peak_bytes=1,
        resumed_from=None,
        held_out=None,
        retained=(),
        curve=(),
        learning_rate=1e-3,
        calibration=None,
        kept="last",
        kept_step=2,
        worse=False,
        measured=(),
        measuring_share=0.0,
        calibration_share=0.0,
        notices=(),
        stages={},
    )
    monkeypatch.setattr(svdbank, "train", lambda *_, **__: report)
    assert run(["train", "org/model", "-o", "law", "--data", "licences.jsonl"]) == 0
    assert f"step      {shown};" in capsys.readouterr().out
