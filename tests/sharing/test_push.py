"""A bank on this disk becomes a repository on the Hub: verified, whole, in one commit, and nothing but the bank."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import svdbank
from svdbank.core.errors import OptionError, WrongBaseError
from tests.building.small import tree
from tests.checkpoint.hub_repositories import front_matter
from tests.checkpoint.hub_server import Fault, LocalHub
from tests.sharing.conftest import BASE, LICENCE


def test_a_pushed_bank_is_its_recorded_files_with_a_card_in_one_commit(hub: LocalHub, banks: dict[str, Path]) -> None:
    (banks["hub"] / ".used").touch()
    (banks["hub"] / "notes.txt").write_text("stays here")
    report = svdbank.push(banks["hub"], "me/bank")
    repository = hub.repositories["me/bank"]
    assert next(iter(repository.messages.values())) == "initial commit" and len(repository.commits) == 2
    assert report.place == f"hf://me/bank@{repository.branches['main']}"
    assert report.committed and report.created and repository.private
    pushed = {path: blob.data for path, blob in repository.head().items()}
    beside = {name: pushed.pop(name) for name in ("README.md", ".gitattributes", "LICENSE.md")}
    mine = {name: data for name, data in tree(banks["hub"]).items() if name not in (".used", "notes.txt")}
    assert pushed == mine and beside["LICENSE.md"] == LICENCE
    assert all(blob.large for path, blob in repository.head().items() if "/c/" in path)
    assert (
        report.files == report.changed == len(mine) and report.documents == 3 and report.nbytes == sum(map(len, mine.values()))
    )


def test_the_same_bank_again_makes_no_commit_and_uploads_nothing(hub: LocalHub, banks: dict[str, Path]) -> None:
    first = svdbank.push(banks["hub"], "me/bank")
    hub.commit("me/bank", {"README.md": b"edited by hand", "figure.png": b"\0"})
    hub.requests.clear()
    again = svdbank.push(banks["hub"], "me/bank")
    assert not again.committed and again.changed == 0 and again.digest == first.digest
    assert not [request for request in hub.requests if request.startswith(("PUT", "POST"))]
    assert hub.repositories["me/bank"].head()["README.md"].data == b"edited by hand"


def test_an_extended_bank_sends_what_is_new_and_removes_what_it_has_no_more(
    hub: LocalHub, banks: dict[str, Path], tmp_path: Path
) -> None:
    query = "encoder.layer.0.attention.self.query"
    svdbank.build(BASE, tmp_path / "grown", rank=18, targets=[query], device="cpu")
    svdbank.push(tmp_path / "grown", "me/bank")
    before = hub.repositories["me/bank"].head()
    hub.commit("me/bank", {"figure.png": b"\0"})
    svdbank.build(BASE, tmp_path / "grown", rank=18, device="cpu")
    report = svdbank.push(tmp_path / "grown", "me/bank")
    after = hub.repositories["me/bank"].head()
    gone = set(before) - set(after)
    assert len(gone) == report.removed > 0 and all(name.startswith("index-") or "/" in name for name in gone)
    assert "figure.png" in after
    assert set(after) - {"figure.png", "README.md", ".gitattributes", "LICENSE.md"} == set(tree(tmp_path / "grown"))


def test_the_card_says_what_the_bank_is_of(hub: LocalHub, banks: dict[str, Path]) -> None:
    report = svdbank.push(banks["hub"], "me/bank")
    text = hub.repositories["me/bank"].head()["README.md"].data.decode()
    found, manifest = front_matter(text), svdbank.open(banks["hub"]).manifest
    assert found is not None
    base = hub.repositories[BASE]
    assert found == {
        "library_name": "svdbank",
        "base_model": BASE,
        "base_model_relation": "adapter",
        "license": "other",
        "license_name": "small",
        "license_link": "LICENSE.md",
        "tags": ["svdbank"],
        "svdbank": {
            "format": 1,
            "digest": manifest.digest,
            "base_commit": base.branches["main"],
            "base_digest": manifest.base_digest,
            "rank": 18,
            "side": "both",
            "dtype": "float32",
            "weights": 2,
            "weight_files": {"model.safetensors": base.head()["model.safetensors"].sha256},
        },
    }
    certificates = svdbank.info(banks["hub"]).families
    for said in (report.base_commit, f"{certificates[0].residual:.1e}", "## Sizes", "[LICENSE.md](LICENSE.md)", "hf://me/bank"):
        assert said in text, said


def test_nothing_unsound_is_pushed(hub: LocalHub, banks: dict[str, Path]) -> None:
    data = next(path for path in sorted(banks["hub"].rglob("*")) if path.is_file() and "/c/" in str(path))
    harmed = bytearray(data.read_bytes())
    harmed[len(harmed) // 2] ^= 1
    data.write_bytes(harmed)
    with pytest.raises(svdbank.DamageError, match="nothing is pushed") as caught:
        svdbank.push(banks["hub"], "me/bank")
    assert caught.value.hint and "repair" in caught.value.hint
    assert "me/bank" not in hub.repositories and not [r for r in hub.requests if r.startswith(("PUT", "POST"))]


def test_a_bank_built_from_a_folder_needs_a_base_that_is_compared(
    hub: LocalHub, banks: dict[str, Path], small_base: Path, tmp_path: Path, base_files: dict[str, bytes]
) -> None:
    with pytest.raises(OptionError) as caught:
        svdbank.push(banks["folder"], "me/bank")
    assert caught.value.hint and "--base" in caught.value.hint
    with pytest.raises(OptionError, match="the weights of neither are here") as caught:
        svdbank.push(banks["folder"], "me/bank", base=BASE)
    changed = bytearray(base_files["model.safetensors"])
    changed[-1] ^= 1
    hub.commit("org/other", {**base_files, "model.safetensors": bytes(changed)})
    with pytest.raises(WrongBaseError, match=r"model\.safetensors"):
        svdbank.push(banks["folder"], "me/bank", base="org/other", source=small_base)
    from huggingface_hub import snapshot_download

    snapshot_download("org/other")
    with pytest.raises(WrongBaseError, match="has other bytes"):
        svdbank.push(banks["folder"], "me/bank", base="org/other")
    assert "me/bank" not in hub.repositories
    report = svdbank.push(banks["folder"], "me/bank", base=BASE, source=small_base)
    assert report.base == BASE and report.base_commit == hub.repositories[BASE].branches["main"]


def test_who_may_see_it_is_never_changed_in_passing(hub: LocalHub, banks: dict[str, Path]) -> None:
    svdbank.push(banks["hub"], "me/hidden")
    svdbank.push(banks["hub"], "me/shown", public=True)
    assert hub.repositories["me/hidden"].private and not hub.repositories["me/shown"].private
    with pytest.raises(OptionError, match="private"):
        svdbank.push(banks["hub"], "me/hidden", public=True)
    with pytest.raises(OptionError, match="public"):
        svdbank.push(banks["hub"], "me/shown")


def test_a_public_bank_of_a_gated_base_needs_a_word(
    hub: LocalHub, banks: dict[str, Path], base_files: dict[str, bytes]
) -> None:
    hub.repositories[BASE].gated = True
    with pytest.raises(OptionError, match="gated") as caught:
        svdbank.push(banks["hub"], "me/bank", public=True)
    assert caught.value.hint and "--expose-closed-base" in caught.value.hint and "me/bank" not in hub.repositories
    svdbank.push(banks["hub"], "me/hidden")
    svdbank.push(banks["hub"], "me/bank", public=True, expose_closed_base=True)
    assert not hub.repositories["me/bank"].private


def test_another_bank_or_other_files_are_not_replaced_unasked(hub: LocalHub, banks: dict[str, Path]) -> None:
    svdbank.push(banks["hub"], "me/bank")
    with pytest.raises(OptionError, match="another bank"):
        svdbank.push(banks["less"], "me/bank")
    svdbank.push(banks["less"], "me/bank", force=True)
    held = set(hub.repositories["me/bank"].head()) - {"README.md", ".gitattributes", "LICENSE.md"}
    assert held == set(tree(banks["less"]))
    hub.commit("me/model", {"model.safetensors": b"x" * 100})
    hub.repositories["me/model"].private = True
    with pytest.raises(OptionError, match="no bank"):
        svdbank.push(banks["hub"], "me/model")


@pytest.mark.parametrize("to", ["me", "me/a/b", "me/bank@" + "a" * 40, "", "https://example.org/x", "./somewhere"])
def test_what_is_no_repository_is_refused_before_any_request(hub: LocalHub, banks: dict[str, Path], to: str) -> None:
    hub.requests.clear()
    with pytest.raises(OptionError):
        svdbank.push(banks["hub"], to)
    assert not hub.requests


def test_more_files_than_the_hub_takes_are_refused(
    hub: LocalHub, banks: dict[str, Path], small_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("svdbank.building.space.HUB_FILES", 20)
    with pytest.raises(OptionError, match="files"):
        svdbank.push(banks["hub"], "me/bank")
    with pytest.raises(OptionError, match="files"):
        svdbank.plan(small_base, rank=18)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (Fault("status", "/api/models/me/bank", status=401), "HTTP 401"),
        (Fault("status", "/repos/create", status=403, method="POST"), "HTTP 403"),
        (Fault("status", "/objects/batch", status=404, method="POST"), "no such repository"),
        (Fault("status", "/commit/", status=409, method="POST"), "somebody else"),
        (Fault("status", "/commit/", status=413, method="POST"), "HTTP 413"),
        (Fault("cut", "/commit/", method="POST"), "connection broke"),
    ],
    ids=lambda value: value.path if isinstance(value, Fault) else "",
)
def test_refusals_say_what_to_do_and_the_next_push_ends_well(
    hub: LocalHub, banks: dict[str, Path], fault: Fault, says: str
) -> None:
    hub.faults.append(replace(fault))
    with pytest.raises(svdbank.BankError, match=says) as caught:
        svdbank.push(banks["hub"], "me/bank")
    assert (caught.value.hint or fault.status == 413) and "hf_aToken" not in str(caught.value)
    uploads = sum(request.startswith("PUT") for request in hub.requests)
    svdbank.push(banks["hub"], "me/bank")
    again = sum(request.startswith("PUT") for request in hub.requests) - uploads
    assert again == (
        0
        if "/commit/" in fault.path
        else len({blob.sha256 for blob in hub.repositories["me/bank"].head().values() if blob.large})
    )


def test_a_busy_hub_is_asked_again(hub: LocalHub, banks: dict[str, Path]) -> None:
    for path, method in (
        ("/commit/", "POST"),
        ("/repos/create", "POST"),
        ("/objects/batch", "POST"),
        ("/api/models/me/bank", "GET"),
    ):
        hub.faults.append(Fault("status", path, status=429, method=method))
    assert svdbank.push(banks["hub"], "me/bank").committed


def test_a_commit_whose_answer_was_lost_is_found_again(hub: LocalHub, banks: dict[str, Path]) -> None:
    hub.faults.append(Fault("lost", "/commit/", method="POST"))
    report = svdbank.push(banks["hub"], "me/bank")
    assert report.committed and len(hub.repositories["me/bank"].commits) == 2


def test_who_commits_meanwhile_is_not_overwritten(hub: LocalHub, banks: dict[str, Path]) -> None:
    svdbank.push(banks["less"], "me/bank")

    def meanwhile(request: str) -> None:
        if "/preupload/" in request:
            hub.before = None
            hub.commit("me/bank", {"theirs.txt": b"x"})

    hub.before = meanwhile
    with pytest.raises(svdbank.BankError, match="somebody else"):
        svdbank.push(banks["hub"], "me/bank", force=True)
    assert "theirs.txt" in hub.repositories["me/bank"].head()
    assert len(svdbank.push(banks["hub"], "me/bank", force=True).place) > 0


def test_without_a_token_or_offline_it_says_so_before_any_work(
    hub: LocalHub, banks: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.requests.clear()
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(svdbank.BankError, match="needs a token") as caught:
        svdbank.push(banks["hub"], "me/bank")
    assert caught.value.hint and "hf auth login" in caught.value.hint
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(svdbank.BankError, match="HF_HUB_OFFLINE"):
        svdbank.push(banks["hub"], "me/bank")
    assert not hub.requests


def test_a_token_that_is_none_is_refused(hub: LocalHub, banks: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_nobodys")
    with pytest.raises(svdbank.BankError, match="401") as caught:
        svdbank.push(banks["hub"], "me/bank")
    assert "hf_nobodys" not in str(caught.value)


def test_a_bank_published_anew_meanwhile_is_not_mixed(hub: LocalHub, tmp_path: Path) -> None:
    query = "encoder.layer.0.attention.self.query"
    bank = svdbank.build(BASE, tmp_path / "grown", rank=2, targets=[query], device="cpu")
    svdbank.build(BASE, tmp_path / "grown", rank=2, device="cpu")
    with pytest.raises(svdbank.BankError):
        svdbank.push(bank, "me/bank")
    assert "me/bank" not in hub.repositories


def test_what_gitattributes_say_of_other_files_stays(hub: LocalHub, banks: dict[str, Path]) -> None:
    svdbank.push(banks["less"], "me/bank")
    theirs = hub.repositories["me/bank"].head()[".gitattributes"].data + b"*.png filter=lfs diff=lfs merge=lfs -text"
    hub.commit("me/bank", {".gitattributes": theirs, "figure.png": b"\0"})
    svdbank.push(banks["hub"], "me/bank", force=True)
    lines = hub.repositories["me/bank"].head()[".gitattributes"].data.decode().splitlines()
    assert len(lines) == len(set(lines)) and "*.png filter=lfs diff=lfs merge=lfs -text" in lines
    assert {"*.safetensors", "**/c/**", "index-*.json"} <= {line.split()[0] for line in lines}
