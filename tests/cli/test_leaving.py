"""How a command's process ends: all output out, all handlers run, the exit code kept, and nothing taken down that the system frees."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_PROGRAM = """
import atexit, sys
from svdbank_cli import main as cli

class Left:
    def __del__(self):
        print("taken down", file=sys.stderr)

sys.left = Left()  # what goes when Python takes its modules down

def run(arguments):
    atexit.register(print, "handler")
    print("output")
    return 3

cli.run = run
cli.main()
"""


def test_output_handlers_and_code_are_kept_and_nothing_is_taken_down() -> None:
    done = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (3, "output\nhandler\n", "")


def test_output_that_cannot_be_written_is_an_error_and_says_so(tmp_path: Path) -> None:
    with Path(os.devnull).open() as unwritable:
        done = subprocess.run(
            [sys.executable, "-m", "svdbank", "ls"],
            env={**os.environ, "SVDBANK_HOME": str(tmp_path)},
            stdout=unwritable,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
        )
    assert done.returncode == 1
    assert "Bad file descriptor" in done.stderr


def test_whoever_reads_no_further_ends_it_as_a_closed_pipe_does(tmp_path: Path) -> None:
    end, begin = os.pipe()
    os.close(end)
    with os.fdopen(begin, "w") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "svdbank", "env"], stdout=closed, stderr=subprocess.PIPE, text=True, timeout=120
        )
    assert (done.returncode, done.stderr) == (141, "")
