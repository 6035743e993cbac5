"""What a run of ``train`` did: figures for programs, a card for people."""

from __future__ import annotations

import json

from svdbank.adapter.card import escaped
from svdbank.core.specs import Struct
from svdbank.training.options import TrainOptions


class Change(Struct, frozen=True):
    """Loss on blocks of one text before and after, nats a token. Errors are standard errors over blocks; the change is paired."""

    text: str
    blocks: int
    tokens: int
    before: float
    before_error: float
    after: float
    after_error: float
    change: float
    change_error: float


class TrainReport(Struct, frozen=True):
    """What a run did, as it also lies in ``training.json``. As text it is the adapter's folder.

    ``curve`` holds (step, mean training loss since the point before). ``step_seconds`` and its standard error are over the steps of
    this process but the first; ``peak_bytes`` is the most GPU memory that tensors took, or without a GPU the most memory this
    process had. ``resumed_from`` is the step of the checkpoint this process began at.
    """

    adapter: str
    model: str
    method: str
    rank: int
    bank: str | None
    trainable_parameters: int
    blocks: int
    length: int
    steps: int
    tokens: int
    processes: int
    dtype: str
    seconds: float
    step_seconds: float
    step_seconds_error: float
    peak_bytes: int
    resumed_from: int | None
    held_out: Change | None
    retained: tuple[Change, ...]
    curve: tuple[tuple[int, float], ...]

    def __str__(self) -> str:
        return self.adapter


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

```python
from peft import PeftModel

model = PeftModel.from_pretrained(model, "path/to/this/folder", low_cpu_mem_usage=True)
```
"""
