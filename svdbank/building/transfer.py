"""Weights on their way to a GPU, and bases on their way back."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from svdbank.core.basis import Basis, Triplets

#: Bytes of a page-locked buffer. Two a thread: one is filled while the GPU fetches the other. Locking memory takes longer than copying it
#: (0.8 s a GB against 0.1), so little of it is locked, once.
STAGE = 16 << 20

_own = threading.local()


def uploaded(matrix: Tensor, device: torch.device) -> Tensor:
    """``matrix`` on ``device``, laid out as it is on the CPU; there once the current stream is done."""
    if device.type != "cuda" or matrix.device.type != "cpu":
        return matrix.to(device)
    turned = not matrix.is_contiguous()
    stored = matrix.mT.contiguous() if turned else matrix
    found = torch.empty(stored.shape, dtype=stored.dtype, device=device)
    source, target = (tensor.view(-1).view(torch.uint8) for tensor in (stored, found))
    stages = _stages(device)
    for number, start in enumerate(range(0, source.numel(), STAGE)):
        buffer, fetched = stages[number % 2]
        fetched.synchronize()
        piece = source[start : start + STAGE]
        locked = buffer[: piece.numel()]
        locked.copy_(piece)
        target[start : start + STAGE].copy_(locked, non_blocking=True)
        fetched.record()
    return found.mT if turned else found


def _stages(device: torch.device) -> list[tuple[Tensor, torch.cuda.Event]]:
    """This thread's buffers with the event that says when the GPU has fetched what is in them."""
    stages: dict[torch.device, list[tuple[Tensor, torch.cuda.Event]]] = _own.__dict__.setdefault("stages", {})
    if device not in stages:
        stages[device] = [
            (torch.empty(STAGE, dtype=torch.uint8, pin_memory=True), torch.cuda.Event())  # type: ignore[no-untyped-call]
            for _ in range(2)
        ]
    return stages[device]


def brought_home(basis: Basis, dtype: torch.dtype) -> Basis:
    """``basis`` on the CPU, its vectors in ``dtype``: rounded where they were computed, half or a quarter of the bytes to fetch."""

    def end(triplets: Triplets) -> Triplets:
        right = None if triplets.right is None else triplets.right.to(dtype).to("cpu")
        return Triplets(triplets.left.to(dtype).to("cpu"), right, triplets.sigma.to("cpu"))

    return Basis(end(basis.minor), basis.certificate, None if basis.principal is None else end(basis.principal))
