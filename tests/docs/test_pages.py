"""Every code block of README.md and docs/ runs, and prints what the page says."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.docs.blocks import Runner, blocks_of, check_output, commands_alone, commands_of
from tests.lm.models import write_jsonl
from tests.structure.source import ROOT

PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    ROOT / "CHANGELOG.md",
]

#: Pages that show a first build; the others find the bank in the cache.
FROM_NOTHING = {"peft.md", "README.md", "quickstart.md"}

#: The pages' language model is two layers of SmolLM2, and what the pages train is trained this long.
SHORT = {"SVDBANK_TRAIN_STEPS": "2", "SVDBANK_TRAIN_LENGTH": "32", "SVDBANK_TRAIN_BATCH_SIZE": "1"}
MODELS = ("sentence-transformers/all-MiniLM-L6-v2", "HuggingFaceTB/SmolLM2-135M")


@pytest.fixture(scope="module")
def built(minilm: Path, small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with the banks of the pages' models, built once."""
    import svdbank

    folder = tmp_path_factory.mktemp("docs")
    furnish(folder, minilm, small)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SVDBANK_HOME", str(folder / "home"))
        for name in MODELS:
            svdbank.build(folder / name)
    return folder / "home"


def furnish(folder: Path, *models: Path) -> None:
    """What the pages find where they run: the models under the names they have on the Hub."""
    for name, model in zip(MODELS, models, strict=True):
        (folder / name).parent.mkdir()
        (folder / name).symlink_to(model)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory, own_texts_cache: None) -> Path:
    """Licences under the names that pages give to a reader's own text."""
    from svdbank.lm.packaged import licence_texts

    folder, found = tmp_path_factory.mktemp("texts"), [text[:500] for text in licence_texts()[:40]]
    write_jsonl(folder / "licences.jsonl", found[:20])
    write_jsonl(folder / "unseen-licences.jsonl", found[20:24])
    (folder / "notes").mkdir()
    for i, text in enumerate(found[24:]):
        (folder / "notes" / f"{i}.txt").write_text(text)
    return folder


def with_code(page: Path) -> bool:
    return any(not block.is_output for block in blocks_of(page))


@pytest.mark.parametrize(
    "page", [page for page in PAGES if with_code(page)], ids=lambda page: page.relative_to(ROOT).as_posix()
)
def test_every_block_runs(
    page: Path, built: Path, minilm: Path, small: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    furnish(tmp_path, minilm, small)
    for text in texts.iterdir():
        (tmp_path / text.name).symlink_to(text)
    home = tmp_path / ".home"
    if page.name not in FROM_NOTHING:
        shutil.copytree(built, home)
    monkeypatch.setenv("SVDBANK_HOME", str(home))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    runner = Runner(tmp_path, {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "COLUMNS": "120"} | SHORT)
    for block in blocks_of(page):
        runner.run(block)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(page: Path) -> None:
    """Files and headings of this repository; the web is not asked."""
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?://|mailto:)([^)\s]+)\)", text):
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {_slug(heading) for heading in headings}, f"{page.name}: {target}"


def _slug(heading: str) -> str:
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_a_block_that_is_left_out_says_why(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- run: no -->\n```bash\nfalse\n```\n")
    with pytest.raises(AssertionError, match="REASON"):
        blocks_of(page)


def test_a_block_that_fails_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```bash\necho fine\nfalse\necho not here\n```\n")
    with pytest.raises(AssertionError, match="exit code 1"):
        Runner(tmp_path, {}).run(blocks_of(page)[0])
    page.write_text("```python\nassert 1 == 2\n```\n")
    with pytest.raises(AssertionError):
        Runner(tmp_path, {}).run(blocks_of(page)[0])


def test_output_that_a_page_invents_is_noticed() -> None:
    check_output("here", "solved 3 weights in 2.0 s\n…\ndone\n", "solved 37 weights in 10.1 s\nsaid more\ndone\n")
    with pytest.raises(AssertionError, match="not printed"):
        check_output("here", "solved 3 weights\n", "reused 3 weights\n")
    with pytest.raises(AssertionError, match="not printed"):
        check_output("here", "one\ntwo\n", "one\nand a half\ntwo\n")


def test_only_commands_of_svdbank_run_without_a_shell() -> None:
    assert commands_alone("svdbank ls  # banks\nsvdbank rm \\\n 'a b'\n") == [["ls"], ["rm", "a b"]]
    for script in ("svdbank ls | head", "ls\n", "svdbank ls; false", "x=1\nsvdbank rm $x", "svdbank eval * "):
        assert commands_alone(script) == []


def test_a_command_without_a_shell_must_end_as_the_page_says(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```bash\nsvdbank rm nothing\n```\n<!-- run: exit 10 -->\n```bash\nsvdbank rm nothing\n```\n")
    wrong, right = blocks_of(page)
    with pytest.raises(AssertionError, match="exit code 10"):
        Runner(tmp_path, {}).run(wrong)
    Runner(tmp_path, {}).run(right)


def test_a_command_may_go_on_over_lines() -> None:
    assert commands_of("$ one \\\n  more\nout\n$ two\n") == [("one \\\n  more", "out\n"), ("two", "")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    named = re.findall(r"`((?:svdbank|tests|cli|docs|benchmarks)/[\w./-]*)`", page.read_text(encoding="utf-8"))
    made = {"benchmarks/results/", "svdbank/build.py"}  # written by a run; an example of what must not be
    absent = [name for name in named if name not in made and not (ROOT / name).exists()]
    assert not absent, f"{page.name}: {absent}"
