"""4-bit bases on CPUs: bitsandbytes packs a weight for AVX512-BF16 at its first evaluation, and no gradient passes a packed one.

The packed form also rounds the blocks' scales to bfloat16, and is kept for training afterwards, without a word. So a model that is to be
trained is told not to pack.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

from svdbank.core.errors import OptionError


def check_gradients(root: nn.Module) -> None:
    """Raise :class:`OptionError` where weights are packed already."""
    packed = [name for name, module in _layers(root) if getattr(module.weight.quant_state, "packing_format_for_cpu", False)]
    if packed:
        raise OptionError(
            f"this 4-bit model was evaluated on this CPU already, and bitsandbytes then packed {len(packed)} weights into a form that "
            f"passes no gradient, first {packed[0]}",
            hint="load the base again and attach before the first evaluation",
        )


def keep_gradients(root: nn.Module) -> None:
    """Have evaluations leave the weights as they are, so that a gradient passes them afterwards too."""
    for _, module in _layers(root):
        module.support_avx512bf16_for_cpu = False


def _layers(root: nn.Module) -> Iterator[tuple[str, Any]]:
    """The 4-bit layers. Asking costs no import where bitsandbytes is not in use."""
    if sys.modules.get("bitsandbytes") is None:
        return
    from bitsandbytes.nn import Linear4bit

    for name, module in root.named_modules():
        if isinstance(module, Linear4bit):
            yield name, module
