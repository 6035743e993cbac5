"""``bank="auto"``: the first start decomposes the model's own weights and keeps them, the next is a lookup."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import svdbank
from svdbank.bank.layout import MANIFEST
from svdbank.building.loaded import build_loaded
from svdbank.building.request import build_request
from svdbank.checkpoint import open_checkpoint
from svdbank.checkpoint.loaded import of_files
from svdbank.core import disk
from svdbank.core.errors import OptionError
from svdbank.core.specs import ignore_progress
from svdbank.peft import attachment, get_peft_model, load_adapter, use_bank
from tests.building.crashes import Crash, FaultyDisk
from tests.peft.models import factors, lora_layers, mica, only_a_trains, quiet, same, without_svd

SHAPE: dict[str, Any] = {"vocab_size": 64, "num_hidden_layers": 2}
LLAMA = SHAPE | {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 2, "num_key_value_heads": 1}


def _llama() -> tuple[Any, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True)), mica(4)


def _gpt2() -> tuple[Any, Any]:
    """Transposed weights and biases."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_layer=2, n_embd=24, n_head=2, n_positions=32))
    return model, mica(4, target_modules=["c_attn", "c_fc", "wte"], fan_in_fan_out=True)


def _mixtral() -> tuple[Any, Any]:
    """Experts that the files hold one by one, and routers."""
    from transformers import MixtralConfig, MixtralForCausalLM

    model = MixtralForCausalLM(MixtralConfig(**LLAMA, num_local_experts=3))
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"]
    return model, mica(3, target_modules=["q_proj"], target_parameters=experts)


def _bert() -> tuple[Any, Any]:
    """Files of a model with a head, loaded without: other names."""
    from transformers import BertConfig, BertForMaskedLM

    shape = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 64}
    return BertForMaskedLM(BertConfig(**shape)), mica(4, target_modules=["query", "word_embeddings"])


MODELS: dict[str, Callable[[], tuple[Any, Any]]] = {"llama": _llama, "gpt2": _gpt2, "mixtral": _mixtral, "bert": _bert}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("SVDBANK_HOME", str(tmp_path / "home"))
    yield tmp_path / "home"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder in bfloat16 of each model."""
    places = {}
    for name, make in MODELS.items():
        torch.manual_seed(0)
        places[name] = tmp_path_factory.mktemp("automatic") / name
        with quiet():
            make()[0].to(torch.bfloat16).save_pretrained(places[name])
    return places


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModel, AutoModelForCausalLM

    with quiet():
        return (AutoModel if folder.name == "bert" else AutoModelForCausalLM).from_pretrained(folder, dtype=dtype)


def banks(home: Path) -> list[Path]:
    return sorted(path.parent for path in home.glob(f"banks/*/*/{MANIFEST}"))


@pytest.mark.parametrize("name", MODELS)
def test_the_first_start_builds_the_bases_own_bank_and_the_next_looks_it_up(
    name: str, folders: dict[str, Path], home: Path
) -> None:
    """Also where memory holds float32 of bfloat16 files, transposed weights, stacked experts and other names than the files."""
    config = MODELS[name]()[1]
    first = get_peft_model(load(folders[name]), config, bank="auto")
    found = attachment(first)
    assert found.state == "verified" and found.decomposed == len(set(found.weights)) and only_a_trains(first)
    (place,) = banks(home)
    assert svdbank.open(folders[name]).path == place == Path(found.bank)
    assert svdbank.verify(place, data=True, model=folders[name]).sound
    modules = sorted({svdbank.open(place)[weight].module for weight in found.weights})
    built = svdbank.build(folders[name], home / "built", rank=config.r, side="left", targets=modules, device="cpu")
    assert built.base_digest() == svdbank.open(place).base_digest()
    assert all(torch.equal(built[weight].left(2), svdbank.open(place)[weight].left(2)) for weight in found.weights)
    with without_svd():
        second = get_peft_model(load(folders[name]), MODELS[name]()[1], bank="auto")
    assert attachment(second).decomposed == 0 and banks(home) == [place]
    for path, layer in lora_layers(first).items():
        assert same(factors(layer)[1], factors(lora_layers(second)[path])[1])


def test_it_says_what_it_does(folders: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    stages: list[str] = []
    with caplog.at_level(logging.WARNING, "svdbank"):
        get_peft_model(load(folders["llama"]), mica(4), bank="auto", progress=lambda step: stages.append(step.stage))
        assert "14 weights decomposed" in caplog.text and "rank 4" in caplog.text and "r4-left-float32" in caplog.text
        caplog.clear()
        get_peft_model(load(folders["llama"]), mica(4), bank="auto")
        assert not caplog.text
    assert {"compare with the files", "decompose"} <= set(stages)


def test_weights_changed_in_memory_get_a_bank_of_their_own(folders: dict[str, Path], home: Path) -> None:
    """The bank of the base is not theirs, and theirs not the base's; a model of no files at all is such a one too."""

    def changed() -> Any:
        model = load(folders["llama"])
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight.mul_(1.5)
        return model

    get_peft_model(load(folders["llama"]), mica(4), bank="auto")
    base = svdbank.open(folders["llama"])
    own = attachment(get_peft_model(changed(), mica(4), bank="auto"))
    assert own.state == "verified" and own.decomposed == 14 and own.bank != str(base.path)
    assert attachment(get_peft_model(changed(), mica(4), bank="auto")).decomposed == 0
    assert attachment(get_peft_model(load(folders["llama"]), mica(4), bank="auto")).bank == str(base.path)
    assert svdbank.open(folders["llama"]).path == base.path and len(banks(home)) == 2
    with quiet():
        changed().save_pretrained(home / "saved")
    assert svdbank.verify(own.bank, data=True, model=home / "saved").sound
    torch.manual_seed(1)
    made = attachment(get_peft_model(_llama()[0], mica(4), bank="auto"))
    assert made.decomposed == 14 and made.state == "verified" and len(banks(home)) == 3


