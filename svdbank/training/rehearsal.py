"""Attaching without weights, before any of them is loaded."""

from __future__ import annotations

import re
import warnings
from typing import Any

import msgspec
import torch

from svdbank.adapter.experts import target_fields
from svdbank.adapter.methods import RESIDUAL_METHODS
from svdbank.adapter.reading import read_adapter
from svdbank.bank.reading import Bank
from svdbank.checkpoint.naming.targets import ALL_LINEAR, ALL_LINEAR_KINDS, parse_targets
from svdbank.core.errors import BankError, OptionError
from svdbank.lm.libraries import import_transformers, quiet_transformers
from svdbank.lm.loading import CausalModel
from svdbank.lm.packing import refuse_stateful
from svdbank.training.attaching import attach, has_experts, left_out, parameters_of
from svdbank.training.bands import free_band
from svdbank.training.options import TrainOptions


def rehearse(options: TrainOptions, causal: CausalModel, bank: Bank | None) -> None:
    """Attach to the model without its weights, so that a target that matches nothing or a rank too large is said at once."""
    transformers = import_transformers()
    if bank is not None:
        start, stop = free_band(options, bank)
        targets, small = parse_targets(options.targets), set(left_out(options, bank, causal.config.model_type))
        chosen = [
            name
            for name in bank.names
            if (targets.all_linear and bank[name].kind in ALL_LINEAR_KINDS) or targets.named(bank[name].module)
        ]
        short = [name for name in chosen if stop > bank[name].rank and name not in small]
        if options.on_top_of and short:
            basis = min((bank[name] for name in short), key=lambda basis: min(basis.out_features, basis.in_features))
            most = min(basis.out_features, basis.in_features)
            if stop <= most:
                hint = f"svdbank build {options.model} --rank {stop}, or a lower -r"
            elif start < most:
                hint = f"-r {most - start}"
            else:
                hint = "merge those beneath into one of a lower rank, svdbank merge … -r, or leave one out"
            raise BankError(
                f"{bank.place}: the next free band is {start}:{stop}, and the bank holds {basis.rank} directions of {basis.name}"
                + (f", which has no more than {most}" if stop > most else ""),
                hint=hint,
            )
    given = options
    if options.method in RESIDUAL_METHODS or options.on_top_of:
        # These need the values of weights. An ordinary LoRA has the same targets.
        options = msgspec.structs.replace(options, method="lora", on_top_of=())
    with quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.device("meta"):
            model = getattr(transformers, causal.automatic).from_config(causal.config)
        if options.packing:
            refuse_stateful(model, options.model)
        if bank is not None and given.on_top_of and has_experts(bank):
            _check_parameters(given, bank, model)
        if not has_experts(bank):
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
            if parse_targets(options.targets).all_linear:
                # The bank of a whole multimodal model, whose language part alone is loaded here.
                raise OptionError(
                    f"{options.model}: {type(model).__name__}, which is trained, has no module where the bank's weights are"
                ) from cause
            raise OptionError(
                f"{options.model}: {', '.join(map(repr, options.targets))} matches no module that can have an adapter",
                hint=f"--targets {ALL_LINEAR}",
            ) from cause


def _check_parameters(options: TrainOptions, bank: Bank, model: Any) -> None:
    """Raise :class:`OptionError` where an adapter beneath is on other experts or routers than the new one: PEFT has one set for all."""
    new = parameters_of(options, bank, model)
    for folder in options.on_top_of:
        kinds = {key: weight.kind for key, weight in read_adapter(folder).weights.items()}
        beneath = target_fields(kinds)["target_parameters"] or []
        if new and beneath and set(new) != set(beneath):
            other = sorted(set(new) ^ set(beneath))
            ends = dict.fromkeys(re.sub(r"^.*\.\d+\.|\.weight$", "", name) for name in beneath)
            raise OptionError(
                f"{folder}: PEFT lets several adapters act on experts and routers only where they are on the same ones, and "
                f"{other[0]} is in one of them alone",
                hint=" ".join(f"--targets {end}" for end in ends),
            )


def _check_targets(model: Any, options: TrainOptions) -> None:
    """Raise :class:`OptionError` for a target that matches no module: PEFT goes on where another one matches."""
    targets = parse_targets(options.targets)
    modules = [name for name, _ in model.named_modules()]
    silent = targets.silent(modules)
    if targets.pattern is not None and not any(map(targets.named, modules)):
        silent = list(options.targets)
    if silent:
        raise OptionError(
            f"{options.model}: {', '.join(map(repr, silent))} matches no module of this model", hint=f"--targets {ALL_LINEAR}"
        )
