"""Every code block of README.md and docs/ runs, and prints what the page says."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.docs.blocks import Runner, blocks_of, check_output, commands_of
from tests.structure.source import ROOT

PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    ROOT / "CHANGELOG.md",
]

#: Pages that show a first build; the others find the bank in the cache.
FROM_NOTHING = {"README.md", "quickstart.md"}


@pytest.fixture(scope="module")
def built(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with the bank of the pages' model, built once."""
    import svdbank

    folder = tmp_path_factory.mktemp("docs")
    link = folder / "sentence-transformers" / "all-MiniLM-L6-v2"
    link.parent.mkdir()
    link.symlink_to(minilm)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SVDBANK_HOME", str(folder / "home"))
        svdbank.build(link)
    return folder / "home"


def with_code(page: Path) -> bool:
    return any(not block.is_output for block in blocks_of(page))


@pytest.mark.parametrize(
    "page", [page for page in PAGES if with_code(page)], ids=lambda page: page.relative_to(ROOT).as_posix()
)
def test_every_block_runs(page: Path, built: Path, minilm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = tmp_path / "sentence-transformers" / "all-MiniLM-L6-v2"
    link.parent.mkdir()
    link.symlink_to(minilm)
    home = tmp_path / ".home"
    if page.name not in FROM_NOTHING:
        shutil.copytree(built, home)
    monkeypatch.setenv("SVDBANK_HOME", str(home))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    runner = Runner(tmp_path, {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "COLUMNS": "120"})
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


def test_a_command_may_go_on_over_lines() -> None:
    assert commands_of("$ one \\\n  more\nout\n$ two\n") == [("one \\\n  more", "out\n"), ("two", "")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    named = re.findall(r"`((?:svdbank|tests|cli|docs|benchmarks)/[\w./-]*)`", page.read_text(encoding="utf-8"))
    made = {"benchmarks/results/", "svdbank/build.py"}  # written by a run; an example of what must not be
    absent = [name for name in named if name not in made and not (ROOT / name).exists()]
    assert not absent, f"{page.name}: {absent}"
