"""Help is instant and has examples; the generated page is up to date."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from svdbank_cli.main import VERBS
from tests.structure.source import ROOT

HEAVY = ("torch", "zarr", "transformers", "peft", "numpy", "huggingface_hub", "matplotlib", "tqdm")

_PROBE = """
import sys
from svdbank_cli.main import run
code = run(sys.argv[1:])
heavy = [name for name in {heavy!r} if name in sys.modules]
sys.stderr.write(f"loaded {{heavy}}")
sys.exit(code)
"""


@pytest.mark.parametrize("arguments", [[], *([verb] for verb in VERBS)], ids=lambda a: " ".join(a) or "svdbank")
def test_help_has_examples_and_loads_nothing_heavy(arguments: list[str]) -> None:
    probe = _PROBE.format(heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", probe, *arguments, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Examples:" in done.stdout
    assert f"svdbank {' '.join(arguments)}".strip() in done.stdout.partition("Examples:")[2]
    assert done.stderr.endswith("loaded []"), done.stderr


def test_importing_the_package_loads_nothing_heavy() -> None:
    probe = f"import svdbank, sys; print([name for name in {HEAVY!r} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True).stdout == "[]\n"


def test_the_page_of_the_command_line_is_up_to_date() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "docs/generate_cli.py"), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_stale_page_is_noticed(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("generate_cli", ROOT / "docs/generate_cli.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "cli.md").write_text(module.page().replace("--rank", "--ranks"))
    monkeypatch.setattr(module, "TARGET", tmp_path / "cli.md")
    monkeypatch.setattr(sys, "argv", ["generate_cli.py", "--check"])
    assert module.main() == 1


def test_gitignore_anchors_the_build_folder() -> None:
    lines = (ROOT / ".gitignore").read_text().split()
    assert "/build/" in lines
    assert "build/" not in lines, "unanchored, it would hide a package called build"
