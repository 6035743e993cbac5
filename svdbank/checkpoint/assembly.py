"""Putting a module's matrix together from the tensors it is made of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from svdbank.checkpoint.dtypes import FLOATING, torch_dtype
from svdbank.core.errors import CheckpointError
from svdbank.core.specs import TensorSource, WeightSpec

if TYPE_CHECKING:
    from torch import Tensor


class ReadTensor(Protocol):
    """:meth:`svdbank.checkpoint.source.Checkpoint.read_tensor`."""

    def __call__(self, source: TensorSource, digest: Any | None = None, *, out: Tensor | None = None) -> Tensor: ...


def assemble(read_tensor: ReadTensor, spec: WeightSpec, digest: Any | None = None) -> Tensor:
    """The matrix (out, in) of ``spec`` in its stored dtype; ``digest`` (a hashlib object) is fed its sources' bytes in their order.

    ``as_is`` and ``transpose`` take one source, the latter as a view of what was read. ``concat`` lays the rows of several under
    each other, each read straight into its place. Raises CheckpointError where the sources do not make a matrix of that shape.
    """
    shape = (spec.out_features, spec.in_features)
    if _shape(spec) != shape:
        raise CheckpointError(f"{spec.name!r} is {_shape(spec)}, not {shape}")
    if spec.operation != "concat":
        stored = read_tensor(spec.sources[0], digest)
        return stored.mT if spec.operation == "transpose" else stored
    import torch

    dtype = spec.sources[0].dtype
    if dtype not in FLOATING or any(source.dtype != dtype for source in spec.sources):
        raise CheckpointError(f"{spec.name!r} is made of {', '.join(source.dtype for source in spec.sources)}")
    matrix = torch.empty(shape, dtype=torch_dtype(dtype))
    row = 0
    for source in spec.sources:
        read_tensor(source, digest, out=matrix[row : row + source.shape[0]])
        row += source.shape[0]
    return matrix


def _shape(spec: WeightSpec) -> tuple[int, ...]:
    """The shape that the sources of ``spec`` give, from their headers."""
    shapes = [source.shape for source in spec.sources]
    if spec.operation == "concat":
        columns = {shape[1:] for shape in shapes}
        return (sum(shape[0] for shape in shapes), *columns.pop()) if len(columns) == 1 else ()
    if len(shapes) != 1:
        return ()
    return shapes[0][::-1] if spec.operation == "transpose" else shapes[0]
