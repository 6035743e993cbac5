"""The newest mixtures of experts, each from its configuration to an adapter that was trained, fused, loaded and measured.

Whole models of images and text are among them, of which ``train`` and ``eval`` load what Transformers has for text: the language model
alone, whose paths are others than the bank's (Qwen3.5-MoE, Llama-4), or the whole (Kimi-K2.5).
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

import svdbank
from svdbank.peft import attachment, load_adapter
from tests.architectures import small
from tests.lm.models import word_tokenizer

RANK, STORED = 2, 4
#: Of a fused weight against PEFT's merged one, relative: float32 sums in another order.
FUSED = 1e-6
WORDS = """the law of a contract is what both sides agree on before work starts and paid after it ends""".split()  # noqa: SIM905

TYPES = (
    "longcat_flash",
    "deepseek_v4",
    "kimi_k25",
    "kimi_linear",
    "glm_moe_dsa",
    "qwen3_5_moe",
    "minimax_m2",
    "gpt_oss",
    "llama4",
)
#: Those that are quick, one of each way to be loaded: in every run.
QUICK = ("deepseek_v4", "llama4", "kimi_k25")


@pytest.fixture(autouse=True)
def _surroundings(single_thread: None, own_texts_cache: None) -> None:
    """Small matrices."""


@pytest.mark.parametrize(
    "model_type", [name if name in QUICK else pytest.param(name, marks=pytest.mark.soak) for name in TYPES]
)
def test_plan_build_init_train_fuse_and_load(model_type: str, tmp_path: Path) -> None:
    import transformers

    folder, bank, text = tmp_path / "model", tmp_path / "bank", tmp_path / "text.txt"
    whole, lost = small.saved(small.small_model(model_type), folder)
    assert not lost
    word_tokenizer(WORDS, folder)
    drawn = random.Random(0)
    text.write_text("\n\n".join(" ".join(drawn.choices(WORDS, k=300)) for _ in range(12)))

    planned = svdbank.plan(folder / "config.json", rank=STORED)
    built = svdbank.build(folder, bank, rank=STORED, device="cpu")
    assert sum(family.count for family in planned.families) == len(built.names)
    svdbank.init(bank, output=tmp_path / "init", rank=RANK, base_model=str(folder))
    attach(whole, tmp_path / "init", bank)

    options: dict[str, Any] = {"rank": RANK, "steps": 2, "length": 32, "batch_size": 2, "dropout": 0.0, "learning_rate": 1e-1}
    report = svdbank.train(folder, bank=str(bank), output=tmp_path / "trained", data=[str(text)], **options)
    assert report.steps == 2 and report.held_out is not None

    from svdbank.lm.loading import open_model

    automatic = getattr(transformers, open_model(str(folder)).automatic)

    def loaded(place: Path) -> Any:
        return automatic.from_pretrained(place, dtype=torch.float32)

    from peft import PeftModel

    merged = values(PeftModel.from_pretrained(loaded(folder), str(tmp_path / "trained")).merge_and_unload())
    ours = load_adapter(loaded(folder), tmp_path / "trained", bank=bank)
    assert attachment(ours).state == "verified"
    assert_same(values(ours.merge_and_unload()), merged)

    svdbank.fuse(folder, tmp_path / "trained", tmp_path / "fused")
    before, fused = values(loaded(folder)), values(loaded(tmp_path / "fused"))
    assert_same(fused, merged)
    changed = {name for name, value in fused.items() if not torch.equal(value, before[name])}
    assert len(changed) >= 8 and changed == {name for name, value in merged.items() if not torch.equal(value, before[name])}
    if type(loaded(folder)) is not type(whole):  # what is no part of the language model stays
        again = values(type(whole).from_pretrained(tmp_path / "fused"))
        moved = {name for name, value in values(whole).items() if not torch.equal(value, again[name])}
        on_whole = load_adapter(whole, tmp_path / "trained", bank=bank)
        assert attachment(on_whole).state == "verified"
        assert_same(values(on_whole.merge_and_unload()), again)
        assert len(moved) == len(changed) and not any("vision" in name or "visual" in name for name in moved)

    scores = svdbank.eval(folder, data=[str(text)], adapters={"law": tmp_path / "trained"}, length=32, tokens=256).scores
    alone = svdbank.eval(tmp_path / "fused", data=[str(text)], length=32, tokens=256).scores
    assert scores[1].loss == pytest.approx(alone[0].loss, rel=1e-5) and scores[1].loss < scores[0].loss


def attach(model: Any, folder: Path, bank: Path) -> None:
    """The fresh adapter on the whole model, from its folder, with the bank's own directions."""
    import copy

    adapted = load_adapter(copy.deepcopy(model), folder, bank=bank)
    assert attachment(adapted).state == "verified"


