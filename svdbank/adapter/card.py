"""The model card of a fresh adapter."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from svdbank.adapter.folder import AdapterCache, LoraSettings


def card(settings: LoraSettings, cache: AdapterCache) -> str:
    """README.md for an adapter folder: front matter that the Hub reads, and how to load it without an SVD."""
    base = settings.base_model_name_or_path or cache.base
    return f"""---
base_model: {json.dumps(base)}
library_name: peft
tags:
- lora
- mica
- svdbank
---

# {cache.method.upper()} adapter, rank {cache.rank}

A fresh adapter for {escaped(base)}, over {len(cache.weights)} weights. `B` holds the {cache.rank} most minor left singular vectors of each
weight and stays frozen; `A` is zero and is what training changes.
Written by [svdbank](https://pypi.org/project/svdbank/) from a bank, so no decomposition is needed to load it:

```python
from peft import PeftModel

model = PeftModel.from_pretrained(model, "path/to/this/folder", is_trainable=True, low_cpu_mem_usage=True)
```

`low_cpu_mem_usage=True` is what keeps PEFT from running one SVD a weight, whose result it would then overwrite.

Base digest of these weights: `{cache.base_digest}`
"""


def composed_card(settings: LoraSettings, cache: AdapterCache, names: Sequence[str]) -> str:
    """README.md of an adapter that svdbank computed from others or converted."""
    base = settings.base_model_name_or_path or cache.base or "unknown"
    kept = ""
    if len(names) > 1:
        kept = f"""
It is the sum of {", ".join(escaped(name) for name in names)}. `components.safetensors` keeps them apart, for
`svdbank stack --scale` and `--drop`; PEFT ignores that file.
"""
    return f"""---
base_model: {json.dumps(base)}
library_name: peft
tags:
- lora
- svdbank
---

# Adapter of rank {cache.rank}

For {escaped(base)}. Every scale is folded into `A` (α = r), so loaders that know a single α/r are right.
{kept}
```python
from peft import PeftModel

model = PeftModel.from_pretrained(model, "path/to/this/folder")
```

Written by [svdbank](https://pypi.org/project/svdbank/).
"""


def escaped(text: str) -> str:
    """Text from outside as inert Markdown."""
    return re.sub(r"([\\`*_{}\[\]()<>#+!|&~-])", r"\\\1", " ".join(text.split()))
