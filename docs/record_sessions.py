"""Writes docs/transcripts/: what a newcomer's commands print, as they ran, each session in a folder of its own.

python docs/record_sessions.py [SESSION …] --models FOLDER [--wheel FILE]

FOLDER holds the models under their names on the Hub (``HuggingFaceTB/SmolLM2-135M``, ``sentence-transformers/all-MiniLM-L6-v2``): a
path that exists wins over a Hub id, so that the commands are those that a reader types. ``first-minutes`` needs a wheel, which it
installs into an environment of its own. A command that ends with another code than the session says ends the recording, and nothing of
that session is written.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
TARGET = Path(__file__).with_name("transcripts")
SMOLLM2, MINILM = "HuggingFaceTB/SmolLM2-135M", "sentence-transformers/all-MiniLM-L6-v2"
#: Lines of one command's output that are shown; the middle of more is left out, and said so.
SHOWN = 24


@dataclass(frozen=True)
class Step:
    """What is said before a command, the command, and how it must end."""

    said: str
    command: str
    code: int = 0


@dataclass(frozen=True)
class Session:
    title: str
    lead: str
    steps: tuple[Step, ...]
    #: What the recording met, and what became of it.
    stumbles: tuple[str, ...] = ()


def snippet(page: Path) -> str:
    """The first Python block of a page."""
    found = re.search(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    return found[1]


TEXT = (
    "python - <<'EOF'\n"
    "import pathlib\n"
    "for name, line in {'law': 'Clause {}: the licensee shall keep notice {}.', 'med': 'Case {}: a fever for {} days, no rash.'}.items():\n"
    "    pathlib.Path(f'{name}.txt').write_text(''.join(line.format(i, i + 3) + '\\n\\n' for i in range(300)))\n"
    "EOF"
)
SAME = (
    "import svdbank, torch; a, b = svdbank.read_adapter('law'), svdbank.read_adapter('law-again'); "
    "print(all(torch.equal(a.delta(w), b.delta(w)) for w in a.weights))"
)
SHORT = "--steps 10 --length 64 --batch-size 2"

SESSIONS = {
    "first-minutes": Session(
        "The first five minutes",
        "Somebody with nothing but README.md and the wheel, in an empty folder: installation, bank, a trained step, two domains, one taken out.",
        (
            Step(
                "An environment of its own.",
                "python -m venv venv && . venv/bin/activate && pip install -q 'svdbank[peft] @ file://'$WHEEL",
            ),
            Step("What is here?", ". venv/bin/activate && svdbank env"),
            Step("The first snippet of README.md, saved as `first.py`.", ". venv/bin/activate && time python first.py"),
            Step("The bank that it built is in the cache, by the model's name.", ". venv/bin/activate && svdbank ls"),
            Step("Some text of two domains.", TEXT),
            Step(
                "Two adapters, the second in directions that the first leaves free.",
                f". venv/bin/activate && svdbank train {SMOLLM2} -r 16 -o law --data law.txt {SHORT}",
            ),
            Step("", f". venv/bin/activate && svdbank train {SMOLLM2} -r 16 -o med --data med.txt --on-top-of law {SHORT}"),
            Step("Do they meet?", ". venv/bin/activate && svdbank compare law med"),
            Step("Both together, then one taken out.", ". venv/bin/activate && svdbank stack law med -o domains"),
            Step("", ". venv/bin/activate && svdbank stack domains --drop med -o law-again"),
            Step("What is left is the first one, to the bit.", f'. venv/bin/activate && python -c "{SAME}"'),
        ),
        (
            "`make wheel` first installed all that the tests need. A wheel needs `build` alone: a quarter of a minute now.",
            "`build` spoke of 156.4 MB and `ls` of 157.4: the one counts vectors, the other every file on the disk. Both say so now.",
            "The time left of a training run was `0.0 min`. It is in seconds now.",
            "Which adapter took which directions was said by nobody: `init --beside` and `--band auto` say the band they take.",
        ),
    ),
    "4bit": Session(
        "A 4-bit base",
        "The bank of the full-precision weights, an adapter trained on the base in 4 bits, then measured on the full one.",
        (
            Step("", f"svdbank build {SMOLLM2}"),
            Step("", TEXT),
            Step("", f"svdbank train {SMOLLM2} -r 16 -o law --data law.txt --load-in 4bit {SHORT}"),
            Step(
                "The same adapter on the full-precision base.",
                f"svdbank eval {SMOLLM2} --adapter law --data law=law.txt --length 64 --tokens 1000",
            ),
            Step("What a bank of the 4-bit weights would be: refused, with what to do.", "svdbank build ./quantised", 1),
        ),
        (
            "That the base's values could not be compared came as a Python warning, with a path into the package. It is a note now, and"
            " [Error messages](../troubleshooting.md) says that nothing is wrong.",
            "`eval` of one long window showed its error as `nan`. Where one window or document is all there is, no error is shown.",
            "bitsandbytes says on a CPU that a package `kernels` is missing. It works without it.",
        ),
    ),
    "cluster": Session(
        "A cluster",
        "Two workers that know of each other only by the bank's folder; one of them is killed.",
        (
            Step("What there is to do.", f"svdbank plan {MINILM} --rank 64 | tail -5"),
            Step(
                "Two workers; the second is killed while it is at work.",
                f"svdbank build {MINILM} --rank 64 -o shared.bank --shard 1/2 > one.log 2>&1 & "
                f"svdbank build {MINILM} --rank 64 -o shared.bank --shard 2/2 > two.log 2>&1 & "
                "second=$!; until ls shared.bank/records/* > /dev/null 2>&1; do sleep 0.2; done; kill -KILL $second; wait %1; tail -2 one.log",
            ),
            Step("The first took over what the second held, and closed the bank.", "svdbank info shared.bank | head -4"),
            Step("", f"svdbank verify shared.bank --source {MINILM} --sample 20%"),
        ),
    ),
    "damage": Session(
        "A damaged bank",
        "One byte of a bank is changed. It is noticed, named, and mended from the model.",
        (
            Step("", f"svdbank build {MINILM} --rank 16 --targets query -o small.bank"),
            Step("", "svdbank verify small.bank --data"),
            Step(
                "A bad sector.",
                "printf x | dd of=small.bank/encoder.layer.attention.self.query-384x384/left/c/2/0/0 bs=1 seek=999 conv=notrunc status=none",
            ),
            Step(
                "Whoever looks this weight up is told at once.",
                "python -c \"import svdbank; svdbank.open('small.bank')['encoder.layer.2.attention.self.query.weight'].left(16)\" 2>&1 | tail -1",
                1,
            ),
            Step("", "svdbank verify small.bank --data", 4),
            Step("What would be done?", f"svdbank repair small.bank --source {MINILM} --dry-run", 4),
            Step("", f"svdbank repair small.bank --source {MINILM}"),
            Step("", "svdbank verify small.bank --data"),
            Step("A lost manifest is another matter: nothing else says which bytes are right.", "rm small.bank/manifest.json"),
            Step("", "svdbank info small.bank", 4),
            Step("", f"svdbank repair small.bank --source {MINILM}"),
            Step("", "svdbank verify small.bank --data"),
        ),
    ),
}


def record(name: str, models: Path, wheel: Path | None) -> None:
    session = SESSIONS[name]
    with tempfile.TemporaryDirectory(prefix="session-") as scratch:
        folder = Path(scratch) / "work"
        folder.mkdir()
        for model in models.glob("*/*"):
            (folder / model.parent.name).mkdir(exist_ok=True)
            (folder / model.parent.name / model.name).symlink_to(model.resolve())
        environment = {
            **{k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "SVDBANK_HOME")},
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "SVDBANK_HOME": str(Path(scratch) / "svdbank"),
            "HF_HUB_OFFLINE": "1",
            "COLUMNS": "110",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        }
        if name == "first-minutes":
            if wheel is None:
                raise SystemExit("first-minutes needs --wheel")
            environment.pop("PYTHONPATH", None)
            environment |= {"WHEEL": str(wheel.resolve()), "PIP_CONSTRAINT": str(ROOT / "constraints.txt")}
            (folder / "first.py").write_text(snippet(ROOT / "README.md"), encoding="utf-8")
        if name == "4bit":
            _quantised(folder / "quantised", models / SMOLLM2)
        parts = []
        for step in session.steps:
            hidden = {str(folder): "~", scratch: "~/.cache", str(Path.home()): "~"}
            parts.append(played(step, folder, environment, hidden))
    TARGET.mkdir(exist_ok=True)
    (TARGET / f"{name}.md").write_text(page(session, parts), encoding="utf-8")


def _quantised(folder: Path, model: Path) -> None:
    """A configuration as bitsandbytes writes it, beside the same weights: it is by this that such a checkpoint is known."""
    import json

    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (folder / "config.json").write_text(json.dumps(config))


def played(step: Step, folder: Path, environment: dict[str, str], hidden: dict[str, str]) -> str:
    """Run a step; what is shown of it."""
    sys.stderr.write(f"$ {step.command}\n")
    done = subprocess.run(
        ["bash", "-uo", "pipefail", "-c", step.command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
    )
    if done.returncode != step.code:
        raise SystemExit(f"exit code {done.returncode}, not {step.code}:\n{done.stdout}")
    printed = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)
    for place, name in hidden.items():
        printed = printed.replace(place, name)
    lines = [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in printed.rstrip().split("\n")]
    lines = (
        [line for line in lines if not line.startswith("WARNING: Location 'file:")] if printed.strip() else []
    )  # pip, of its mirror
    if len(lines) > SHOWN:
        half = SHOWN // 2
        lines = [*lines[:half], f"… {len(lines) - 2 * half} more lines …", *lines[-half:]]
    command = step.command.replace(". venv/bin/activate && ", "").replace(
        "file://'$WHEEL", "file:///path/to/svdbank-0.1.0-py3-none-any.whl'"
    )
    shown = "\n".join([f"$ {command}", *lines] + ([f"(exit code {step.code})"] if step.code else []))
    return (f"{step.said}\n\n" if step.said else "") + f"```text\n{shown}\n```\n"


def page(session: Session, parts: list[str]) -> str:
    machine = f"{os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}, torch {version('torch')}"
    when = datetime.date.today().isoformat()
    head = [
        f"# {session.title}\n",
        f"{session.lead}\n",
        f"Written by `python docs/record_sessions.py`, {when}, at svdbank {version('svdbank')}; {machine}. Other work ran beside it: times say"
        " little. The Hub was not asked: folders of these names hold MiniLM and SmolLM2-135M-Instruct.\n",
    ]
    tail = ["## Stumbles\n", *(f"- {stumble}" for stumble in session.stumbles), ""] if session.stumbles else []
    return "\n".join([*head, *parts, *tail])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sessions", nargs="*", metavar="SESSION", help=", ".join(SESSIONS))
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--wheel", type=Path)
    options = parser.parse_args()
    for name in options.sessions or SESSIONS:
        record(name, options.models, options.wheel)


if __name__ == "__main__":
    main()
