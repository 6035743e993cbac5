"""TRL calls PEFT itself: let it do so inside ``use_bank``.

python examples/trl_sft.py [MODEL]
"""

import sys

import torch
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

import svdbank
from svdbank.peft import attachment, use_bank

name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M"
bank = svdbank.build(name)

texts = [f"Clause {i}: the licensee shall keep notice {i} and may not sublicense the work." for i in range(32)]
options = SFTConfig(
    output_dir="trl-sft-run",
    max_steps=10,
    per_device_train_batch_size=4,
    learning_rate=2e-3,
    logging_steps=1,
    max_length=64,
    bf16=torch.cuda.is_available(),  # TRL wants bfloat16, which a processor without a GPU may not have
    report_to=[],
)
config = LoraConfig(r=16, lora_alpha=16, init_lora_weights="mica", target_modules="all-linear", task_type="CAUSAL_LM")
with use_bank(bank):  # only while the adapter is made; training may run outside
    trainer = SFTTrainer(name, args=options, train_dataset=Dataset.from_dict({"text": texts}), peft_config=config)
found = attachment(trainer.model)
print(len(found.weights), "weights,", found.state)

trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
trainer.save_model("trl-sft-law")