def test_what_a_cast_cost_digits_is_read_from_the_files(folders: dict[str, Path], tmp_path: Path) -> None:
    torch.manual_seed(0)
    with quiet():
        _llama()[0].save_pretrained(tmp_path / "float32")
    found = attachment(get_peft_model(load(tmp_path / "float32", torch.bfloat16), mica(4), bank="auto"))
    assert found.state == "verified" and svdbank.verify(found.bank, model=tmp_path / "float32").sound


def test_the_rank_is_that_asked_for_or_above(folders: dict[str, Path]) -> None:
    with pytest.raises(OptionError, match="rank 3 is below the 4"):
        get_peft_model(load(folders["llama"]), mica(4), bank="auto", rank=3)
    with pytest.raises(OptionError, match=r"outside 1\.\.12"):
        get_peft_model(load(folders["llama"]), mica(13), bank="auto")
    with pytest.raises(OptionError, match="rank is a number, not '8'"):
        get_peft_model(load(folders["llama"]), mica(4), bank="auto", rank="8")  # type: ignore[arg-type]
    found = attachment(get_peft_model(load(folders["llama"]), mica(4, target_modules=["q_proj"]), bank="auto", rank=16))
    assert svdbank.open(found.bank).rank == 16 and found.decomposed == 2
    more = attachment(get_peft_model(load(folders["llama"]), mica(8), bank="auto", rank=16))
    assert more.bank == found.bank and more.decomposed == 12  # extended by what it lacked
    assert attachment(get_peft_model(load(folders["llama"]), mica(8), bank="auto")).decomposed == 0


@pytest.mark.parametrize("method", ["milora", "pissa"])
def test_other_methods_get_the_sides_that_they_need_also_through_a_trainer(method: str, folders: dict[str, Path]) -> None:
    tokens = torch.arange(8)[None]
    before = load(folders["llama"])(tokens).logits
    config = mica(4, init_lora_weights=method, target_modules=["q_proj", "down_proj"])
    with use_bank("auto") as nothing:
        model = peft.get_peft_model(load(folders["llama"]), config)
    assert nothing is None and attachment(model).method == method and attachment(model).decomposed == 4
    assert torch.allclose(model(tokens).logits, before, atol=1e-5)  # float32 rounding of logits near 1
    with use_bank("auto"):
        assert attachment(peft.get_peft_model(load(folders["llama"]), config)).decomposed == 0


