"""What wants a basis: one weight of a loaded model, and the weight of a bank under a module's path."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from svdbank.bank.reading import Bank


@dataclass(frozen=True)
class Target:
    """One weight that wants a basis: its path in the model, its values as they lie in memory, and the rank asked for.

    ``weight`` is (out, in), or (in, out) where ``transposed`` (embeddings, Transformers' ``Conv1D``). The two ``features`` are the
    logical shape, also where the tensor in memory is packed, sharded or absent. ``scale`` is PEFT's α/r or α/√r. One expert of a fused
    (experts, …) parameter is a target of its own, with that parameter's path as its module.
    ``parameter`` is the end of the name under which PEFT's patterns find a parameter: ``gate.weight``, ``gate_up_proj``.
    """

    module: str
    weight: Tensor
    transposed: bool
    out_features: int
    in_features: int
    rank: int
    scale: float = 1.0
    expert: int | None = None
    parameter: str = ""

    @property
    def label(self) -> str:
        """The module for people."""
        return self.module if self.expert is None else f"{self.module}[{self.expert}]"


def of_module(bank: Bank, names: Sequence[str], target: Target) -> str | None:
    """That of ``names``, all of one module or parameter, which is the target's; None where none is."""
    if target.expert is None:
        return names[0] if len(names) == 1 else None
    return next((name for name in names if bank[name].record.expert == target.expert), None)


def as_in(bank: Bank, name: str, target: Target) -> Target:
    """The weight as the bank has its probe: of a tied head with its sides exchanged."""
    if not bank[name].exchanged:
        return target
    return replace(target, transposed=not target.transposed, out_features=target.in_features, in_features=target.out_features)
