"""What is installed from a wheel is what stands in the tree."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.structure.source import ROOT, copy_tree


def _built(options: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy, so that neither build/ nor egg-info of an earlier run can supply a file that the tree lacks."""
    tree = tmp_path_factory.mktemp("tree")
    copy_tree(tree)
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", *options, "--no-isolation", "--outdir", str(out), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (file,) = out.glob("*.whl")
    return zipfile.ZipFile(file)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    return _built(("--wheel",), tmp_path_factory)


def test_the_wheel_holds_every_file_of_the_tree(wheel: zipfile.ZipFile) -> None:
    patterns = ("*.py", "*.jinja", "*.css")
    expected = {path.relative_to(ROOT).as_posix() for pattern in patterns for path in (ROOT / "svdbank").rglob(pattern)}
    expected |= {"svdbank/py.typed"}
    expected |= {f"svdbank_cli/{path.relative_to(ROOT / 'cli').as_posix()}" for path in (ROOT / "cli").rglob("*.py")}
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert expected <= held, f"not in the wheel: {sorted(expected - held)}"
    assert held <= expected, f"in the wheel, not in the tree: {sorted(held - expected)}"


def test_the_wheel_installs_no_module_called_cli_and_names_its_command(wheel: zipfile.ZipFile) -> None:
    assert {Path(name).parts[0] for name in wheel.namelist() if ".dist-info/" not in name} == {"svdbank", "svdbank_cli"}
    (entry_points,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    assert "svdbank = svdbank_cli.main:main" in wheel.read(entry_points).decode()


def test_the_wheel_carries_the_licence(wheel: zipfile.ZipFile) -> None:
    (licence,) = [name for name in wheel.namelist() if name.endswith("licenses/LICENSE")]
    assert wheel.read(licence) == (ROOT / "LICENSE").read_bytes()


def test_a_source_distribution_makes_the_same_wheel(wheel: zipfile.ZipFile, tmp_path_factory: pytest.TempPathFactory) -> None:
    by_way_of_sdist = _built((), tmp_path_factory)
    files = [{name: archive.read(name) for name in archive.namelist()} for archive in (by_way_of_sdist, wheel)]
    assert files[0] == files[1]
