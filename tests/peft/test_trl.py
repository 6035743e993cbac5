"""TRL's SFTTrainer calls PEFT by itself; ``use_bank`` around it is all it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import svdbank
from svdbank.bank.reading import Bank
from svdbank.peft import attachment, load_adapter, use_bank
from tests.peft.models import factors, lora_layers, mica, only_a_trains, quiet, without_svd


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> tuple[Path, Bank]:
    """A small Llama over SmolLM2's vocabulary, with SmolLM2's tokenizer, and its bank."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    place = tmp_path_factory.mktemp("trl")
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    with quiet():
        LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=2, **shape)).save_pretrained(place / "model")
        tokenizer.save_pretrained(place / "model")
    return place / "model", svdbank.build(place / "model", place / "bank", rank=8)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["mica", "milora"])
def test_sft_trains_saves_and_resumes_from_the_bank(method: str, small: tuple[Path, Bank], tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    folder, bank = small
    texts = [f"Clause {i}: the licensee shall not remove this notice." for i in range(16)]

    def trainer(steps: int) -> Any:
        options = SFTConfig(
            output_dir=str(tmp_path / "out"),
            max_steps=steps,
            save_steps=2,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            bf16=False,
            max_length=32,
            disable_tqdm=True,
            gradient_checkpointing=False,
        )
        config = mica(4, init_lora_weights=method, task_type="CAUSAL_LM")
        with use_bank(bank), quiet():
            return SFTTrainer(str(folder), args=options, train_dataset=Dataset.from_dict({"text": texts}), peft_config=config)

    with without_svd():
        first = trainer(4)
        first.train()
        model = first.model
        assert attachment(model).method == method and len(attachment(model).weights) == 14
        assert first.state.log_history[-2]["loss"] < first.state.log_history[0]["loss"]
        if method == "mica":
            assert only_a_trains(model)
            for module, layer in lora_layers(model).items():
                assert torch.equal(factors(layer)[1], bank[f"{module}.weight"].left(4))
        # TRL's own checkpoint, in the middle of training, continues: PEFT loads it over a freshly attached model.
        again = trainer(4)
        again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
        for module, layer in lora_layers(again.model).items():
            assert all(torch.equal(a, b) for a, b in zip(factors(layer), factors(lora_layers(model)[module]), strict=True)), (
                module
            )
        first.save_model(str(tmp_path / "final"))
        from transformers import AutoModelForCausalLM

        with quiet():
            reloaded = load_adapter(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "final", bank=bank)
        tokens = torch.arange(10, 30)[None]
        with torch.no_grad():
            assert torch.equal(reloaded.eval()(tokens).logits, model.eval()(tokens).logits)
