"""``components.safetensors``: the components of each weight, kept beside their sum, which PEFT ignores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import safetensors
import safetensors.torch
from torch import Tensor

from svdbank.adapter.claims import FLOAT32_ORTHONORMAL
from svdbank.adapter.components import Band, Component, Free, InBank, combined, indices_of, inner, off_orthonormal
from svdbank.adapter.folder import AdapterFolder
from svdbank.adapter.model import Adapter
from svdbank.adapter.settings import COMPONENTS
from svdbank.core.errors import OptionError

#: ‖A_file − Σ C‖ / ‖A_file‖ up to which the parts beside a sum are its parts: both are float32 roundings of the same sum.
_SAME = 1e-6


def parts_of(adapter: Adapter) -> dict[str, Tensor]:
    """Each component's own factors; the directions only where the sum beside them does not hold them as columns."""
    tensors: dict[str, Tensor] = {}
    for key, weight in adapter.weights.items():
        total = weight.total()
        columns = isinstance(total, InBank) and total.max_rank == len(total.indices)
        for name, component in weight.components.items():
            A, B = component.factors
            tensors[f"{name}/{key}/A"] = A.contiguous()
            if not columns:
                tensors[f"{name}/{key}/B"] = B.contiguous()
    return tensors


def with_parts(
    folder: AdapterFolder, found: Mapping[str, Component], name: str
) -> tuple[dict[str, dict[str, Component]], list[str]]:
    """Named components of each weight: those beside the sum if they add up to it, else the sum itself under ``name``."""
    cache = folder.cache
    own = next(iter(cache.components)) if cache is not None and len(cache.components) == 1 else name
    whole = {key: {own: component} for key, component in found.items()}
    if cache is None or len(cache.components) < 2:
        return whole, []
    try:
        tensors = safetensors.torch.load_file(folder.path / COMPONENTS)
        parts = {key: _parts(cache.components, tensors, key, found[key]) for key in found}
    except (KeyError, OptionError, OSError, safetensors.SafetensorError) as cause:
        return whole, [f"{folder.path.name}: {COMPONENTS} cannot be used ({cause}); the adapter is read as one component"]
    wrong = [key for key in parts if not parts[key] or not _adds_up(parts[key], found[key])]
    if wrong:
        return whole, [
            f"{folder.path.name}: the components beside the tensors do not add up to them in {len(wrong)} weights, first {wrong[0]}; "
            "the tensors are believed and read as one component"
        ]
    return parts, []


def _parts(
    recorded: Mapping[str, Mapping[str, Sequence[Band]]], tensors: Mapping[str, Tensor], key: str, total: Component
) -> dict[str, Component]:
    """The components of one weight: coefficients from the file beside the sum, directions from there or from the sum itself."""
    parts: dict[str, Component] = {}
    for name, weights in recorded.items():
        if key not in weights:
            continue
        bands, A, B = tuple(weights[key]), tensors[f"{name}/{key}/A"], tensors.get(f"{name}/{key}/B")
        if B is not None:
            parts[name] = InBank(bands, A, B, off_orthonormal(B) < FLOAT32_ORTHONORMAL) if bands else Free(A, B)
        elif isinstance(total, InBank):
            place = {index: row for row, index in enumerate(total.indices)}
            columns = [place[index] for index in indices_of(bands)]
            parts[name] = InBank(bands, A, total.left[:, columns], total.orthonormal)
        else:
            raise KeyError(f"no directions for {key}")
    return parts


def _adds_up(parts: Mapping[str, Component], total: Component) -> bool:
    if any(part.factors[0].shape[1] != total.factors[0].shape[1] for part in parts.values()):
        return False
    difference = combined([*((1.0, part) for part in parts.values()), (-1.0, total)])
    size = max(inner(component, component) for component in (total, *parts.values()))
    return inner(difference, difference) <= _SAME**2 * size
