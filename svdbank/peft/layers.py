"""PEFT's LoRA layers as places for factors: which weights of the model each one adapts, and how A and B lie in it.

================  ===============================  ===============================  =======================================
layer             A                                B                                weight
================  ===============================  ===============================  =======================================
linear            ``lora_A.weight`` (r, in)        ``lora_B.weight`` (out, r)       (out, in); Conv1D (in, out); quantised
embedding         ``lora_embedding_A`` (r, vocab)  ``lora_embedding_B`` (hidden, r) (vocab, hidden), seen as (hidden, vocab)
fused experts     ``lora_A.weight`` (E·r, in),     ``lora_B.weight`` (out, r·E),    (E, out, in), or (E, in, out) where the
                  expert-major                     expert-minor                     module says ``is_transposed``
================  ===============================  ===============================  =======================================
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from svdbank.checkpoint.naming import wrappers
from svdbank.core.errors import OptionError
from svdbank.peft.targets import Target

_HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Slot:
    """One layer of an adapter. ``saved`` is its path in the keys of an adapter folder, ``targets`` what its factors are made of."""

    layer: Any
    adapter: str
    saved: str
    kind: Literal["linear", "embedding", "experts"]
    targets: tuple[Target, ...]

    @property
    def factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """A and B as they lie in the layer."""
        if self.kind == "embedding":
            return self.layer.lora_embedding_A[self.adapter], self.layer.lora_embedding_B[self.adapter]
        return self.layer.lora_A[self.adapter].weight, self.layer.lora_B[self.adapter].weight

    @property
    def frozen_name(self) -> str:
        """Where PEFT looks up which of the two does not train."""
        return "lora_embedding_B" if self.kind == "embedding" else "lora_B"

    def assemble(self, factors: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """A and B of the layer from those of its targets."""
        if self.kind != "experts":
            return factors[0]
        A = torch.cat([A for A, _ in factors])  # (E·r, in)
        B = torch.stack([B for _, B in factors], dim=-1)  # (out, r, E)
        return A, B.flatten(1)

    def parts(self, B: Tensor) -> tuple[Tensor, ...]:
        """B (out, r) of each target, from the layer's."""
        if self.kind != "experts":
            return (B,)
        return torch.unbind(B.reshape(B.shape[0], -1, len(self.targets)), dim=-1)

    def put(self, A: Tensor, B: Tensor, *, dtype: torch.dtype | None = None) -> None:
        """Make ``A`` and ``B`` the layer's own parameters, on the device of its base, float32 unless the base is float64."""
        device, own = self._place()
        old = self.factors
        values = (A, B)
        new = [
            nn.Parameter(value.to(device=device, dtype=dtype or own), requires_grad=factor.requires_grad)
            for value, factor in zip(values, old, strict=True)
        ]
        if self.kind == "embedding":
            self.layer.lora_embedding_A[self.adapter], self.layer.lora_embedding_B[self.adapter] = new
        else:
            self.layer.lora_A[self.adapter].weight, self.layer.lora_B[self.adapter].weight = new

    def _place(self) -> tuple[torch.device, torch.dtype]:
        weight = self.targets[0].weight
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        if weight.device.type != "meta":
            return weight.device, dtype
        # Not loaded yet, or offloaded by accelerate: where the module computes, else the CPU. A basis has to lie somewhere.
        hook = getattr(self.layer.get_base_layer(), "_hf_hook", None)
        execution = getattr(hook, "execution_device", None)
        return torch.device("cpu" if execution is None else execution), dtype

    def narrow(self) -> None:
        """Give the factors the dtype of a half-precision base, as PEFT does where it is not asked to train in float32."""
        dtype = getattr(self.layer.get_base_layer(), "compute_dtype", None) or self.targets[0].weight.dtype
        if dtype in _HALF:
            for factor in self.factors:
                factor.data = factor.data.to(dtype)


def slots(root: nn.Module, adapter: str) -> list[Slot]:
    """The layers of an adapter in the model's order. Raises :class:`OptionError` for a layer that has no matrix to look up."""
    from peft.tuners.lora import LoraLayer

    return [
        _slot(module, name, adapter)
        for name, module in root.named_modules()
        if isinstance(module, LoraLayer) and (adapter in module.lora_A or adapter in module.lora_embedding_A)
    ]


def _slot(layer: Any, name: str, adapter: str) -> Slot:
    from peft.tuners.lora.layer import ParamWrapper

    base, module = layer.get_base_layer(), unwrapped(name)
    saved = wrappers.unwrapped(name)
    if isinstance(layer, ParamWrapper):
        return Slot(layer, adapter, saved, "experts", tuple(_parameter_targets(layer, module, adapter)))
    embedding = adapter in layer.lora_embedding_A
    weight = next((found for kind in ("weight", "qweight") if (found := getattr(base, kind, None)) is not None), None)
    if weight is None or isinstance(base, nn.MultiheadAttention) or not (embedding or _is_linear(layer, adapter)):
        raise OptionError(
            f"{module}: a {type(base).__name__} is not one matrix, so a bank holds no basis for it",
            hint=f"exclude_modules={[module]} leaves it out; an ordinary LoRA adapter of its own may have it",
        )
    target = Target(
        module=module,
        weight=weight,
        transposed=embedding or bool(getattr(layer, "fan_in_fan_out", False)),
        out_features=layer.out_features,
        in_features=layer.in_features,
        rank=layer.r[adapter],
        scale=layer.scaling[adapter],
    )
    return Slot(layer, adapter, saved, "embedding" if embedding else "linear", (target,))


def _is_linear(layer: Any, adapter: str) -> bool:
    return isinstance(layer.lora_A[adapter], nn.Linear) and isinstance(layer.lora_B[adapter], nn.Linear)


def _parameter_targets(layer: Any, module: str, adapter: str) -> Iterator[Target]:
    """One target an expert of a wrapped (E, …) parameter; one in all for a matrix."""
    parameter = layer.get_param()
    values = parameter.detach()
    experts = layer._param_ndim == 3
    # A slice of a sharded tensor would be gathered, and a partitioned one (ZeRO-3) has none; nobody reads those.
    sliced = experts and type(values) is Tensor and values.ndim == 3
    own = layer.parameter_name
    path = module if own == "weight" and not experts else f"{module}.{own}"
    name = f"{module.rpartition('.')[2]}.weight" if own == "weight" else own
    for expert in range(layer.num_experts):
        yield Target(
            module=path,
            weight=values[expert] if sliced else parameter,
            transposed=experts and bool(getattr(layer.get_base_layer(), "is_transposed", False)),
            out_features=layer.out_features,
            in_features=layer.in_features,
            rank=layer.r[adapter],
            scale=layer.scaling[adapter],
            expert=expert if experts else None,
            parameter=name,
        )


def unwrapped(name: str) -> str:
    """Module path without the wrappers of torch.compile, FSDP, checkpointed activations, and of an earlier PEFT adapter."""
    return ".".join(part for part in wrappers.unwrapped(name).split(".") if part != "base_layer")
