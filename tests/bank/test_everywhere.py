"""Every verb that takes a bank takes an address, and what it makes is what it makes with the folder."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers
from peft import LoraConfig
from safetensors.torch import load_file

import svdbank
from svdbank.peft import attachment, get_peft_model, load_adapter, use_bank
from tests.building.small import tree
from tests.checkpoint.hub_server import LocalHub

NAME = "hf://org/bank"


@pytest.fixture
def far(hub: LocalHub, small_bank: svdbank.Bank, own_home: Path) -> LocalHub:
    """A bank of SmolLM2's first layers on the Hub, and a cache that has seen nothing."""
    hub.redirects = True
    hub.commit("org/bank", tree(small_bank.path))
    return hub


def config() -> LoraConfig:
    return LoraConfig(r=16, init_lora_weights="mica", target_modules="all-linear")


def factors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if "lora_" in name}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def together(count: int) -> Callable[[str], None]:
    """Keeps requests for chunks waiting until so many are under way: who asks one after another waits in vain."""
    arrived, condition = list[str](), threading.Condition()

    def wait(request: str) -> None:
        if "/left/c/" in request:
            with condition:
                arrived.append(request)
                condition.notify_all()
                assert condition.wait_for(lambda: len(arrived) >= count, timeout=60)

    return wait


def test_mica_at_rank_16_fetches_its_chunks_and_the_index_and_then_nothing(
    far: LocalHub, small: Path, small_bank: svdbank.Bank
) -> None:
    """At most 1.1 times the bytes of both; tables of chunks are known from their checksums, so two requests a file, redirect included."""

    def attached(bank: object) -> torch.nn.Module:
        base = transformers.AutoModelForCausalLM.from_pretrained(small)
        found: torch.nn.Module = get_peft_model(base, config(), bank=bank)
        return found

    expected = factors(attached(small_bank))
    far.sent, before = 0, len(far.requests)
    far.before = together(4)
    model = attached(NAME)
    assert same(factors(model), expected) and attachment(model).state == "verified"
    assert attachment(model).bank == f"hf://org/bank@{far.repositories['org/bank'].branches['main']}"
    reads = small_bank.shard_reads("left", 16)
    chunks = sum(read.chunks * len(read.rows) * read.record.chunk_bytes for read in reads)
    assert chunks < far.sent <= 1.1 * (chunks + small_bank.manifest.files[small_bank.manifest.index].size)
    families = len(small_bank.index.families)
    # manifest twice (HEAD, GET) and once what the client asks for itself; an array's metadata and the probe's, and its bytes.
    assert len(far.requests) - before <= 4 + 2 + 2 * len(reads) + families * (1 + 1 + 2)
    before = len(far.requests)
    assert same(factors(attached(NAME)), expected) and len(far.requests) == before


def test_peft_and_every_verb_take_an_address(far: LocalHub, small: Path, small_bank: svdbank.Bank, tmp_path: Path) -> None:
    made: dict[str, dict[str, dict[str, torch.Tensor]]] = {}
    for kind, bank in (("far", NAME), ("near", str(small_bank.path))):
        out = tmp_path / kind
        with use_bank(bank):
            model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(small), config())
        torch.manual_seed(0)
        for name, value in model.named_parameters():
            if "lora_A" in name:
                torch.nn.init.normal_(value)
        model.save_pretrained(out / "trained")
        svdbank.init(bank, output=out / "mica", rank=4, base_model=str(small))
        svdbank.init(bank, output=out / "milora", rank=4, method="milora", base_model=str(small), targets=["q_proj"])
        svdbank.init(bank, output=out / "pissa", rank=4, method="pissa", base_model=str(small), targets=["q_proj"])
        svdbank.export(out / "trained", to="slim", output=out / "slim", bank=bank)
        svdbank.export(out / "slim", to="peft", output=out / "again", bank=bank)
        svdbank.merge([out / "trained", f"twice={out / 'trained'}"], output=out / "merged", bank=bank)
        svdbank.stack([out / "trained", f"other={out / 'mica'}"], output=out / "stacked", bank=bank)
        svdbank.fuse(small, out / "milora", out / "fused", bank=bank)
        svdbank.extract(small, out / "fused", output=out / "extracted", rank=2, bank=bank)
        assert svdbank.compare({"one": out / "trained", "two": out / "merged"}, bank=bank).pairs[0].all.cosine > 0.99
        made[kind] = {path.parent.name: load_file(path) for path in sorted(out.glob("*/*.safetensors"))}
        base = transformers.AutoModelForCausalLM.from_pretrained(small)
        made[kind]["loaded"] = factors(load_adapter(base, out / "trained", bank=bank))
    assert made["far"].keys() == made["near"].keys() and len(made["far"]) == 11
    assert all(same(made["far"][name], made["near"][name]) for name in made["far"])


def test_train_takes_an_address(
    far: LocalHub, small: Path, small_bank: svdbank.Bank, tmp_path: Path, legal: Path, own_texts_cache: None
) -> None:
    short = {"rank": 4, "steps": 1, "length": 32, "held_out": 0, "learning_rate": 1e-3, "seed": 1}
    for kind, bank in (("far", NAME), ("near", str(small_bank.path))):
        svdbank.train(small, output=tmp_path / kind, data=legal, bank=bank, **short)
    one, other = (load_file(tmp_path / kind / "adapter_model.safetensors") for kind in ("far", "near"))
    assert same(one, other)


@pytest.mark.parametrize(
    "call",
    [
        lambda model, out: svdbank.build(model, NAME),
        lambda model, out: svdbank.init(out / "bank", output=NAME, rank=2),
        lambda model, out: svdbank.fuse(model, out / "adapter", NAME),
        lambda model, out: svdbank.publish(NAME),
        lambda model, out: svdbank.repair(NAME),
        lambda model, out: svdbank.rm(NAME),
    ],
    ids=["build", "init", "fuse", "publish", "repair", "rm"],
)
def test_an_address_where_a_folder_is_written_is_refused_by_name(
    call: Callable[[Path, Path], object], small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(svdbank.SvdbankError, match=r"hf://org/bank"):
        call(small, tmp_path)
    assert not list(tmp_path.iterdir())
