"""Runs the code blocks of a page of the documentation.

- ```` ```python ````: blocks of a page share one namespace and one working folder.
- ```` ```bash ````: run by bash, which stops at the first error.
- ```` ```console ````: lines that begin with ``$`` are commands; the lines after one must be what it prints. Numbers may differ; a
  line ``…`` stands for any number of lines.
- ```` ```text ```` directly after ``<!-- output -->`` is what the page's python blocks printed since the last such block.

``<!-- run: no, REASON -->`` above a block leaves it out; ``<!-- run: exit N -->`` expects exit code N.

The working folder holds ``sentence-transformers/all-MiniLM-L6-v2``, a link to the model that make test installs, and
``HuggingFaceTB/SmolLM2-135M``, a link to SmolLM2 cut to two layers. A path that exists wins over a Hub id of the same spelling, so the
pages can say what a reader would type. Text lies there too: ``licences.jsonl``, ``unseen-licences.jsonl``, ``notes/``.

A line of a bash or console block that is nothing but an ``svdbank`` command runs inside the tests' process, which has torch loaded.
Everything else goes to bash.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RUN = {"python", "bash", "console"}
_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[\w-]*)\s*$")
_MARK = re.compile(r"<!--\s*run:\s*(?:(?P<no>no)\s*,\s*(?P<reason>\S.*?)|exit\s+(?P<code>\d+))\s*-->")
_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")
_COMMIT = re.compile(r"\b(?=[0-9a-f]*\d)[0-9a-f]{12,}\b")


@dataclass(frozen=True)
class Block:
    """One fenced block. ``skip`` is the reason why it is not run; ``code`` the exit code expected."""

    page: str
    line: int
    language: str
    text: str
    skip: str | None = None
    code: int = 0
    is_output: bool = False

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    """Every fenced block of a page that has a language we run, and the outputs of python blocks."""
    found: list[Block] = []
    language, start, indent, text, before = None, 0, "", [], ""
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        fence = _FENCE.match(line)
        if language is not None:
            if fence and fence["indent"] == indent and not fence["language"]:
                found += _block(page, start, language, "\n".join(text) + "\n", before)
                language, before = None, ""
            else:
                text.append(line.removeprefix(indent))
        elif fence:
            language, start, indent, text = fence["language"], number, fence["indent"], []
        elif line.strip():
            before = line.strip()
    if language is not None:
        raise AssertionError(f"{page.name}:{start}: a block that does not end")
    return found


def _block(page: Path, line: int, language: str, text: str, before: str) -> list[Block]:
    mark = _MARK.fullmatch(before)
    if before.startswith("<!-- run:") and not mark:
        raise AssertionError(f"{page.name}:{line}: {before} is neither '<!-- run: no, REASON -->' nor '<!-- run: exit N -->'")
    if before == "<!-- output -->":
        return [Block(page.name, line, language, text, is_output=True)]
    if language not in RUN:
        return []
    return [
        Block(page.name, line, language, text, skip=mark["reason"] if mark else None, code=int((mark and mark["code"]) or 0))
    ]


@dataclass
class Runner:
    """Runs the blocks of one page in ``folder``. ``environment`` is added for bash and console blocks."""

    folder: Path
    environment: dict[str, str]
    names: dict[str, Any] = field(default_factory=lambda: {"__name__": "__main__"})
    printed: str = ""

    def run(self, block: Block) -> None:
        if block.skip:
            return
        if block.is_output:
            check_output(str(block), block.text, self.printed)
            self.printed = ""
        elif block.language == "python":
            out = io.StringIO()
            code = compile("\n" * block.line + block.text, str(block), "exec")
            with contextlib.redirect_stdout(out), contextlib.chdir(self.folder):
                exec(code, self.names)
            self.printed += out.getvalue()
        elif block.language == "bash":
            self._shell(block, block.text)
        else:
            for command, expected in commands_of(block.text):
                check_output(f"{block}: {command}", expected, self._shell(block, command))

    def _shell(self, block: Block, script: str) -> str:
        commands = commands_alone(script)
        if commands:
            return "".join(self._command(block, arguments) for arguments in commands)
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=self.folder,
            env=os.environ | self.environment | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=300,
        )
        assert done.returncode == block.code, f"{block}: exit code {done.returncode}\n{done.stdout}"
        return done.stdout

    def _command(self, block: Block, arguments: list[str]) -> str:
        from svdbank_cli.main import run

        out, before = io.StringIO(), dict(os.environ)
        os.environ.update(self.environment)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), contextlib.chdir(self.folder):
                code = run(arguments)
        finally:
            os.environ.clear()
            os.environ.update(before)
        assert code == block.code, f"{block}: exit code {code}\n{out.getvalue()}"
        return out.getvalue()


def commands_alone(script: str) -> list[list[str]]:
    """The arguments of each command, if all that the script does is to run svdbank; else nothing."""
    lines = [line for line in script.replace("\\\n", " ").splitlines() if line.strip() and not line.startswith("#")]
    plain = [line.partition(" #")[0] for line in lines]
    if not all(line.startswith("svdbank ") and not set(line) & set("|&;<>$`(){}*?~") for line in plain):
        return []
    return [shlex.split(line)[1:] for line in plain]


def commands_of(text: str) -> list[tuple[str, str]]:
    """(command, output) of a console block; a command may go on over lines that end in a backslash."""
    found: list[tuple[str, str]] = []
    continued = False
    for line in text.splitlines():
        if line.startswith("$ "):
            found.append((line[2:], ""))
        elif continued:
            found[-1] = (f"{found[-1][0]}\n{line}", "")
        elif found:
            found[-1] = (found[-1][0], found[-1][1] + line + "\n")
        else:
            raise AssertionError(f"a console block begins with a command, not with {line!r}")
        continued = line.endswith("\\") and not found[-1][1]
    return found


def check_output(where: str, expected: str, printed: str) -> None:
    """Every line that a page shows must be printed, in this order and, except at ``…``, without lines in between."""
    wanted, got = _shape(expected), _shape(printed)
    position, gap = 0, True
    for line in wanted:
        if line == "…":
            gap = True
            continue
        if gap:
            while position < len(got) and got[position] != line:
                position += 1
        assert position < len(got) and got[position] == line, f"{where}: not printed: {line!r}\n--- printed:\n{printed}"
        position, gap = position + 1, False


def _shape(text: str) -> list[str]:
    """Lines with figures and runs of spaces made equal: times, sizes and digests change, words do not."""
    lines = (re.sub(r"\s+", " ", _NUMBER.sub("#", _COMMIT.sub("#", line))).strip() for line in text.splitlines())
    return [re.sub(r"# (s|ms|min|h)\b", "# s", re.sub(r"# (B|kB|MB|GB|TB)\b", "# B", line)) for line in lines if line]