def values(model: Any) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters())


def assert_same(these: dict[str, torch.Tensor], those: dict[str, torch.Tensor]) -> None:
    assert these.keys() == those.keys()
    for name, value in those.items():
        assert float((these[name] - value).norm()) <= FUSED * float(value.norm()), name


def test_peft_layers_that_fail_in_forward_are_refused_and_the_hint_works(tmp_path: Path) -> None:
    """DeepSeek-V4's ``o_a_proj`` is linear by its class and has a block for each group of inputs."""
    import ast
    import re

    from peft import LoraConfig

    from svdbank.peft import get_peft_model
    from tests.architectures.feeding import loss_of

    base, _ = small.saved(small.small_model("deepseek_v4"), tmp_path / "model")
    bank = svdbank.build(tmp_path / "model", tmp_path / "bank", rank=STORED, device="cpu")
    assert {bank[name].kind for name in bank.names if name.endswith("o_a_proj.weight")} == {"grouped"}

    def attached(**options: Any) -> Any:
        config = LoraConfig(r=RANK, init_lora_weights="mica", target_modules="all-linear", **options)
        return get_peft_model(base, config, bank=bank)

    with pytest.raises(svdbank.OptionError, match="does something else with its weight than multiply") as caught:
        attached()
    hint = str(caught.value.hint)
    found = {name: ast.literal_eval(value) for name, value in re.findall(r"(\w+)=(\[[^\]]*\])", hint)}
    assert found == {"exclude_modules": ["o_a_proj"], "target_parameters": ["o_a_proj.weight"]}
    model = attached(exclude_modules=found["exclude_modules"])
    assert loss_of(model).requires_grad
    model = get_peft_model(model.unload(), LoraConfig(r=RANK, init_lora_weights="mica", target_modules=[], **found), bank=bank)
    loss_of(model).backward()
    trained = {name for name, value in model.named_parameters() if value.grad is not None and value.grad.any()}
    assert trained and all(".o_a_proj." in name and ".lora_A." in name for name in trained)


def test_a_class_whose_parameters_are_not_all_stored_is_refused(tmp_path: Path) -> None:
    """Emu3's language model has a head of its own that its whole model does not store."""
    small.small_model("emu3").save_pretrained(tmp_path / "model")
    word_tokenizer(WORDS, tmp_path / "model")
    (tmp_path / "text.txt").write_text(" ".join(WORDS * 40))
    with pytest.raises(svdbank.CheckpointError, match=r"lm_head\.weight, and would be random numbers"):
        svdbank.eval(tmp_path / "model", data=[str(tmp_path / "text.txt")], length=16)


def test_paths_that_two_towers_have_are_not_guessed() -> None:
    from svdbank.adapter.naming import matched

    ends = [f"layers.{i}.q_proj" for i in range(2)]
    held = {f"model.{tower}.{end}": end for tower in ("text", "vision") for end in ends}
    with pytest.raises(svdbank.OptionError, match="cannot be told"):
        matched(held, [f"model.{end}" for end in ends])
    only_text = matched(held, [f"model.{end}" for end in ends], lambda key, name: ".text." in name)
    assert only_text == {f"model.{end}": end for end in ends}
    assert matched({**held, "model.text.layers.0.gate": "gate"}, ["model.layers.0.gate", "model.layers.0.q_proj"]) == {
        "model.layers.0.gate": "gate",
        "model.layers.0.q_proj": "layers.0.q_proj",
    }
    mixed = {"model.layers.0.q_proj": "own", "model.vision.layers.0.k_proj": "other"}
    assert matched(mixed, ["model.layers.0.q_proj", "model.layers.0.k_proj"]) == {"model.layers.0.q_proj": "own"}
