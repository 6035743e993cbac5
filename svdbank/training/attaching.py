"""How a run gets its adapter, and how the adapter leaves it: attach, rehearse without weights, write a PEFT folder."""

from __future__ import annotations

import functools
import json
import warnings
from pathlib import Path
from typing import Any

import msgspec
import safetensors.torch
import torch
from torch import Tensor

from svdbank.adapter.components import Band
from svdbank.adapter.experts import join, parameters_of, split
from svdbank.adapter.folder import read_folder
from svdbank.adapter.methods import RESIDUAL_METHODS, restored, restored_alpha
from svdbank.adapter.naming import bank_names
from svdbank.adapter.reading import read_adapter
from svdbank.adapter.settings import CACHE, CONFIG, WEIGHTS, AdapterCache
from svdbank.adapter.writing import recorded
from svdbank.bank.reading import Bank
from svdbank.checkpoint.naming.targets import ALL_LINEAR, parse_targets
from svdbank.core import disk
from svdbank.core.errors import BankError, OptionError
from svdbank.core.specs import to_json
from svdbank.initialisation.selection import selected
from svdbank.lm.libraries import import_peft, import_transformers, quiet_transformers
from svdbank.lm.loading import CausalModel
from svdbank.training.options import TrainOptions

#: The trained adapter's name in PEFT. Those beneath are called ``beneath-0``, ``beneath-1``, …
NAME = "default"


def attach(model: Any, options: TrainOptions, bank: Bank | None) -> Any:
    """The model as a ``PeftModel``: the new adapter trainable, those of ``on_top_of`` frozen and acting. Raises what the bank raises."""
    peft = import_peft()
    from svdbank.peft import get_peft_model, load_adapter
    from svdbank.peft.quantised import keep_gradients

    torch.manual_seed(options.seed)
    if options.method == "lora":
        wrapped = peft.get_peft_model(model, _config(options, bank))
        keep_gradients(model)
    else:
        assert bank is not None
        wrapped = get_peft_model(model, _config(options, bank), bank=bank)
        band = free_band(options, bank)
        if band[0]:
            _move_to_band(wrapped, bank, band)
    beneath = []
    for i, folder in enumerate(options.on_top_of):
        beneath.append(f"beneath-{i}")
        load_adapter(wrapped, folder, bank=bank, adapter_name=beneath[-1], is_trainable=False)
    if beneath:
        activate(wrapped)
        # A checkpoint holds what changes: the adapters beneath are where they came from.
        wrapped.save_pretrained = functools.partial(wrapped.save_pretrained, selected_adapters=[NAME])
    return wrapped


def activate(model: Any) -> None:
    """Let every adapter act and only the new one train: PEFT makes trainable whatever it activates."""
    if len(model.peft_config) == 1:
        return
    model.base_model.set_adapter([NAME, *(name for name in model.peft_config if name != NAME)])
    for name, parameter in model.named_parameters():
        if ".beneath-" in name:
            parameter.requires_grad_(False)


def rehearse(options: TrainOptions, source: CausalModel, bank: Bank | None) -> None:
    """Attach to the model without its weights, so that a target that matches nothing or a rank too large is said at once."""
    transformers = import_transformers()
    if bank is not None:
        start, stop = free_band(options, bank)
        short = [name for name in bank.names if bank[name].kind == "linear" and stop > bank[name].rank]
        if options.on_top_of and short:
            raise BankError(
                f"{bank.path}: the next free band is {start}:{stop}, and the bank holds {bank[short[0]].rank} directions of "
                f"{short[0]}",
                hint=f"svdbank build {options.model} --rank {stop}, or a lower -r",
            )
    if options.method in RESIDUAL_METHODS or options.on_top_of:
        # These need the values of weights. An ordinary LoRA has the same targets.
        options = msgspec.structs.replace(options, method="lora", on_top_of=())
    with quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(source.config)
        if not _has_experts(bank):
            _check_targets(model, options)
        try:
            attach(model, options, bank)
        except ValueError as cause:
            if "lora_dropout" in str(cause):
                raise OptionError(
                    f"{options.model}: dropout {options.dropout:g} cannot act on experts that are fused into one parameter",
                    hint="--dropout 0, or --targets for other modules",
                ) from cause
            if isinstance(cause, OptionError) or "arget module" not in str(cause):
                raise
            raise OptionError(
                f"{options.model}: {', '.join(map(repr, options.targets))} matches no module that can have an adapter",
                hint=f"--targets {ALL_LINEAR}",
            ) from cause


def _check_targets(model: Any, options: TrainOptions) -> None:
    """Raise :class:`OptionError` for a target that matches no module: PEFT goes on where another one matches."""
    targets = parse_targets(options.targets)
    modules = [name for name, _ in model.named_modules()]
    silent = [name for name in targets.names if not any(m == name or m.endswith("." + name) for m in modules)]
    if targets.pattern is not None and not any(map(targets.named, modules)):
        silent = list(options.targets)
    if silent:
        raise OptionError(
            f"{options.model}: {', '.join(map(repr, silent))} matches no module of this model", hint=f"--targets {ALL_LINEAR}"
        )


