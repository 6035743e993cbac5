"""A clone is usually called like the package: an editable install must be found from the folder above it, too."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.structure.source import copy_tree


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree called ``svdbank``, installed editable into the environment ``venv`` beside it."""
    tree = tmp_path_factory.mktemp("parent") / "svdbank"
    tree.mkdir()
    copy_tree(tree)
    venv = tree.parent / "venv"
    _run(sys.executable, "-m", "venv", "--without-pip", str(venv))
    (site,) = (venv / "lib").glob("python*/site-packages")
    # Whatever svdbank imports comes from the environment that runs the tests; its own .pth files have no effect through this one.
    (site / "zz-dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = str(venv / "bin" / "python")
    _run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-build-isolation", "-e", str(tree))
    return tree


def _run(*command: str, cwd: Path | None = None) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_an_editable_install_is_found_from_the_folder_above_a_clone_called_svdbank(clone: Path) -> None:
    python = str(clone.parent / "venv" / "bin" / "python")
    printed = _run(python, "-c", "import svdbank, svdbank_cli; svdbank.open; print(svdbank.__file__)", cwd=clone.parent)
    assert Path(printed.strip()).resolve() == clone / "svdbank" / "__init__.py"
    assert _run(str(clone.parent / "venv" / "bin" / "svdbank"), "--help", cwd=clone.parent).startswith("Usage: svdbank ")


def test_a_file_that_is_new_in_the_tree_needs_no_second_install(clone: Path) -> None:
    for package in ("svdbank/added", "cli/added"):
        (clone / package).mkdir()
        (clone / package / "__init__.py").touch()
    _run(str(clone.parent / "venv" / "bin" / "python"), "-c", "import svdbank.added, svdbank_cli.added", cwd=clone.parent)


def test_an_editable_install_makes_no_module_called_cli(clone: Path) -> None:
    code = "import importlib.util as u, sys; sys.exit(u.find_spec('cli') is not None)"
    _run(str(clone.parent / "venv" / "bin" / "python"), "-c", code, cwd=clone.parent)
