"""A source of weights that lie in a loaded model: whole, on whatever device, told by the files that they came from or by themselves."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING

from svdbank.checkpoint.dtypes import torch_dtype
from svdbank.checkpoint.naming.correspondence import Parameter
from svdbank.checkpoint.naming.matrices import Matrices
from svdbank.checkpoint.naming.roles import Role
from svdbank.checkpoint.source import Checkpoint, cache_key_of
from svdbank.core.specs import SourceFile, TensorSource, WeightSpec

if TYPE_CHECKING:
    from torch import Tensor

#: What stands for a file where there is none.
MEMORY = "memory"


@dataclass(frozen=True)
class InMemory:
    """A weight in memory: a matrix (out, in) on its device, and the sha256 hex of the bytes that it is known by."""

    matrix: Tensor
    sha256: str


@dataclass(frozen=True, eq=False)
class LoadedCheckpoint(Checkpoint):
    """A checkpoint some of whose weights are read from memory, where they lie: those of ``held``, by name."""

    held: Mapping[str, InMemory] = field(default_factory=dict, repr=False)

    def read_hashed(self, spec: WeightSpec) -> tuple[Tensor, str]:
        """As :meth:`Checkpoint.read_hashed`; what is held stays on its device, in the dtype that the spec names."""
        held = self.held.get(spec.name)
        if held is None:
            return super().read_hashed(spec)
        matrix = held.matrix.to(torch_dtype(spec.sources[0].dtype))
        if matrix.is_cuda:
            import torch

            torch.cuda.current_stream(matrix.device).synchronize()  # the solver works on a stream of its own
        return matrix, held.sha256

    def read(self, spec: WeightSpec) -> Tensor:
        """As :meth:`Checkpoint.read`."""
        return self.read_hashed(spec)[0] if spec.name in self.held else super().read(spec)


@dataclass(frozen=True)
class LoadedWeight:
    """A matrix of a loaded model: what it is there, under which name it has its values, and those, (out, in) on their device.

    ``tensor`` tells weights apart that share their values: a tied embedding and head have one. ``expert`` counts slices of a parameter.
    """

    role: Role
    tensor: str
    matrix: Tensor
    expert: int | None = None


def of_files(checkpoint: Checkpoint, held: Mapping[str, InMemory]) -> LoadedCheckpoint:
    """``checkpoint`` with the weights of ``held`` read from memory, which holds what the files do."""
    own = {one.name: getattr(checkpoint, one.name) for one in fields(Checkpoint)}
    return LoadedCheckpoint(**own, held=held)


def of_memory(name: str, about: str, weights: Iterable[LoadedWeight]) -> LoadedCheckpoint:
    """A checkpoint of weights that no file is known to hold: told by their own bytes, which are hashed here.

    ``name`` is for people, ``about`` says what kind of model it is.
    """
    found: list[tuple[Role, Parameter]] = []
    held: dict[str, InMemory] = {}
    sources: dict[str, TensorSource] = {}
    whole = hashlib.sha256()
    position = 0
    for weight in weights:
        role = weight.role
        stored = weight.matrix.mT if role.transposed else weight.matrix
        source = sources.get(weight.tensor)
        if source is None:
            nbytes = stored.numel() * stored.element_size()
            source = TensorSource(weight.tensor, MEMORY, _dtype_name(stored), tuple(stored.shape), position, position + nbytes)
            sources[weight.tensor] = source
            position += nbytes
        parameter = Parameter(f"{role.module}.weight" if weight.expert is None else role.module, (source,), weight.expert)
        found.append((role, parameter))
        own = parameter.name if weight.expert is None else f"{role.module}.{weight.expert}"
        held[own] = InMemory(weight.matrix, sha256_of(stored))
        whole.update(f"{own} {source.dtype} {source.shape} {held[own].sha256}\n".encode())
    file = SourceFile(MEMORY, position, whole.hexdigest())
    names = {source.name: source.name for source in sources.values()}
    return LoadedCheckpoint(
        name=name,
        revision=None,
        folder=Path(),
        config={},
        tensors=sources,
        files=(file,),
        cache_key=cache_key_of([file]),
        config_digest=about_digest(about),
        _open={},
        kept={"matrices": Matrices(found, None, names, {}, {}, f"the loaded model: {about}")},
        held=held,
    )


def about_digest(about: str) -> str:
    """What a checkpoint of memory has in place of the digest of a configuration."""
    return hashlib.sha256(f"memory: {about}".encode()).hexdigest()


def sha256_of(stored: Tensor) -> str:
    """sha256 hex of the values of a tensor in its own dtype, row by row."""
    import torch

    return hashlib.sha256(stored.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy().data).hexdigest()


def _dtype_name(tensor: Tensor) -> str:
    import torch

    return {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[tensor.dtype]