def test_an_embedding_and_the_head_that_it_is_tied_to_are_one_solve(folders: dict[str, Path]) -> None:
    config = mica(4, target_modules=["embed_tokens", "lm_head", "q_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's about tied weights
        found = attachment(get_peft_model(load(folders["llama"]), config, bank="auto"))
    assert found.state == "verified" and len(found.weights) == 4


def test_weights_that_are_not_whole_are_refused_by_name(folders: dict[str, Path], home: Path) -> None:
    from accelerate import cpu_offload

    offloaded = cpu_offload(load(folders["llama"]), execution_device=torch.device("cpu"))
    with pytest.raises(OptionError, match=r"layers\.0\.self_attn\.q_proj \(on the meta device, or offloaded\)") as caught:
        get_peft_model(offloaded, mica(4), bank="auto")
    assert str(folders["llama"]) in str(caught.value.hint) and not lora_layers(offloaded)
    packed = load(folders["llama"])
    from bitsandbytes.nn import Linear8bitLt

    own = Linear8bitLt(24, 24, bias=False, has_fp16_weights=False)
    own.load_state_dict({"weight": packed.model.layers[1].self_attn.q_proj.weight.detach()})
    packed.model.layers[1].self_attn.q_proj = own.to("cpu")
    with pytest.raises(OptionError, match=r"1\.self_attn\.q_proj \(quantised"):
        get_peft_model(packed, mica(4), bank="auto")
    assert not banks(home)
    with pytest.raises(OptionError, match="is for an adapter that begins"):
        load_adapter(load(folders["llama"]), "adapter", bank="auto")


def test_a_sharded_weight_is_refused_by_its_name(folders: dict[str, Path], tmp_path: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        model = fully_shard(load(folders["llama"]))
        with pytest.raises(OptionError, match=r"q_proj \(sharded by FSDP or tensor parallelism\)"):
            get_peft_model(model, mica(4), bank="auto")
    finally:
        dist.destroy_process_group()


def test_what_a_killed_start_left_is_finished_by_the_next_whatever_that_asks_for(
    folders: dict[str, Path], home: Path, memory_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same weights, or others: nothing half-written is taken for whole, and nothing recorded is solved again."""
    monkeypatch.setattr("svdbank.bank.layout.SINGLE_SHARD_WEIGHTS", 1)
    wanted = ["q_proj", "down_proj"]
    counted = FaultyDisk(memory_disk)
    with disk.observe(counted):
        whole = attachment(get_peft_model(load(folders["llama"]), mica(4, target_modules=wanted), bank="auto"))
    expected = svdbank.open(whole.bank)
    digests = {name: expected[name].left(4) for name in expected}
    for number, targets in enumerate((wanted, "all-linear")):
        monkeypatch.setenv("SVDBANK_HOME", str(home / str(number)))
        stop_at = len(counted.operations) * (number + 1) // 3
        with disk.observe(FaultyDisk(memory_disk, stop_at=stop_at)), pytest.raises(Crash):
            get_peft_model(load(folders["llama"]), mica(4, target_modules=wanted), bank="auto")
        assert not banks(home / str(number))
        found = attachment(get_peft_model(load(folders["llama"]), mica(4, target_modules=targets), bank="auto"))
        bank = svdbank.open(found.bank)
        assert svdbank.verify(bank.path, data=True, model=folders["llama"]).sound
        assert all(torch.equal(bank[name].left(4), left) for name, left in digests.items())


def test_a_cache_that_takes_no_bank_is_named_and_the_model_stays_as_it_was(folders: dict[str, Path], home: Path) -> None:
    home.mkdir()
    (home / "banks").symlink_to(home / "banks")  # nothing can be made there, whoever asks
    model = load(folders["llama"])
    with pytest.raises(svdbank.BankError, match="cannot be kept") as caught:
        get_peft_model(model, mica(4), bank="auto")
    assert "SVDBANK_HOME" in str(caught.value.hint) and not lora_layers(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_of_two_that_start_at_once_one_builds(folders: dict[str, Path], home: Path) -> None:
    """Two that build at the same place: PEFT's own surgery is not made for threads, what follows it is."""
    solved = [0, 0]
    request = build_request(str(folders["llama"]), None, rank=4, side="left", device="cpu")

    def start(number: int) -> None:
        with open_checkpoint(folders["llama"]) as checkpoint:
            here = of_files(checkpoint, {})
            solved[number] = build_loaded(here, request, device=torch.device("cpu"), progress=ignore_progress).solved

    threads = [threading.Thread(target=start, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(solved) == 14 and len(banks(home)) == 1 and svdbank.verify(banks(home)[0], data=True).sound


def test_a_bank_in_the_cache_serves_a_quantised_or_offloaded_model(folders: dict[str, Path]) -> None:
    from accelerate import cpu_offload

    svdbank.build(folders["llama"], rank=4, device="cpu")
    offloaded = cpu_offload(load(folders["llama"]), execution_device=torch.device("cpu"))
    with pytest.warns(svdbank.peft.UnverifiedBaseWarning):
        assert attachment(get_peft_model(offloaded, mica(4), bank="auto")).decomposed == 0


def test_another_seed_of_a_class_is_another_model(home: Path) -> None:
    def made(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model: nn.Module = _llama()[0]
        return model

    places = {
        attachment(get_peft_model(made(seed), mica(4, target_modules=["q_proj"]), bank="auto")).bank for seed in (1, 2, 1)
    }
    assert len(places) == 2
