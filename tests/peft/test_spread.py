"""Models that do not lie in one piece in memory: accelerate's device_map and offload, FSDP2. No gather, no SVD."""

from __future__ import annotations

import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import svdbank
from svdbank.bank.reading import Bank
from svdbank.core.errors import OptionError
from svdbank.peft import UnverifiedBaseWarning, attachment, get_peft_model, load_adapter
from tests.peft.models import factors, lora_layers, mica, only_a_trains, quiet, without_svd

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``model``, a small Llama with odd sizes that two ranks cannot share evenly, and its ``bank``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("spread")
    shape = {"hidden_size": 30, "intermediate_size": 45, "num_attention_heads": 3, "num_key_value_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=2, tie_word_embeddings=False, **shape))
    with quiet():
        model.save_pretrained(place / "model")
    svdbank.build(place / "model", place / "bank", rank=8, targets=("all-linear", "embed_tokens"))
    return place


@pytest.fixture
def bank(folder: Path) -> Bank:
    return svdbank.open(folder / "bank")


TOKENS = torch.arange(1, 33).reshape(2, 16)


def load(folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    with quiet():
        return AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32, **options)


def spread(folder: Path, where: str, place: Path) -> Any:
    """SmolLM2's little sibling under accelerate; on a machine without a GPU, "offloaded" means kept on meta and fetched by hooks."""
    from accelerate import cpu_offload, dispatch_model

    model = load(folder)
    if where == "cpu":
        return dispatch_model(model, device_map={"": "cpu"}, force_hooks=True)
    if where == "memory":
        return cpu_offload(model, execution_device=torch.device("cpu"))
    parts = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    parts |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    return dispatch_model(model, device_map=parts, main_device="cpu", offload_dir=str(place), force_hooks=True)


@pytest.fixture(autouse=True)
def _others_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


@pytest.mark.parametrize("where", ["cpu", "memory", "disk"])
def test_a_dispatched_model_is_attached_trained_and_reloaded(where: str, folder: Path, bank: Bank, tmp_path: Path) -> None:
    model = spread(folder, where, tmp_path / "offload")
    away = {"cpu": 0, "memory": 14, "disk": 7}[where]
    with without_svd(), warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", UnverifiedBaseWarning)
        model = get_peft_model(model, mica(4, task_type="CAUSAL_LM"), bank=bank)
    assert any(f"{away} of 14" in str(w.message) for w in seen) == bool(away)
    assert len(attachment(model).unverified) == away and only_a_trains(model)
    assert torch.equal(logits(model), logits(load(folder)))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    before = float(model(input_ids=TOKENS, labels=TOKENS).loss)
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    assert float(model(input_ids=TOKENS, labels=TOKENS).loss) < before
    for module, layer in lora_layers(model).items():
        A, B = factors(layer)
        assert A.device.type == B.device.type == "cpu" and torch.equal(B, bank[f"{module}.weight"].left(4))
    model.save_pretrained(tmp_path / "a")
    assert torch.equal(logits(load_adapter(load(folder), tmp_path / "a", bank=bank)), logits(model))
    if away:
        with pytest.raises(OptionError, match=rf"{away} modules are quantised, offloaded"):
            get_peft_model(spread(folder, where, tmp_path / "again"), mica(4, init_lora_weights="milora"), bank=bank)


def test_a_device_map_of_transformers(folder: Path, bank: Bank) -> None:
    model = get_peft_model(load(folder, device_map={"": "cpu"}), mica(4), bank=bank)
    assert attachment(model).state == "verified" and only_a_trains(model)


def test_a_model_on_meta_gets_its_factors_before_its_weights(folder: Path, bank: Bank) -> None:
    """Attach first, load later: the factors stay what they are."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder / "model"))
    with pytest.warns(UnverifiedBaseWarning), without_svd():
        model = get_peft_model(empty, mica(4), bank=bank)
    full = load(folder)
    for name, value in full.state_dict().items():
        parent, _, leaf = name.rpartition(".")
        owner = model.get_base_model().get_submodule(parent)
        base = owner.get_base_layer() if hasattr(owner, "get_base_layer") else owner
        setattr(base, leaf, torch.nn.Parameter(value, requires_grad=False))
    model.get_base_model().model.rotary_emb = full.model.rotary_emb
    assert torch.equal(logits(model), logits(load(folder)))
    assert all(torch.equal(factors(layer)[1], bank[f"{m}.weight"].left(4)) for m, layer in lora_layers(model).items())


def test_fsdp2_before_and_after_attaching(folder: Path) -> None:
    """Two processes; what each asserts stands in ``tests/peft/sharded.py``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.peft.sharded", str(rank), "2", str(port), str(folder)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=150)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(said)
    assert all(text.rstrip().endswith("sound") for text in said)
