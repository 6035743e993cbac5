"""A base in 4 bits (QLoRA), with the bank of its full-precision weights.

python examples/four_bit.py [MODEL]
"""

import sys
import warnings

import torch
from peft import LoraConfig, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import svdbank
from svdbank.peft import UnverifiedBaseWarning, get_peft_model, load_adapter

name = sys.argv[1] if len(sys.argv) > 1 else "HuggingFaceTB/SmolLM2-135M"
bank = svdbank.build(name)  # of the full-precision weights: the minor directions of 4-bit weights are rounding noise

nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
base = AutoModelForCausalLM.from_pretrained(name, quantization_config=nf4, dtype=torch.float32)
config = LoraConfig(r=16, lora_alpha=16, init_lora_weights="mica", target_modules="all-linear", task_type="CAUSAL_LM")
with warnings.catch_warnings():
    warnings.simplefilter("ignore", UnverifiedBaseWarning)  # values of 4-bit weights cannot be compared; names and shapes were
    model = get_peft_model(prepare_model_for_kbit_training(base), config, bank=bank)

batch = AutoTokenizer.from_pretrained(name)("The licensee shall keep this notice.", return_tensors="pt").to(model.device)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
losses = []
for _ in range(10):
    loss = model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")

model.save_pretrained("four-bit-law")
full = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
model = load_adapter(full, "four-bit-law", bank=bank, is_trainable=False)  # the same adapter on the full-precision base
with torch.no_grad():
    print(f"on the full-precision base {model(**batch.to('cpu'), labels=batch['input_ids'].to('cpu')).loss.item():.2f}")
