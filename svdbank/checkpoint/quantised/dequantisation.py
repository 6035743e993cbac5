"""From stored codes and their scales to the values of a weight, panel by panel.

The arithmetic is that of the libraries which load these models: products in float32, rounded once to the type of the values
(transformers' ``Fp8Dequantize`` and ``convert_moe_packed_tensors``), or first to that of the scales (compressed-tensors'
``dequantize``). The tests compare every bit with theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from math import prod
from typing import TYPE_CHECKING

from svdbank.checkpoint.dtypes import torch_dtype
from svdbank.core.errors import CheckpointError
from svdbank.core.specs import Quantisation, TensorSource

if TYPE_CHECKING:
    import torch
    from torch import Tensor

#: Bytes of codes read at a time: enough to hide the latency of a request.
READ = 4 << 20
#: Values dequantised at a time: 4 MiB in float32, with what is in between three times that.
PANEL = 1 << 20

#: The sixteen values of an e2m1 code (OCP Microscaling Formats 1.0, section 5.3.3), by code.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)

#: ``fill(buffer, begin)``: fill a buffer with the stored bytes from the offset ``begin`` of the tensor's codes on.
Fill = Callable[[memoryview, int], None]


def dequantise(source: TensorSource, fill: Fill, scales: Tensor, out: Tensor | None = None) -> Tensor:
    """The values of a quantised ``source``, in its dtype and shape; ``scales`` are the raw bytes of its scales (uint8).

    ``fill`` is called in the order of the bytes, for whole rows of at most :data:`READ` bytes. Memory: the result, one such buffer
    and one panel. Where codes are stored transposed and no ``out`` is given, the result is a transposed view. Raises
    CheckpointError for scales that are not finite.
    """
    import torch

    how = source.quantisation
    assert how is not None
    factors = _factors(scales, how)
    if not bool(torch.isfinite(factors).all()):
        raise CheckpointError(
            f"the scales {how.scales.name!r} of {source.name!r} hold NaN or infinity",
            hint="leave it out with --targets, or download the checkpoint again",
        )
    if out is None:
        stored = torch.empty(how.shape, dtype=torch_dtype(source.dtype))
        out = stored.mT if how.transposed else stored
    else:
        stored = out.mT if how.transposed else out
    *_, rows, columns = how.shape
    slices = stored.view(-1, rows, columns)
    row_bytes = columns // 2 if how.codes == "F4" else columns
    factors = factors.reshape(-1, *factors.shape[-2:])  # (slices or 1, row blocks, column blocks)
    begin = 0
    for number, values in enumerate(slices):
        own = factors[number if len(factors) > 1 else 0]
        for first, last in _steps(0, rows, READ // row_bytes):
            codes = torch.empty(last - first, row_bytes, dtype=torch.uint8)
            fill(codes.numpy().reshape(-1).data, begin)
            begin += codes.numel()
            for start, stop in _steps(first, last, PANEL // columns):
                some = codes[start - first : stop - first]
                panel = _unpacked(some) if how.codes == "F4" else some.view(_fp8(how.codes)).to(torch.float32)
                values[start:stop] = _scaled(panel, own, how, start)
    return out


def _steps(begin: int, end: int, step: int) -> Iterator[tuple[int, int]]:
    """``begin … end`` in pieces of ``step``, at least one."""
    step = max(1, step)
    return ((at, min(at + step, end)) for at in range(begin, end, step))


def _scaled(panel: Tensor, factors: Tensor, how: Quantisation, start: int) -> Tensor:
    """``panel`` (n, columns), the rows from ``start`` on, times ``factors`` (row blocks, column blocks), in place."""
    import torch

    height, width = how.block
    own = factors[torch.arange(start, start + len(panel)) // height]  # (n, column blocks)
    whole, rest = divmod(panel.shape[1], width)
    if whole:
        # Through a view of the panel: scales expanded over columns as well would take as much memory again.
        panel[:, : whole * width].view(len(panel), whole, width).mul_(own[:, :whole, None])
    if rest:
        panel[:, whole * width :].mul_(own[:, whole:])
    if how.scheme == "compressed-tensors" and how.scales.dtype in ("F16", "BF16"):
        return panel.to(torch_dtype(how.scales.dtype))
    return panel


def _unpacked(codes: Tensor) -> Tensor:
    """Two e2m1 codes a byte, the low half first: (n, bytes) to float32 (n, 2 · bytes)."""
    import torch

    pairs = torch.tensor([(E2M1[byte & 15], E2M1[byte >> 4]) for byte in range(256)])
    return pairs.index_select(0, codes.reshape(-1).to(torch.int32)).reshape(len(codes), -1)


def _factors(scales: Tensor, how: Quantisation) -> Tensor:
    """The scales in float32, at least 2-D."""
    import torch

    kind, shape = how.scales.dtype, how.scales.shape
    powers = kind in ("U8", "F8_E8M0")
    factors = _powers().index_select(0, scales.to(torch.int32)) if powers else scales.view(torch_dtype(kind)).to(torch.float32)
    return factors.reshape(shape if len(shape) >= 2 and prod(shape) > 1 else (1, 1))


@cache
def _powers() -> Tensor:
    """``2^(code − 127)`` for the 256 codes of e8m0; 255 is NaN (OCP Microscaling Formats 1.0, section 5.4.1)."""
    import torch

    return torch.tensor([2.0 ** (code - 127) for code in range(255)] + [float("nan")])


def _fp8(name: str) -> torch.dtype:
    import torch

    return {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}[name]
