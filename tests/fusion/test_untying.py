"""``fuse --untie``: an adapter that changes the embedding or the head of a tied pair alone, in a checkpoint that holds both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import svdbank
from svdbank.core.errors import OptionError
from tests.fusion.conftest import adapter, logits, reloaded, saved, small_model, tensors_of

# PEFT says that merging would break the tie, which is the point.
pytestmark = pytest.mark.filterwarnings("ignore")

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "the head": ("llama-tied", {"target_modules": ["q_proj", "lm_head"]}),
    "the embedding": ("llama-tied", {"target_modules": ["embed_tokens"]}),
    "a scaled embedding": ("gemma3", {"target_modules": ["embed_tokens"]}),
    "Conv1D beside a tied head": ("gpt2", {"target_modules": ["c_attn", "lm_head"]}),
    "a decoder inside the model": ("opt", {"target_modules": ["lm_head"]}),
    "a whole head": ("llama-tied", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "a whole embedding": ("llama-tied", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_each_of_a_tied_pair_is_written_and_plain_transformers_gives_the_logits_of_base_and_adapter(
    case: str, tmp_path: Path
) -> None:
    name, config = CASES[case]
    base = saved(small_model(name), tmp_path / "base", shard="100KB")
    expected = logits(adapter(small_model(name), tmp_path / "adapter", size=0.1, **config))
    # The adapter is seen in the logits, or the comparison would show nothing.
    assert float((expected - logits(small_model(name))).abs().max()) > 1e-2
    report = svdbank.fuse(base, tmp_path / "adapter", tmp_path / "fused", untie=True)
    before, after = tensors_of(base), tensors_of(tmp_path / "fused")
    assert set(after) == set(before) | {"lm_head.weight"}
    assert set(report.untied) <= set(after)
    assert any("tie_word_embeddings" in note for note in report.notes)
    assert json.loads((tmp_path / "fused" / "config.json").read_text())["tie_word_embeddings"] is False
    changed = {weight.name for weight in report.weights} | set(report.replaced)
    assert len(changed & set(report.untied)) == 1
    for tensor in set(before) - changed:
        assert torch.equal(before[tensor], after[tensor]), tensor
    plain = reloaded(tmp_path / "fused")
    # float32 through two or three layers; logits are of order 1
    assert float((logits(plain) - expected).abs().max()) < 1e-4


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"target_modules": ["lm_head"], "modules_to_save": ["embed_tokens"]},
    ],
)
def test_both_of_a_tied_pair_each_in_its_way(config: dict[str, Any], tmp_path: Path) -> None:
    base = saved(small_model("llama-tied"), tmp_path / "base")
    expected = logits(adapter(small_model("llama-tied"), tmp_path / "adapter", size=0.1, **config))
    with pytest.raises(OptionError, match="one tensor") as caught:
        svdbank.fuse(base, tmp_path / "adapter", tmp_path / "no")
    assert str(caught.value.hint).startswith("--untie")
    assert ("each by itself" in str(caught.value)) == ("embed_tokens" in config["target_modules"])
    svdbank.fuse(base, tmp_path / "adapter", tmp_path / "fused", untie=True)
    # as above
    assert float((logits(reloaded(tmp_path / "fused")) - expected).abs().max()) < 1e-4


@pytest.mark.parametrize("untie", [False, True])
def test_a_larger_tied_vocabulary_arrives_in_the_resized_base(untie: bool, tmp_path: Path) -> None:
    """PEFT saves the one embedding under both names."""
    base = saved(small_model("llama-tied"), tmp_path / "base")
    grown: Any = reloaded(base)
    grown.resize_token_embeddings(1216)
    expected = logits(adapter(grown, tmp_path / "adapter", size=0.1, target_modules=["q_proj"]))
    with pytest.raises(OptionError, match=r"1216.*1200") as caught:
        svdbank.fuse(base, tmp_path / "adapter", tmp_path / "no", untie=untie)
    assert str(caught.value.hint).startswith(
        "model.resize_token_embeddings(1216), model.save_pretrained(FOLDER), and fuse into FOLDER"
    )
    model: Any = reloaded(base)
    model.resize_token_embeddings(1216)
    model.save_pretrained(tmp_path / "resized")
    svdbank.fuse(tmp_path / "resized", tmp_path / "adapter", tmp_path / "fused", untie=untie)
    fused = reloaded(tmp_path / "fused")
    assert fused.config.tie_word_embeddings is not untie  # type: ignore[union-attr]
    # as above
    assert float((logits(fused) - expected).abs().max()) < 1e-4


def test_into_another_tied_model(tmp_path: Path) -> None:
    base = saved(small_model("llama-tied"), tmp_path / "base")
    other = saved(small_model("llama-tied", seed=5), tmp_path / "other")
    adapter(small_model("llama-tied"), tmp_path / "adapter", target_modules=["lm_head"])
    expected = logits(adapter(small_model("llama-tied", seed=5), tmp_path / "again", target_modules=["lm_head"]))
    svdbank.fuse(base, tmp_path / "adapter", tmp_path / "fused", into=other, untie=True)
    # as above
    assert float((logits(reloaded(tmp_path / "fused")) - expected).abs().max()) < 1e-4


def test_what_needs_no_untying_is_written_as_without_it(tmp_path: Path) -> None:
    base = saved(small_model("llama-tied"), tmp_path / "base")
    adapter(small_model("llama-tied"), tmp_path / "adapter", target_modules=["q_proj"])
    svdbank.fuse(base, tmp_path / "adapter", tmp_path / "one")
    report = svdbank.fuse(base, tmp_path / "adapter", tmp_path / "other", untie=True)
    assert report.untied == ()
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes(), path.name


@pytest.mark.parametrize(
    ("name", "target"), [("bert-masked", "word_embeddings"), ("bert-masked", "cls.predictions.decoder"), ("t5", "lm_head")]
)
def test_a_head_that_does_more_when_tied_is_refused(name: str, target: str, tmp_path: Path) -> None:
    base = saved(small_model(name), tmp_path / "base")
    adapter(small_model(name), tmp_path / "adapter", target_modules=[target])
    with pytest.raises(OptionError, match="one tensor") as caught:
        svdbank.fuse(base, tmp_path / "adapter", tmp_path / "fused")
    assert caught.value.hint is None  # untying is no way out
    with pytest.raises(OptionError, match="cannot be untied"):
        svdbank.fuse(base, tmp_path / "adapter", tmp_path / "fused", untie=True)
    assert not (tmp_path / "fused").exists()


@pytest.mark.parametrize(
    "config", [{"target_modules": ["q_proj", "shared"]}, {"modules_to_save": ["shared"], "target_modules": ["q_proj"]}]
)
def test_an_adapter_on_a_module_that_is_never_called_is_refused(config: dict[str, Any], tmp_path: Path) -> None:
    import peft
    import transformers

    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    model = transformers.BartModel(transformers.BartConfig(vocab_size=96, d_model=16, **sizes)).eval()
    base, tokens = saved(model, tmp_path / "base"), torch.arange(5)[None]
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**config, init_lora_weights=False)).eval()
    wrapped.save_pretrained(tmp_path / "adapter")
    before = wrapped(input_ids=tokens).last_hidden_state
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if ".shared." in name and parameter.requires_grad:
                parameter += 1
    assert torch.equal(wrapped(input_ids=tokens).last_hidden_state, before)
    with pytest.raises(OptionError, match="shared is never called"):
        svdbank.fuse(base, tmp_path / "adapter", tmp_path / "fused")
