"""A model without a bank in the cache: which banks on the Hub could be pulled is said, and nothing is pulled unasked."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub.constants
import peft
import pytest
import transformers
import yaml

import svdbank
from svdbank.core.errors import BankNotFoundError, OptionError, WrongBaseError
from svdbank.peft import get_peft_model
from svdbank.sharing.finding import find_banks
from svdbank_cli.main import run
from tests.adapter.every import write_base
from tests.checkpoint.hub_repositories import front_matter
from tests.checkpoint.hub_server import LocalHub
from tests.sharing.conftest import BASE


@pytest.fixture
def pushed(hub: LocalHub, banks: dict[str, Path]) -> str:
    """A bank of the base that everybody sees; none is in the cache."""
    svdbank.push(banks["hub"], "me/bank", public=True)
    hub.requests.clear()
    return "me/bank"


def card_of(hub: LocalHub, **changed: object) -> bytes:
    """The card of the pushed bank with other values under its key; None leaves one out."""
    found = front_matter(hub.repositories["me/bank"].head()["README.md"].data.decode())
    assert found is not None
    del found["library_name"]  # the Hub makes a tag of it
    found["svdbank"] = {key: value for key, value in {**found["svdbank"], **changed}.items() if value is not None}
    return f"---\n{yaml.safe_dump(found)}---\n".encode()


def test_init_says_whose_bank_could_be_pulled_and_pulls_nothing(hub: LocalHub, pushed: str, tmp_path: Path) -> None:
    with pytest.raises(BankNotFoundError) as caught:
        svdbank.init(BASE, output=tmp_path / "adapter", rank=2)
    assert "me/bank (by me, 2026-11-28; rank 18, both, float32)" in str(caught.value)
    assert caught.value.hint and "--pull me/bank" in caught.value.hint and f"svdbank build {BASE}" in caught.value.hint
    assert [one for one in hub.requests if "me/bank" in one] == [] and hub.requests.count("GET /api/models") == 1
    assert not list((tmp_path / "svdbank").rglob("manifest.json"))


def test_nothing_is_asked_offline_or_where_it_is_turned_off(
    hub: LocalHub,
    pushed: str,
    small_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["init", BASE, "-o", str(tmp_path / "adapter"), "--no-find"]) == BankNotFoundError.exit_code
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(BankNotFoundError):
        svdbank.init(BASE, output=tmp_path / "adapter")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert find_banks(small_base) == ()  # of a plain folder nobody knows a repository
    assert not hub.requests and "me/bank" not in capsys.readouterr().err


def test_only_banks_of_just_these_weight_files_are_named(hub: LocalHub, pushed: str) -> None:
    hub.commit("you/newer", {"README.md": card_of(hub)})
    hub.repositories["you/newer"].last_modified = "2026-11-29T00:00:00.000Z"
    strange = {
        "other": {"weight_files": {"model.safetensors": "0" * 64}},
        "more": {"weight_files": {"model.safetensors": "0" * 64, "more.safetensors": "1" * 64}},
        "none": {"weight_files": {}},
        "text": {"weight_files": "model.safetensors"},
        "empty": {"weight_files": {"absent.safetensors": None}},
        "later": {"format": 2},
        "without": {"weight_files": None},
    }
    for name, changed in strange.items():
        hub.commit(f"you/{name}", {"README.md": card_of(hub, **changed)})
    hub.commit("you/untagged", {"README.md": card_of(hub).replace(b"- svdbank\n", b"- other\n")})
    assert [bank.repository for bank in find_banks(BASE)] == ["you/newer", "me/bank"]
    private = hub.repositories["you/newer"]
    private.private = True
    assert [bank.repository for bank in find_banks(BASE)] == ["me/bank"]


def test_a_model_in_the_hubs_cache_is_known_by_its_snapshot(hub: LocalHub, pushed: str) -> None:
    snapshot = huggingface_hub.snapshot_download(BASE)
    assert [bank.repository for bank in find_banks(snapshot)] == ["me/bank"]


def test_a_newer_commit_of_the_model_has_no_bank_until_its_weights_are_the_same(
    hub: LocalHub, pushed: str, base_files: dict[str, bytes]
) -> None:
    old = hub.repositories[BASE].branches["main"]
    hub.commit(BASE, {"README.md": b"a word more"})
    assert find_banks(BASE)
    hub.commit(BASE, {"model.safetensors": base_files["model.safetensors"][:-1] + b"\0"})
    assert not find_banks(BASE) and find_banks(f"{BASE}@{old}")


def test_a_hub_that_fails_takes_no_errors_place(hub: LocalHub, pushed: str, tmp_path: Path) -> None:
    hub.commit("you/strange", {"README.md": card_of(hub, weight_files=[1], rank={"a": 1})})
    hub.page = 1
    hub.repositories[BASE].gated = True
    for commit in hub.repositories[BASE].commits:
        hub.repositories[BASE].commits[commit].pop("config.json", None)
    with pytest.raises(BankNotFoundError, match="no bank of"):
        svdbank.init("org/nothing", output=tmp_path / "adapter")


def test_pull_names_the_bank_that_is_brought(hub: LocalHub, pushed: str, banks: dict[str, Path], tmp_path: Path) -> None:
    arguments = ["init", BASE, "-r", "2", "-o", str(tmp_path / "adapter"), "--pull", "me/bank", "-q"]
    assert run(arguments) == 0
    hub.requests.clear()
    assert run([*arguments, "--force"]) == 0
    assert not [one for one in hub.requests if "/c/" in one]
    assert run(["init", BASE, "-r", "2", "-o", str(tmp_path / "next"), "-q"]) == 0  # it is in the cache now
    bank = svdbank.open(banks["hub"])
    assert set(svdbank.read_adapter(tmp_path / "adapter").weights) == {bank[name].module for name in bank}


def test_a_bank_of_other_weights_is_refused_before_it_is_pulled(
    hub: LocalHub, pushed: str, base_files: dict[str, bytes], small_base: Path, tmp_path: Path
) -> None:
    hub.commit("org/other", {**base_files, "model.safetensors": base_files["model.safetensors"][:-1] + b"\0"})
    old = hub.repositories[BASE].branches["main"]
    with pytest.raises(WrongBaseError, match=f"it is of {BASE}@{old}, not of the weight files of org/other") as caught:
        svdbank.init("org/other", output=tmp_path / "adapter", pull="me/bank")
    assert caught.value.hint and caught.value.hint.endswith("svdbank build org/other")
    hub.commit("you/silent", {"README.md": card_of(hub, base_commit="--pull x")})
    with pytest.raises(WrongBaseError, match="of other weight files than org/other"):
        svdbank.init("org/other", output=tmp_path / "adapter", pull="you/silent")
    hub.commit(BASE, {"model.safetensors": base_files["model.safetensors"][:-1] + b"\1"})
    with pytest.raises(WrongBaseError) as caught:
        svdbank.init(BASE, output=tmp_path / "adapter", pull="me/bank")
    assert caught.value.hint == f"name the revision of the model that it is of: {BASE}@{old}"
    hub.commit(BASE, base_files)
    with pytest.raises(OptionError, match="no bank"):
        svdbank.init(BASE, output=tmp_path / "adapter", pull="org/other")
    assert not [one for one in hub.requests if "me/bank/resolve" in one]
    # A folder has no ids of the Hub: then the weights themselves are compared.
    svdbank.init(small_base, output=tmp_path / "same", pull="me/bank", rank=2)
    changed = tmp_path / "changed"
    changed.mkdir()
    for name in ("config.json", "model.safetensors"):
        (changed / name).write_bytes(base_files[name][:-1] + (b"\0" if name != "config.json" else b"}"))
    with pytest.raises(WrongBaseError):
        svdbank.init(changed, output=tmp_path / "adapter", pull="me/bank", rank=2)


@pytest.fixture
def llama(hub: LocalHub, tmp_path: Path, single_thread: None) -> Path:
    """A model that is on the Hub as ``org/llama``, with its bank as ``me/llama``."""
    base = write_base("untied", tmp_path / "llama")
    hub.commit("org/llama", {path.name: path.read_bytes() for path in base.iterdir()})
    svdbank.push(svdbank.build("org/llama", tmp_path / "bank", rank=4, device="cpu"), "me/llama", public=True)
    return base


def test_attaching_says_it_too(llama: Path, hub: LocalHub) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    config = peft.LoraConfig(r=2, init_lora_weights="mica", target_modules="all-linear")
    with pytest.raises(BankNotFoundError, match=r"me/llama \(by me"):
        get_peft_model(model, config, bank="org/llama")
    hub.requests.clear()
    with pytest.raises(BankNotFoundError):
        get_peft_model(model, config, bank="org/llama", find=False)
    assert not hub.requests


#: After other tests of this folder Transformers' listing of a tokenizer's files is tried for 95 s; alone this takes 6 s.
@pytest.mark.soak
def test_training_says_it_too(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("w1 w2 w3 " * 400)
    options = {"data": tmp_path / "text.txt", "output": tmp_path / "law", "steps": 1, "rank": 2, "length": 16, "keep": "last"}
    with pytest.raises(BankNotFoundError, match=r"me/llama \(by me") as caught:
        svdbank.train("org/llama", **options)
    assert caught.value.hint and "--pull me/llama" in caught.value.hint and "--build" in caught.value.hint
    with pytest.raises(svdbank.BankError, match="rank 6"):
        svdbank.train("org/llama", pull="me/llama", **{**options, "rank": 6})
    assert svdbank.open("org/llama").rank == 4
