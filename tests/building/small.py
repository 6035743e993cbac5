"""Small checkpoints cut from trained weights: fast enough to be built hundreds of times."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file


def write_small_checkpoint(folder: Path, minilm: Path, *, layers: int = 2, out: int = 24, width: int = 40) -> Path:
    """A checkpoint with one ``out`` x ``width`` query weight a layer, cut from MiniLM's."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    with safe_open(minilm / "model.safetensors", framework="pt") as source:
        for layer in range(layers):
            name = f"encoder.layer.{layer}.attention.self.query.weight"
            tensors[name] = (
                source.get_tensor(f"encoder.layer.{layer % 6}.attention.self.query.weight")[:out, :width].clone().contiguous()
            )
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    return folder


def write_made_checkpoint(folder: Path, spectra: list[list[float]], *, out: int = 24, width: int = 40) -> Path:
    """A float64 checkpoint with one ``out`` x ``width`` query weight a layer, of the singular values given; the rest of them are 0."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = torch.Generator().manual_seed(0)
    tensors = {}
    for layer, sigma in enumerate(spectra):
        count = len(sigma)
        left, right = (torch.linalg.qr(torch.randn(n, count, generator=drawn, dtype=torch.float64))[0] for n in (out, width))
        weight = (left * torch.tensor(sigma, dtype=torch.float64)) @ right.mT
        tensors[f"encoder.layer.{layer}.attention.self.query.weight"] = weight.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    """Every file that a bank promises to repeat: all but the log and the lock."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".lock") and path.name != "build.log.jsonl"
    }
