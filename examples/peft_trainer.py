"""PEFT and the Trainer of Transformers: the same LoraConfig, with a lookup in place of one SVD for each weight.

python examples/peft_trainer.py [MODEL]
"""

import sys

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling, Trainer, TrainingArguments

import svdbank
from svdbank.peft import get_peft_model, load_adapter

name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M"
bank = svdbank.build(name)  # once; the next run finds it in the cache

base = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
config = LoraConfig(r=16, lora_alpha=16, init_lora_weights="mica", target_modules="all-linear", task_type="CAUSAL_LM")
model = get_peft_model(base, config, bank=bank)
model.print_trainable_parameters()

tokenizer = AutoTokenizer.from_pretrained(name)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
clauses = [f"Clause {i}: the licensee shall keep notice {i} and may not sublicense the work." for i in range(32)]
arguments = TrainingArguments(
    "peft-trainer-run", max_steps=10, per_device_train_batch_size=4, learning_rate=2e-3, logging_steps=1, report_to=[]
)
trainer = Trainer(
    model=model,
    args=arguments,
    train_dataset=[tokenizer(text) for text in clauses],
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
)
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")

model.save_pretrained("peft-trainer-law")
fresh = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
again = load_adapter(fresh, "peft-trainer-law", bank=bank, is_trainable=False)  # no SVD, and the base is checked
batch = tokenizer(clauses[0], return_tensors="pt").to(model.device)
with torch.no_grad():
    model.eval()
    print("same after loading:", torch.allclose(model(**batch).logits.cpu(), again(**batch.to("cpu")).logits, atol=1e-3))
