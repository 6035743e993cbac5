"""The loss over a large vocabulary, without all of its logits in memory at once: the head is taken apart from the model.

Logits of 4 × 1024 tokens over 262,144 words are 4.3 GB in float32, and a training step holds three such tensors. In pieces the same
loss takes longer and some hundred megabytes, so it is asked for only where the memory is short.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svdbank.lm.blocks import IGNORED

if TYPE_CHECKING:
    from torch import Tensor

#: Logits of one piece: 64 Mi numbers, 256 MB in float32.
PIECE = 2**26

#: Bytes that a logit takes: as it is computed, in float32, its exponential, and in training its gradient.
MEASURING, TRAINING = 8, 16

#: Share of the memory that is free which whole logits may take.
SHARE = 0.5

#: Loss by pieces against the whole one, of the few tokens on which they are compared, relative.
SAME = 1e-3


@dataclass(frozen=True)
class Head:
    """A model's head, apart from it, with the ``forward`` that it has when it is not."""

    module: Any
    forward: Any

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Inside, the model gives what goes into its head, (rows, length, hidden), in place of logits."""
        with _replaced(self.module, _passed):
            yield

    def take_apart(self) -> None:
        """As inside :meth:`apart`, for good."""
        self.module.forward = _passed

    def row_losses(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """(rows,) summed loss in nats of ``labels`` (rows, length), −100 for none, which stand one place after what predicts them."""
        import torch

        inputs, wanted, rows = self._predicting(hidden, labels)
        sums = torch.zeros(len(labels), dtype=torch.float32, device=hidden.device)
        with torch.no_grad():
            for piece in self._pieces(len(wanted)):
                sums.index_add_(0, rows[piece], self._losses(inputs[piece], wanted[piece], "none"))
        return sums

    def loss(self, hidden: Tensor, labels: Tensor, count: Any = None) -> Tensor:
        """The mean loss over what is predicted, or the sum over ``count``, with gradients."""
        import torch
        from torch.utils.checkpoint import checkpoint

        inputs, wanted, _ = self._predicting(hidden, labels)
        total: Tensor
        whole = getattr(torch.nn.functional, "linear_cross_entropy", None)
        if whole is not None and type(self.module) is torch.nn.Linear and self.module.weight.dtype == torch.float32:
            # In a narrower dtype it gives the loss in that too. Its pieces hold as many logits as ours.
            weight, bias = self.module.weight, self.module.bias
            options = torch.nn.LinearCrossEntropyOptions()
            total = whole(inputs, weight, wanted, linear_bias=bias, reduction="sum", options=options)
        else:
            parts = [
                checkpoint(self._losses, inputs[piece], wanted[piece], "sum", use_reentrant=False)
                for piece in self._pieces(len(wanted))
            ]
            total = torch.stack(parts).sum()
        return total / (len(wanted) if count is None else count)

    def _predicting(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What goes into the head where something is predicted, (n, hidden); what is, (n,); its row, (n,)."""
        wanted = labels[:, 1:]
        kept = wanted != IGNORED
        inputs, dtype = hidden[:, :-1][kept], self.module.weight.dtype
        # Mixed precision widens what a model gives.
        return inputs.to(dtype) if dtype.is_floating_point else inputs, wanted[kept], kept.nonzero()[:, 0]

    def _losses(self, inputs: Tensor, wanted: Tensor, reduction: str) -> Tensor:
        import torch

        return torch.nn.functional.cross_entropy(self.forward(inputs).float(), wanted, reduction=reduction)

    def _pieces(self, count: int) -> list[slice]:
        size = max(1, PIECE // int(self.module.out_features))
        return [slice(start, start + size) for start in range(0, count, size)]


def head_of(model: Any) -> Head | None:
    """The head, where logits are what it gives, but for a factor; None where they are not (capped) or more goes into the loss.

    Asked of the model itself, on four tokens: what it makes of numbers up to a thousand in place of its head's, and whether the loss is
    that of whole logits.
    """
    import torch

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    module = base.get_output_embeddings()
    if not hasattr(module, "out_features") or getattr(base.config, "output_router_logits", False):
        return None
    head = Head(module, module.forward)
    tokens = torch.tensor([[1, 2, 3, 4]], device=model.device)

    def logits() -> Tensor:
        found: Tensor = model(input_ids=tokens, use_cache=False).logits
        return found

    def wide(hidden: Tensor) -> Tensor:
        return torch.linspace(-1000, 1000, hidden.numel(), device=hidden.device).to(hidden.dtype).view_as(hidden)

    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            with _replaced(module, wide):
                made = logits().double()
            sent = wide(made).to(base.dtype).double()
            factor = float((made * sent).sum() / sent.square().sum())
            if not torch.allclose(made, factor * sent, rtol=2e-2):  # bfloat16 rounds a product by 2⁻⁸
                return None
            wanted = torch.nn.functional.cross_entropy(logits()[0, :-1].float(), tokens[0, 1:], reduction="sum")
            with head.apart():
                found = head.row_losses(logits(), tokens)[0]
        return head if abs(float(found - wanted)) <= SAME * float(wanted) else None
    finally:
        model.train(was_training)


def outgrows_memory(model: Any, tokens: int, *, training: bool) -> bool:
    """Whether whole logits of ``tokens`` tokens are more than may be taken of the memory that is free."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    words = int(getattr(base.get_output_embeddings(), "out_features", 0))
    return tokens * words * (TRAINING if training else MEASURING) > SHARE * free_bytes(model.device)


def free_bytes(device: Any) -> int:
    """Memory that is free where the model computes."""
    import torch

    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    with contextlib.suppress(OSError, ValueError), Path("/proc/meminfo").open() as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _passed(hidden: Tensor) -> Tensor:
    return hidden


@contextlib.contextmanager
def _replaced(module: Any, forward: Any) -> Iterator[None]:
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
