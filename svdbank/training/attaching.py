"""How a run gets its adapter: through PEFT, from the bank, on top of those that lie frozen beneath."""

from __future__ import annotations

import functools
from typing import Any

import torch

from svdbank.adapter.components import Band
from svdbank.adapter.experts import target_fields
from svdbank.bank.reading import Bank
from svdbank.checkpoint.naming.targets import ALL_LINEAR, parse_targets
from svdbank.core.errors import OptionError
from svdbank.initialisation.configuration import kinds_of
from svdbank.initialisation.selection import Adaptable, adaptable, selected
from svdbank.lm.libraries import import_peft
from svdbank.training.bands import free_band
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
        wrapped = peft.get_peft_model(model, _config(options, bank, model))
        keep_gradients(model)
    else:
        assert bank is not None
        wrapped = get_peft_model(model, _config(options, bank, model), bank=bank)
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


def names_attached(model: Any) -> dict[str, str]:
    """Name in the bank of each weight of the new adapter, by its key in a saved folder."""
    from svdbank.peft import attachment
    from svdbank.peft.layers import slots

    targets = [target for slot in slots(model.get_base_model(), NAME) for target in slot.targets]
    keys = [target.module if target.expert is None else f"{target.module}.{target.expert}" for target in targets]
    return dict(zip(keys, attachment(model, NAME).weights, strict=True))


def trainable_parameters(model: Any) -> int:
    """How many numbers training changes."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def has_experts(bank: Bank | None) -> bool:
    return bank is not None and any(bank[name].stacked for name in bank.names)


def left_out(options: TrainOptions, bank: Bank | None, model_type: str) -> tuple[str, ...]:
    """Names in the bank of weights that ``all-linear`` selects and that cannot be adapted, mostly for want of directions."""
    return () if bank is None else _adaptable(options, bank, model_type).left_out


def parameters_of(options: TrainOptions, bank: Bank, model: Any) -> list[str]:
    """The experts and routers, as PEFT names parameters of the model, that the new adapter is on."""
    return _targets(options, bank, model)["target_parameters"] or []


def _targets(options: TrainOptions, bank: Bank, model: Any) -> dict[str, Any]:
    from svdbank.peft.parts import keys_in

    names = _adaptable(options, bank, model.config.model_type).names
    keys, kinds = keys_in(model, bank, names), kinds_of(bank, names, dropout=options.dropout)
    return target_fields({key: kinds[name] for name, key in keys.items()})


def _adaptable(options: TrainOptions, bank: Bank, model_type: str) -> Adaptable:
    stop, all_linear = free_band(options, bank)[1], parse_targets(options.targets).all_linear
    if not has_experts(bank):
        _target_modules(options.targets)  # refuses what PEFT cannot be given
        if not all_linear:  # names that no bank knows are PEFT's to judge
            return Adaptable(())
    names = selected(bank, options.targets, (), ())
    return adaptable(bank, names, options.targets, model_type, stops=dict.fromkeys(names, stop))


def _config(options: TrainOptions, bank: Bank | None, model: Any) -> Any:
    model_type = model.config.model_type
    if bank is None:
        targets: dict[str, Any] = {"target_modules": _target_modules(options.targets)}
    elif has_experts(bank):
        # PEFT takes fused experts and routers as parameters, by their path.
        targets = _targets(options, bank, model)
    else:
        out = [bank[name].module for name in left_out(options, bank, model_type)]
        targets = {"target_modules": _target_modules(options.targets), "exclude_modules": out or None}
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
    from svdbank.peft.layers import slots

    names = iter(attachment(model, NAME).weights)
    layers = [(slot, [next(names) for _ in slot.targets]) for slot in slots(model.get_base_model(), NAME)]
    left = bank.left([name for _, own in layers for name in own], band[1])
    with torch.no_grad():
        for slot, own in layers:
            for B, name in zip(slot.parts(slot.factors[1]), own, strict=True):
                B.copy_(left[name][:, : B.shape[1]])  # PEFT's order: the last column is the most minor one
