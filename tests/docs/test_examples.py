"""Every file of examples/ runs, on two layers of SmolLM2 under the name of the whole, and does what it says."""

from __future__ import annotations

import contextlib
import io
import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest

import svdbank
from tests.structure.source import ROOT

EXAMPLES = ROOT / "examples"

#: What each prints; … is a number. None may go without.
PRINTED = {
    "peft_trainer.py": ["loss # -> #", "same after loading: True"],
    "trl_sft.py": ["# weights, verified", "loss # -> #"],
    "stack.py": ["law and med do not meet", "without med law #"],
    "four_bit.py": ["loss # -> #", "on the full-precision base #"],
    "tour.ipynb": ["law and med do not meet", "taken out, to the bit: True"],
}

#: These train twice each; `make release-check` runs all of them.
LONG = {"tour.ipynb", "stack.py"}


def code_of(notebook: Path) -> list[str]:
    """The code cells, in order."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_each_example_is_run_and_stands_in_the_list() -> None:
    found = {path.name for path in EXAMPLES.iterdir() if path.suffix in {".py", ".ipynb"}}
    assert found == set(PRINTED)
    assert set(re.findall(r"\]\(([\w.]+)\)", (EXAMPLES / "README.md").read_text(encoding="utf-8"))) == found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.soak] if n in LONG else []) for n in sorted(PRINTED)])
def test_an_example_runs(
    name: str, small: Path, small_bank: svdbank.Bank, own_texts_cache: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "HuggingFaceTB" / "SmolLM2-135M"
    model.parent.mkdir()
    model.symlink_to(small)
    monkeypatch.setenv("SVDBANK_HOME", str(tmp_path / "home"))
    shutil.copytree(small_bank.path, tmp_path / "bank")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [name])
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        if name.endswith(".py"):
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        else:
            names: dict[str, object] = {"__name__": "__main__"}
            for number, code in enumerate(code_of(EXAMPLES / name)[1:], 2):
                exec(compile(code, f"{name}, cell {number}", "exec"), names)
    printed = re.sub(r"[ ]+", " ", re.sub(r"-?\d+(?:\.\d+)?", "#", out.getvalue()))
    for line in PRINTED[name]:
        assert line in printed, printed
    for first, last in re.findall(r"loss (\d+\.\d+) -> (\d+\.\d+)", out.getvalue()):
        assert float(last) < float(first)


def test_the_notebook_installs_first_and_names_no_place_of_a_machine() -> None:
    text = (EXAMPLES / "tour.ipynb").read_text(encoding="utf-8")
    assert code_of(EXAMPLES / "tour.ipynb")[0].startswith("%pip install ") and "svdbank[peft]" in text
    assert not re.search(r"(?<![\w.])/(?:home|root|work|tmp|Users)/", text)
    assert all(not cell.get("outputs") for cell in json.loads(text)["cells"]), "outputs are of the machine that ran it"
