"""Whole tensors of an adapter: what stands in place of the model's own beside its factors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch
from torch import Tensor

from svdbank.core.errors import OptionError, WrongBaseError, abridge

#: What to do where the base's own tensors are needed.
BASE = "name the base model: --base MODEL"

#: How far weights of a merge may be from one, by the rounding of their sum.
_ONE = 1e-9


@dataclass(frozen=True, eq=False)
class WholeTensors:
    """Tensors that an adapter brings along whole.

    Attributes
    ----------
    replacing
        Trained tensors (``modules_to_save``, embeddings of another size) by their name in the loaded model, which they replace.
    beneath
        Of modules that the adapter has factors for, the base's own weight as it was in training (PEFT saves embeddings and heads so),
        by module: ΔW is added to it. Rows that the user set before training are nowhere else.
    original
        By the names of ``replacing``, the base's own tensors, W₀, where they are known.
    """

    replacing: Mapping[str, Tensor] = field(default_factory=dict)
    beneath: Mapping[str, Tensor] = field(default_factory=dict)
    original: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "replacing", MappingProxyType(dict(self.replacing)))
        object.__setattr__(self, "beneath", MappingProxyType(dict(self.beneath)))
        object.__setattr__(self, "original", MappingProxyType(dict(self.original)))

    def refuse_replacing(self, place: object, why: str) -> None:
        """Raise :class:`OptionError` where there are tensors that replace the model's: ``why`` they cannot be used."""
        if self.replacing:
            raise OptionError(
                f"{place}: holds whole trained tensors (modules_to_save), {abridge(list(self.replacing))}: {why}",
                hint="svdbank fuse MODEL ADAPTER -o CHECKPOINT writes the model with all of it",
            )

    def on(self, original: Mapping[str, Tensor]) -> WholeTensors:
        """The same with what is known of the base's own tensors."""
        return replace(self, original={name: original[name] for name in self.replacing if name in original})

    def differences(self, place: object) -> dict[str, Tensor]:
        """``W − W₀`` of every tensor that replaces one, float64. Raises :class:`OptionError` where a W₀ is not known."""
        for name in self.replacing:
            if name not in self.original:
                raise OptionError(
                    f"{place}: holds a whole trained {name} (modules_to_save); how far it is from the base's own is not known without that",
                    hint=BASE,
                )
        return {name: tensor.double() - self.original[name].double() for name, tensor in self.replacing.items()}

    def prefixed(self, prefix: str) -> WholeTensors:
        """The same with ``prefix`` before every name."""
        return WholeTensors(
            {prefix + name: tensor for name, tensor in self.replacing.items()},
            {prefix + module: tensor for module, tensor in self.beneath.items()},
            {prefix + name: tensor for name, tensor in self.original.items()},
        )

    def kept(self, modules: Iterable[str]) -> WholeTensors:
        """Without what lies beneath other modules than these."""
        left = set(modules)
        return replace(self, beneath={module: t for module, t in self.beneath.items() if module in left})


def summed(terms: Sequence[tuple[float, WholeTensors]]) -> WholeTensors:
    """The whole tensors of ``Σ wᵢ aᵢ``: ``W₀ + Σ wᵢ (Wᵢ − W₀)``, in float64, rounded once to float32.

    Raises :class:`OptionError` where W₀ is needed, because the weights of the adapters that have a tensor do not sum to one, and none of
    them knows it; :class:`WrongBaseError` for adapters trained on other values beneath a module.
    """
    replacing: dict[str, list[tuple[float, Tensor]]] = {}
    beneath: dict[str, Tensor] = {}
    original: dict[str, Tensor] = {}
    for weight, whole in terms:
        original |= whole.original
        for name, tensor in whole.replacing.items():
            replacing.setdefault(name, []).append((weight, tensor))
        for module, tensor in whole.beneath.items():
            other = beneath.setdefault(module, tensor)
            if other is not tensor and not (other.shape == tensor.shape and torch.equal(other.to(tensor), tensor)):
                raise WrongBaseError(
                    f"the adapters were trained on other values of {module}.weight, which both hold ({module}.base_layer.weight)"
                )
    return WholeTensors({name: _sum(name, parts, original.get(name)) for name, parts in replacing.items()}, beneath, original)


def _sum(name: str, parts: Sequence[tuple[float, Tensor]], original: Tensor | None) -> Tensor:
    total = math.fsum(weight for weight, _ in parts)
    needed = abs(total - 1) > _ONE
    if needed and original is None:
        raise OptionError(
            f"{name} is a whole trained tensor (modules_to_save) of adapters whose weights sum to {total:g}: the rest is the base's own, "
            "which no adapter holds",
            hint=f"{BASE}, if it stores that tensor; or weights that sum to one for the adapters that hold it",
        )
    first = parts[0][1]
    if any(tensor.shape != first.shape for _, tensor in parts):
        shapes = " and ".join(sorted({str(tuple(tensor.shape)) for _, tensor in parts}))
        raise OptionError(f"{name} is {shapes} in adapters that are to become one")
    if len(parts) == 1 and not needed:
        return first
    added = torch.zeros(first.shape, dtype=torch.float64) if original is None or not needed else original.double() * (1 - total)
    for weight, tensor in parts:
        added.add_(tensor.double(), alpha=weight)
    return added.float()  # the factors beside it are float32 too, whatever the files held
