"""What the builder of the site does not ask: that each page has a place in the navigation, and that quoted messages are real."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest

from tests.structure.source import ROOT, modules, tree

DOCS = ROOT / "docs"
SITE = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]
TROUBLES = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")


def pages(entries: list[Any]) -> Iterator[str]:
    for entry in entries:
        for value in entry.values():
            if isinstance(value, str):
                yield value
            else:
                yield from pages(value)


def test_every_page_is_in_the_navigation_once_and_no_other() -> None:
    named = list(pages(SITE["nav"]))
    assert len(named) == len(set(named))
    assert set(named) == {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}


def test_the_repository_has_one_address() -> None:
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
    assert urls["Source"] == SITE["repo_url"] and urls["Documentation"] == SITE["site_url"]
    assert all(url.startswith((SITE["repo_url"], SITE["site_url"])) for url in urls.values())
    for page in [ROOT / "README.md", *DOCS.rglob("*.md")]:
        for link in re.findall(
            rf"{re.escape(SITE['repo_url'])}/(?:blob|tree)/main/([\w./-]+)", page.read_text(encoding="utf-8")
        ):
            assert (ROOT / link).exists(), f"{page.name}: {link}"


@cache
def messages() -> tuple[str, ...]:
    """Every text in the code that could be an error, with … for what is filled in."""
    found = []
    for path in (*modules().values(), *(ROOT / "cli").glob("*.py")):
        inside = {id(part) for node in ast.walk(tree(path)) if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
                found.append(node.value)
    return tuple(found)


def is_in_code(message: str) -> bool:
    """Whether some text of the code is this message; what it fills in may be more than one thing."""
    plain = re.sub(r"[…\s]+", "…", message).strip("…")
    return any(re.sub(r"[…\s]+", "…", text).strip("…") == plain for text in messages())


@pytest.mark.parametrize("message", re.findall(r"^### `(.*)`$", TROUBLES, re.MULTILINE))
def test_each_message_of_the_page_of_errors_is_one_of_the_code(message: str) -> None:
    assert is_in_code(message)


def test_a_message_that_the_code_does_not_have_is_noticed() -> None:
    assert not is_in_code("…: no bonk here")
    assert not is_in_code("no bank")
