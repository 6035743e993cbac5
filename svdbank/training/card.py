"""The card of a trained adapter, for people."""

from __future__ import annotations

import json

from svdbank.adapter.card import escaped
from svdbank.training.options import TrainOptions
from svdbank.training.report import TrainReport

#: ``low_cpu_mem_usage`` would round the factors on a base in bfloat16.
_PLAIN = """```python
from peft import PeftModel

model = PeftModel.from_pretrained(model, "path/to/this/folder")
```
"""

_LOADED = """```python
from svdbank.peft import load_adapter

model = load_adapter(model, "path/to/this/folder", is_trainable=False)
```

`PeftModel.from_pretrained` loads it too, after one SVD a weight, whose result it then overwrites. With `low_cpu_mem_usage=True` it needs
none, and on a base in bfloat16 rounds the factors.
"""


def card(options: TrainOptions, report: TrainReport) -> str:
    """README.md of a trained adapter: front matter that the Hub reads, what it was trained on and what came of it."""
    held_out = report.held_out
    outcome = (
        f"Loss a token on {held_out.blocks} blocks held out: {held_out.before:.3f} ± {held_out.before_error:.3f} before, "
        f"{held_out.after:.3f} ± {held_out.after_error:.3f} after, a change of {held_out.change:+.3f} ± {held_out.change_error:.3f} "
        "(nats, standard error over blocks)."
        if held_out
        else "No text was held out."
    )
    beneath = (
        f"\nIt was trained on top of {', '.join(map(escaped, options.on_top_of))}, which have to act beside it.\n"
        if options.on_top_of
        else ""
    )
    return f"""---
base_model: {json.dumps(report.model)}
library_name: peft
pipeline_tag: text-generation
tags:
- lora
- {report.method}
- svdbank
---

# {report.method} adapter, rank {report.rank}

Continued pretraining of {escaped(report.model)} by [svdbank](https://pypi.org/project/svdbank/): {report.steps} steps, {report.tokens:,}
tokens of {", ".join(map(escaped, options.data))}, {report.trainable_parameters:,} trainable parameters.
{outcome}
{beneath}
`training.toml` holds every option, and `svdbank train --config training.toml -o OTHER` trains it again; `training.json` holds the figures.

{_LOADED if options.method == "mica" else _PLAIN}"""
