"""The model card of a fresh adapter."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from svdbank.adapter.settings import AdapterCache, LoraSettings

_NAMES = {"mica": "MiCA", "milora": "MiLoRA", "pissa": "PiSSA"}


def card(settings: LoraSettings, cache: AdapterCache) -> str:
    """README.md for an adapter folder: front matter that the Hub reads, and how to load it without an SVD."""
    base = settings.base_model_name_or_path or cache.base
    return f"""---
base_model: {json.dumps(base)}
library_name: peft
tags:
- lora
- {cache.method}
- svdbank
---

# {_NAMES[cache.method]} adapter, rank {cache.rank}

{_body(base, settings, cache)}
Base digest of these weights: `{cache.base_digest}`
"""


def _body(base: str, settings: LoraSettings, cache: AdapterCache) -> str:
    if cache.method != "mica":
        return _residual(base, cache, written=settings.init_lora_weights is True)
    return _parameters(base, cache) if settings.target_parameters else _mica(base, cache)


def _parameters(base: str, cache: AdapterCache) -> str:
    return f"""A fresh adapter for {escaped(base)}, over {len(cache.weights)} weights, experts or routers among them.
`B` holds {cache.rank} minor left singular vectors of each weight, and MiCA keeps it as it is; `A` is zero and is what training changes.
PEFT has no MiCA for experts and routers. [svdbank](https://pypi.org/project/svdbank/) loads the adapter with `B` frozen:

```python
from svdbank.peft import load_adapter

model = load_adapter(model, "path/to/this/folder")
```

`PeftModel.from_pretrained` loads the same values as an ordinary LoRA, **in which `B` trains too**.
"""


def _mica(base: str, cache: AdapterCache) -> str:
    return f"""A fresh adapter for {escaped(base)}, over {len(cache.weights)} weights. `B` holds {cache.rank} minor left
singular vectors of each weight and stays frozen; `A` is zero and is what training changes.
Written by [svdbank](https://pypi.org/project/svdbank/) from a bank, so no decomposition is needed to load it:

```python
from peft import PeftModel

model = PeftModel.from_pretrained(model, "path/to/this/folder", is_trainable=True, low_cpu_mem_usage=True)
```

`low_cpu_mem_usage=True` is what keeps PEFT from running one SVD a weight, whose result it would then overwrite. On a base in
bfloat16 it also rounds the factors; `svdbank.peft.load_adapter(model, "path/to/this/folder")` does not.
"""


def _residual(base: str, cache: AdapterCache, *, written: bool) -> str:
    end = "smallest" if cache.method == "milora" else "largest"
    begin = f"""A fresh adapter over {len(cache.weights)} weights of {escaped(cache.base)}. `B` and `A` hold the {end}
singular triplets of each weight, and both train. **It belongs to the base without them, `W − s·B·A`**, not to
{escaped(cache.base)} itself: on that, it would count them twice.
Recorded as its base: {escaped(base)}.
"""
    loading = (
        """That is the checkpoint which `svdbank init --residual-out` wrote; PEFT alone loads it there:

```python
from peft import PeftModel

model = PeftModel.from_pretrained(model, "path/to/this/folder", is_trainable=True)
```
"""
        if written
        else """
```python
from svdbank.peft import load_adapter

model = load_adapter(model, "path/to/this/folder", bank="path/to/the/bank")  # takes them out of the model's weights in memory
```
"""
    )
    return f"""{begin}{loading}
After training, `svdbank export --to lora` makes a plain LoRA for the unchanged base.
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
