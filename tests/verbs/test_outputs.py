"""Where verbs write: a name that is empty is never the working folder."""

from __future__ import annotations

from pathlib import Path

import pytest

import svdbank
from svdbank_cli.main import run

#: By verb, the command without its output. Outputs come first: what is to be read need not be there.
COMMANDS = {
    "merge": ["merge", "one", "other"],
    "stack": ["stack", "one", "other"],
    "init": ["init", "bank"],
    "fuse": ["fuse", "model", "adapter"],
    "export": ["export", "adapter", "--to", "lora"],
    "train": ["train", "model", "--data", "text.txt"],
    "extract": ["extract", "model", "finetuned"],
    "build": ["build", "model"],
    "plan": ["plan", "model"],
    "demo": ["demo"],
}


@pytest.mark.parametrize("empty", ["", "  "])
@pytest.mark.parametrize("verb", COMMANDS)
def test_an_empty_output_is_not_the_working_folder(
    verb: str, empty: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("text")
    assert run([*COMMANDS[verb], "-o", empty]) == 2
    printed = capsys.readouterr().err
    assert "no output was named" in printed if (verb, empty) == ("train", "") else "name is empty" in printed
    assert "-o" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_an_adapter_that_is_written_from_python_needs_a_name_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(svdbank.OptionError, match="name is empty"):
        svdbank.merge({"one": "a", "other": "b"}, output="")
    assert not list(tmp_path.iterdir())