def free_band(options: TrainOptions, bank: Bank) -> Band:
    """The ``rank`` directions of the bank next to those that the adapters beneath stand on; ``[0, rank)`` where there are none.

    An adapter that does not stand on the bank's directions (an ordinary LoRA) takes none. Raises :class:`OptionError` where two of those
    beneath stand on the same directions, :class:`WrongBaseError` for an adapter of another base.
    """
    taken: list[tuple[Band, str]] = []
    for folder in options.on_top_of:
        adapter = read_adapter(folder, bank=bank)
        bands = [band for key in adapter.weights for band in adapter.bands(key)]
        if not bands:
            continue
        start, stop = min(band[0] for band in bands), max(band[1] for band in bands)
        for (other_start, other_stop), other in taken:
            if start < other_stop and other_start < stop:
                raise OptionError(
                    f"{folder} and {other} stand on the same directions of the bank, {max(start, other_start)}:{min(stop, other_stop)}",
                    hint="train the second on top of the first, or merge them",
                )
        taken.append(((start, stop), folder))
    first = max((stop for (_, stop), _ in taken), default=0)
    return first, first + options.rank


def initial_factors(model: Any, options: TrainOptions) -> dict[str, Tensor]:
    """A and B as a residual method begins with them, by the key they have in a saved adapter; empty for the others."""
    if options.method not in RESIDUAL_METHODS:
        return {}
    from peft import get_peft_model_state_dict

    return {key: value.detach().cpu().clone() for key, value in get_peft_model_state_dict(model).items()}


def write_adapter(
    model: Any, folder: Path, options: TrainOptions, bank: Bank | None, initial: dict[str, Tensor], card: str
) -> None:
    """Save the trained adapter into a new folder as PEFT does, made to fit the unchanged base, with svdbank's own record."""
    model.save_pretrained(str(folder), selected_adapters=[NAME])
    if initial:
        _restore(folder, initial)
    if bank is not None:
        disk.write_bytes(folder / CACHE, to_json(_record(folder, options, bank), indent=2))
    disk.write_bytes(folder / "README.md", card.encode())
    # safetensors writes through a private temporary file; the others have the modes that the umask gives.
    disk.share_mode(folder / "README.md", folder / WEIGHTS)


def _record(folder: Path, options: TrainOptions, bank: Bank) -> AdapterCache:
    """What ``svdbank.json`` says: the base's weights and the directions of the bank, as they are found in the folder itself."""
    adapter = read_adapter(folder, bank=bank)
    names = bank_names(bank, list(adapter.weights))
    return recorded(
        options.method if options.method == "mica" else "lora",
        bank.manifest.base.name,
        {key: (names[key], bank[names[key]].source_sha256) for key in adapter.weights},
        {Path(options.output).name: {key: adapter.bands(key) for key in adapter.weights}},
        rank=adapter.rank,
        bank_format=bank.manifest.format,
    )


def trainable_parameters(model: Any) -> int:
    """How many numbers training changes."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _has_experts(bank: Bank | None) -> bool:
    return bank is not None and any(bank[name].stacked for name in bank.names)


def _config(options: TrainOptions, bank: Bank | None) -> Any:
    if bank is not None and _has_experts(bank):
        # PEFT would adapt routers too, and takes fused experts as parameters, by their path.
        names = selected(bank, options.targets, (), ())
        targets: dict[str, Any] = {
            "target_modules": [bank[name].module for name in names if not bank[name].stacked],
            "target_parameters": sorted({bank[name].module for name in names if bank[name].stacked}) or None,
        }
    else:
        targets = {"target_modules": _target_modules(options.targets)}
    return import_peft().LoraConfig(
        r=options.rank,
        lora_alpha=options.rank if options.alpha is None else options.alpha,
        lora_dropout=options.dropout,
        use_rslora=options.rslora,
        init_lora_weights=True if options.method == "lora" else options.method,
        task_type="CAUSAL_LM",
        **targets,
    )


def _target_modules(targets: tuple[str, ...]) -> str | list[str]:
    """Targets as PEFT takes them: it reads any string but ``all-linear`` as a regular expression, so names are a list."""
    parsed = parse_targets(targets)
    if parsed.pattern is not None:
        return targets[0]
    if parsed.all_linear and parsed.names:
        raise OptionError(
            f"{ALL_LINEAR!r} stands beside other targets; PEFT takes either that or names",
            hint=f"--targets {ALL_LINEAR} alone, or a --targets for each module",
        )
    return ALL_LINEAR if parsed.all_linear else list(parsed.names)


def _move_to_band(model: Any, bank: Bank, band: Band) -> None:
    """Put the bank's directions of ``band`` into every B, which holds the most minor ones."""
    from svdbank.peft import attachment

    start, stop = band
    names = attachment(model, NAME).weights
    left = bank.left(names, stop)
    modules = dict(model.get_base_model().named_modules())
    with torch.no_grad():
        for name in names:
            layer = modules.get(bank[name].module)
            if layer is None or NAME not in getattr(layer, "lora_B", {}):
                raise OptionError(
                    f"{name}: only linear layers can be trained on top of another adapter", hint="--targets all-linear"
                )
            B = layer.lora_B[NAME].weight
            B.copy_(left[name][:, : stop - start])  # PEFT's order: the last column is the most minor one


def _restore(folder: Path, initial: dict[str, Tensor]) -> None:
    """Make an adapter of the residual base ``W − s B₀A₀`` one of W, by rank 2r (see ``restored``)."""
    trained = safetensors.torch.load_file(folder / WEIGHTS)
    saved = read_folder(folder)
    stacked = {module: saved.rank(parameter) for module, parameter in parameters_of(saved).items()}
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
