"""What a name from outside means, whoever asks: a path that is there, a repository of the Hub, a page's address, or nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from svdbank.core.errors import CheckpointError
from svdbank.core.places import Nowhere, OnDisk, OnHub, WebAddress, locate, refusal


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for there in ("org/here", "org/here@v1", "word", "with space"):
        Path(there).mkdir(parents=True)
    Path("model.safetensors").touch()


@pytest.mark.parametrize(
    "name", ["org/here", "org/here@v1", "word", "with space", "./org/here", "org/here/", "model.safetensors", ".", "~/word"]
)
def test_a_path_that_exists_wins(name: str) -> None:
    assert locate(name) == OnDisk(Path(name).expanduser()) == locate(Path(name))


@pytest.mark.parametrize(
    ("name", "repository", "revision"),
    [
        ("org/name", "org/name", None),
        ("org/name@main", "org/name", "main"),
        ("org/name@refs/pr/1", "org/name", "refs/pr/1"),
        ("org/here@v2", "org/here", "v2"),
        ("hf://org/here", "org/here", None),
        ("hf://org/name@v1.0", "org/name", "v1.0"),
        ("hf://org/model.safetensors", "org/model.safetensors", None),
    ],
)
def test_a_repository_is_read_in_its_parts(name: str, repository: str, revision: str | None) -> None:
    place = locate(name)
    assert place == OnHub(repository, revision)
    assert str(place) == name.removeprefix("hf://")


@pytest.mark.parametrize(
    "name",
    [
        "",
        "  ",
        "gpt2",
        "gpt2@main",
        "./org/name",
        "../x/y",
        "/a/b",
        ".hidden/x",
        "~/x",
        "~nobody/x",
        "a/b/c",
        "org/model.safetensors",
    ],
)
def test_what_can_only_be_a_path_is_no_repository(name: str) -> None:
    place = locate(name)
    assert isinstance(place, Nowhere) and place.is_path


def test_a_path_object_is_never_a_repository() -> None:
    assert locate(Path("org/name")) == Nowhere("org/name", Path("org/name"), is_path=True)


@pytest.mark.parametrize(
    "name", ["a/b c", "a/..", "a/b@", "a/b@../x", "a/b@x@y", "a/b\n", "a/\0", "é/b", "-a/b", "a/" + "b" * 97]
)
def test_what_is_shaped_like_an_id_and_is_none_is_said_so(name: str) -> None:
    place = locate(name)
    assert isinstance(place, Nowhere) and not place.is_path
    assert repr(name) in str(refusal(place)) and refusal(place).exit_code == 2


@pytest.mark.parametrize("name", ["hf://", "hf://gpt2", "hf://./org/here", "hf://a/b/c", "hf://datasets/a/b"])
def test_the_hub_was_meant_though_it_has_no_such_name(name: str) -> None:
    place = locate(name)
    assert isinstance(place, Nowhere) and not place.is_path


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("https://huggingface.co/org/name/tree/main", "org/name@main"),
        ("hf://https://huggingface.co/org/name", "org/name"),
        ("huggingface.co/org/name", "org/name"),
        ("https://huggingface.co/org/name/resolve/main/model.safetensors", "org/name@main"),
        ("https://huggingface.co/datasets/org/name", None),
        ("http://example.org/model.safetensors", None),
    ],
)
def test_the_address_of_a_page_says_what_it_shows(address: str, shown: str | None) -> None:
    place = locate(address)
    assert isinstance(place, WebAddress)
    assert (str(place.shown) if place.shown else None) == shown
    assert refusal(place).hint == (f"name it as {shown}" if shown else "write org/name or org/name@revision, or check the path")


def test_a_word_is_a_repository_where_the_caller_says_so() -> None:
    assert locate("gpt2", one_word=True) == OnHub("gpt2", None)
    assert locate("gpt2@main", one_word=True) == OnHub("gpt2", "main")
    assert locate("word", one_word=True) == OnDisk(Path("word"))


def test_a_path_too_long_to_be_looked_at_is_an_ordinary_error() -> None:
    with pytest.raises(CheckpointError, match="cannot be looked at"):
        locate("a" * 5000)
