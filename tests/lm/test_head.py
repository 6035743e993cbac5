"""The loss by pieces of a large vocabulary is that of whole logits, or the whole ones are taken."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch

from svdbank.lm import head as heads
from svdbank.lm.head import head_of, outgrows_memory
from svdbank.lm.measuring import padded, summed_losses
from svdbank.lm.windows import Window

VOCABULARY = 3000


def made(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """A small causal model with a vocabulary that is large for it, whose logits are far from zero."""
    import transformers

    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
    }

    def without(*names: str) -> dict[str, Any]:
        return {name: value for name, value in sizes.items() if name not in names}

    torch.manual_seed(0)
    made = {
        "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)),
        "tied": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, tie_word_embeddings=True)),
        "biased": lambda: transformers.PhiForCausalLM(transformers.PhiConfig(**without("head_dim", "num_key_value_heads"))),
        "gemma3": lambda: transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**sizes, sliding_window=8)),
        "capped": lambda: transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**sizes, final_logit_softcapping=5.0)),
        "scaled": lambda: transformers.GraniteForCausalLM(transformers.GraniteConfig(**sizes, logits_scaling=4.0)),
        "multiplied": lambda: transformers.CohereForCausalLM(transformers.CohereConfig(**without("head_dim"), logit_scale=0.25)),
    }[kind]()  # fmt: skip
    with torch.no_grad():
        head = made.get_output_embeddings()
        head.weight.normal_(0, 0.5)
        if head.bias is not None:
            head.bias.normal_()
    return made.to(dtype).eval()


def adapted(model: Any) -> Any:
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)


def batch(rows: int = 3, length: int = 20) -> tuple[dict[str, Any], list[Window]]:
    generator = torch.Generator().manual_seed(1)
    windows = [
        Window(torch.randint(0, VOCABULARY, (length - 3 * i,), generator=generator).tolist(), True, 1 + i) for i in range(rows)
    ]
    return padded(windows), windows


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(heads, "PIECE", 7 * VOCABULARY)
    yield


PLAIN = ["llama", "tied", "biased", "gemma3", "scaled", "multiplied"]


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("on_head", [False, True], ids=["", "adapter on the head"])
def test_loss_and_gradient_by_pieces_are_those_of_whole_logits(kind: str, on_head: bool) -> None:
    model = made(kind)
    if on_head:
        model = adapted(model)
    inputs, _ = batch()
    labels = inputs.pop("labels")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    whole = model(**inputs, labels=labels).loss
    wanted = torch.autograd.grad(whole, trained, allow_unused=True)

    head = head_of(model)
    assert head is not None
    with head.apart():
        loss = head.loss(model(**inputs).logits, labels)
    found = torch.autograd.grad(loss, trained, allow_unused=True)
    # float32 sums in another order, in both.
    assert float(loss.detach()) == pytest.approx(float(whole.detach()), rel=1e-5)
    norm = max(float(gradient.norm()) for gradient in wanted if gradient is not None)
    for one, other in zip(found, wanted, strict=True):
        assert (one is None) == (other is None)
        assert one is None or other is None or float((one - other).norm()) <= 1e-5 * norm
    count = int((labels[:, 1:] != -100).sum())
    with head.apart():
        assert float(head.loss(model(**inputs).logits, labels, count=2 * count).detach()) == pytest.approx(
            float(whole.detach()) / 2, rel=1e-5
        )


@pytest.mark.parametrize("kind", PLAIN)
def test_losses_of_windows_by_pieces_are_those_of_whole_logits(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, windows = batch()
    for dtype, same in ((torch.float32, 1e-5), (torch.bfloat16, 1e-5)):  # the same products and the same float32 sums
        model = made(kind, dtype)
        wanted = summed_losses(model, windows)
        with monkeypatch.context() as patch:
            patch.setattr(heads, "free_bytes", lambda device: 0)
            assert summed_losses(model, windows) == pytest.approx(wanted, rel=same)


def test_capped_logits_are_taken_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("capped")
    _, windows = batch()
    assert head_of(model) is None
    wanted = summed_losses(model, windows)
    monkeypatch.setattr(heads, "free_bytes", lambda device: 0)
    assert summed_losses(model, windows) == wanted


def test_the_model_is_as_it_was_outside() -> None:
    model = made("llama").train()
    tokens = torch.tensor([[5, 6, 7]])
    before = model(input_ids=tokens).logits
    head = head_of(model)
    assert head is not None and model.training
    with pytest.raises(RuntimeError, match="stop"), head.apart():
        raise RuntimeError("stop")
    assert torch.equal(model(input_ids=tokens).logits, before)


def test_pieces_are_for_memory_that_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("llama")
    monkeypatch.setattr(heads, "free_bytes", lambda device: 16 * VOCABULARY * 1000)
    assert not outgrows_memory(model, 499, training=True) and outgrows_memory(model, 501, training=True)
    assert not outgrows_memory(model, 999, training=False) and outgrows_memory(model, 1001, training=False)
