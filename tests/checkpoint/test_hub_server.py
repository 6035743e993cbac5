"""The tests' Hub answers writes as the Hub does: the real client creates, uploads, commits and finds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from tests.checkpoint.hub_server import Fault, LocalHub

CARD = "---\nbase_model: org/base\nbase_model_relation: adapter\ntags:\n- svdbank\n---\n"
DATA = bytes(range(256)) * 8


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    with LocalHub() as running:
        running.point(monkeypatch, tmp_path / "home", token=running.login("user"))
        HfApi().create_repo("user/bank", private=True)
        yield running


def push(files: dict[str, bytes], **options: object) -> str:
    operations = [CommitOperationAdd(path, data) for path, data in files.items()]
    return HfApi().create_commit("user/bank", operations, commit_message="bank", **options).oid  # type: ignore[call-overload,no-any-return]


def test_large_files_go_by_lfs_once_and_a_commit_appears_whole(hub: LocalHub) -> None:
    first = push({"q/left/c/0/0/0": DATA, "README.md": CARD.encode(), ".gitattributes": b"**/c/** filter=lfs\n"})
    assert [request for request in hub.requests if request.startswith("PUT")] == [f"PUT /storage/{next(iter(hub.objects))}"]
    second = push({"k/left/c/0/0/0": DATA, "k/text/c/0": b"text, but as .gitattributes say"}, parent_commit=first)
    assert sum(request.startswith("PUT") for request in hub.requests) == 2  # DATA was there
    tree = {file.path: file for file in HfApi().list_repo_tree("user/bank", recursive=True, revision=second)}
    assert tree["k/left/c/0/0/0"].lfs.sha256 == tree["q/left/c/0/0/0"].lfs.sha256  # type: ignore[union-attr]
    assert tree["k/text/c/0"].lfs is not None and tree["README.md"].lfs is None  # type: ignore[union-attr]
    assert hub.received > 2 * len(DATA)


def test_listings_come_in_pages(hub: LocalHub) -> None:
    hub.page = 3
    commit = push({f"{number}.json": b"{}" for number in range(7)})
    found = [file.path for file in HfApi().list_repo_tree("user/bank", recursive=True, revision=commit)]
    assert sorted(found) == [".gitattributes", *(f"{number}.json" for number in range(7))]


def test_a_commit_on_another_parent_is_refused_and_so_is_a_deletion_of_nothing(hub: LocalHub) -> None:
    parent = hub.repositories["user/bank"].branches["main"]
    push({"a.json": b"{}"})
    for options, status in (({"parent_commit": parent}, 412), ({}, 404)):
        with pytest.raises(HfHubHTTPError) as caught:
            HfApi().create_commit(
                "user/bank",
                [CommitOperationDelete("b.json")],
                commit_message="x",
                **options,  # type: ignore[arg-type]
            )
        assert caught.value.response.status_code == status


def test_who_may_not_see_or_write_is_told_so(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.commit("org/open", {"a.json": b"{}"})
    with pytest.raises(HfHubHTTPError) as caught:
        HfApi().create_commit("org/open", [CommitOperationAdd("b.json", b"{}")], commit_message="x")
    assert caught.value.response.status_code == 403
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    with pytest.raises(RepositoryNotFoundError):
        HfApi().model_info("user/bank")
    with pytest.raises(HfHubHTTPError):
        HfApi().create_repo("user/other")
    assert list(HfApi().list_models()) and [model.id for model in HfApi().list_models()] == ["org/open"]


def test_models_are_found_by_tag_and_base(hub: LocalHub) -> None:
    push({"README.md": CARD.encode()})
    hub.commit("other/bank", {"README.md": CARD.replace("org/base", "org/another").encode()})
    found = list(HfApi().list_models(filter=["svdbank", "base_model:org/base"], cardData=True))
    assert [model.id for model in found] == ["user/bank"]
    assert found[0].card_data is not None and found[0].card_data.base_model == "org/base"
    assert found[0].author == "user" and found[0].last_modified is not None


@pytest.mark.parametrize(("kind", "commits"), [("cut", 1), ("lost", 2)])
def test_a_connection_breaks_before_or_after_the_commit(hub: LocalHub, kind: str, commits: int) -> None:
    hub.faults.append(Fault(kind, "/commit/", method="POST"))  # type: ignore[arg-type]
    with pytest.raises(Exception, match="disconnected"):
        push({"a.json": b"{}"})
    assert len(hub.repositories["user/bank"].commits) == commits
