"""How the trained adapter leaves a run: as a PEFT folder that fits the unchanged base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import safetensors.torch
from torch import Tensor

from svdbank.adapter.checksums import sealed, tensor_file
from svdbank.adapter.experts import join, parameters_of, split
from svdbank.adapter.folder import new_folder, read_folder
from svdbank.adapter.methods import RESIDUAL_METHODS, restored, restored_alpha
from svdbank.adapter.reading import adapter_of
from svdbank.adapter.settings import CACHE, CONFIG, TRAINING_CONFIG, TRAINING_FIGURES, WEIGHTS, AdapterCache, LoraSettings
from svdbank.adapter.writing import recorded
from svdbank.bank.reading import Bank
from svdbank.core import disk
from svdbank.core.errors import CheckpointError
from svdbank.core.specs import from_json, to_json
from svdbank.training.attaching import NAME, names_attached
from svdbank.training.card import card
from svdbank.training.options import TrainOptions, to_toml
from svdbank.training.report import TrainReport
from svdbank.training.run import Run


def initial_factors(model: Any, options: TrainOptions) -> dict[str, Tensor]:
    """A and B as a residual method begins with them, by the key they have in a saved adapter; empty for the others."""
    if options.method not in RESIDUAL_METHODS:
        return {}
    from peft import get_peft_model_state_dict

    return {key: value.detach().cpu().clone() for key, value in get_peft_model_state_dict(model).items()}


def write_output(run: Run, model: Any, initial: dict[str, Any], report: TrainReport) -> None:
    """The adapter's folder, whole or not at all; the checkpoints have done their work then."""
    options = msgspec.structs.replace(run.options, learning_rate=report.learning_rate)
    with new_folder(run.output, force=run.force) as folder:
        write_adapter(model, folder, options, run.bank, initial, card(options, report))
        disk.write_bytes(folder / TRAINING_CONFIG, to_toml(options))
        disk.write_bytes(folder / TRAINING_FIGURES, to_json(report, indent=2))
        disk.fsync_tree(folder)
    disk.remove_tree(run.folder)


def write_adapter(
    model: Any, folder: Path, options: TrainOptions, bank: Bank | None, initial: dict[str, Tensor], readme: str
) -> None:
    """Save the trained adapter into a new folder as PEFT does, made to fit the unchanged base, with svdbank's own record."""
    model.save_pretrained(str(folder), selected_adapters=[NAME])
    if initial:
        _restore(folder, initial)
    elif options.method == "mica":
        _for_peft(folder)
    if bank is not None:
        _seal(folder, _record(folder, options, bank, model))
    disk.write_bytes(folder / "README.md", readme.encode())
    # safetensors writes through a private temporary file; the others have the modes that the umask gives.
    disk.share_mode(folder / "README.md", folder / WEIGHTS)


def _seal(folder: Path, record: AdapterCache) -> None:
    """Write the record, with the sums of what stands beside it."""
    weights = tensor_file(safetensors.torch.load_file(folder / WEIGHTS))
    disk.write_bytes(folder / WEIGHTS, weights)
    settings = from_json((folder / CONFIG).read_bytes(), LoraSettings, where=str(folder / CONFIG), error=CheckpointError)
    disk.write_bytes(folder / CACHE, to_json(sealed(record, settings, {WEIGHTS: weights}), indent=2))


def _record(folder: Path, options: TrainOptions, bank: Bank, model: Any) -> AdapterCache:
    """What ``svdbank.json`` says: the base's weights as attaching recognised them, directions as they are found in the folder itself."""
    names = names_attached(model)
    adapter = adapter_of(read_folder(folder), bank=bank, known=names)
    return recorded(
        options.method if options.method == "mica" else "lora",
        bank.manifest.base.name,
        {key: (names[key], bank[names[key]].source_sha256) for key in adapter.weights},
        {Path(options.output).name: {key: adapter.bands(key) for key in adapter.weights}},
        rank=adapter.rank,
        bank_format=bank.manifest.format,
    )


def _for_peft(folder: Path) -> None:
    """PEFT has no MiCA for experts and routers, and loads a folder of such as an ordinary LoRA, the values being the same."""
    config = json.loads((folder / CONFIG).read_bytes())
    if config.get("target_parameters"):
        config |= {"init_lora_weights": True, "inference_mode": False}
        disk.write_bytes(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True).encode())


def _restore(folder: Path, initial: dict[str, Tensor]) -> None:
    """Make an adapter of the residual base ``W − s B₀A₀`` one of W, by rank 2r (see ``restored``)."""
    trained = safetensors.torch.load_file(folder / WEIGHTS)
    saved = read_folder(folder)
    stacked = {module: saved.rank(parameter) for module, parameter in parameters_of(saved.settings, saved.factors).items()}
    for key in [key for key in trained if "lora_A" in key or "lora_embedding_A" in key]:
        other = key.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B")
        A, B, A0, B0 = trained[key], trained[other], initial[key], initial[other]
        rank = stacked.get(key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
        if rank is None:
            trained[key], trained[other] = restored(A, B, A0, B0)
            continue
        experts = zip(split(A, B, rank, key), split(A0, B0, rank, key), strict=True)
        trained[key], trained[other] = join([restored(*own, *start) for own, start in experts])
    config = json.loads((folder / CONFIG).read_bytes())
    config |= {
        "r": 2 * config["r"],
        "lora_alpha": restored_alpha(config["lora_alpha"], rslora=config["use_rslora"]),
        "init_lora_weights": True,
    }
    disk.write_bytes(folder / WEIGHTS, safetensors.torch.save(trained, metadata={"format": "pt"}))
    disk.write_bytes(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True).encode())
