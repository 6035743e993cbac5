"""One run of PEFT's ``inject_adapter``: empty layers from PEFT, then their factors from the bank, or the model as it was."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from svdbank.adapter.folder import Factors
from svdbank.adapter.methods import RESIDUAL_METHODS, InitialisationMethod
from svdbank.bank.reading import Bank
from svdbank.checkpoint.naming.tree import multiplies
from svdbank.core.errors import CheckpointError, OptionError, WrongBaseError, abridge
from svdbank.core.probe import lies_in
from svdbank.peft import quantised, residuals, sharding
from svdbank.peft.automatic import Automatic
from svdbank.peft.configuration import method_of, normalise
from svdbank.peft.layers import Slot, slots
from svdbank.peft.lookup import Attachment, Lookup, UnverifiedBaseWarning, look_up
from svdbank.peft.snapshot import RECORD, ModelState


@dataclass(frozen=True)
class FactorSource:
    """Where factors come from in one block. Without a bank they are left zero: saved ones will be loaded over them.

    An ``Automatic`` bank is found or made when the layers of an adapter are known.
    ``saved`` are the factors of ``folder`` by layer, where one is being loaded: a targeted layer that is not among them would keep
    what it is given here. ``overwritten`` says that PEFT will put its own values in, whatever the method; ``frozen`` that it is MiCA
    whatever the folder's config says. ``exact`` names the adapters whose factors keep the digits they are given, on a narrower base too.
    """

    bank: Bank | Automatic | None
    saved: Mapping[str, Factors] | None = None
    folder: str = ""
    overwritten: bool = False
    frozen: bool = False
    exact: set[str] = field(default_factory=set)


def attachments(model: nn.Module) -> dict[str, Attachment]:
    """What was attached to a model, by adapter name."""
    found: dict[str, Attachment] = getattr(model, RECORD, {})
    return found


def inject(
    source: FactorSource, original: Callable[..., Any], tuner: Any, model: Any, adapter_name: str, state_dict: Any
) -> None:
    """PEFT's ``inject_adapter``, with factors from ``source``. On any error the model is as it was."""
    config = tuner.peft_config[adapter_name]
    method = method_of(config)
    assert method is not None  # the caller's condition
    normalise(config)
    root: nn.Module = tuner.model
    before = ModelState(root)
    source.exact.add(adapter_name)
    if not source.overwritten:
        _check_company(root, adapter_name, method)
    if not config.inference_mode:
        quantised.check_gradients(root)
    begun = time.perf_counter()
    try:
        # PEFT's own initialisation is switched off, and its layers are made on the meta device: nothing is drawn at random,
        # decomposed, gathered (ZeRO-3) or dequantised.
        config.init_lora_weights = False
        try:
            original(tuner, model, adapter_name, low_cpu_mem_usage=True, state_dict=state_dict)
        finally:
            config.init_lora_weights = method
        layers = slots(root, adapter_name)
        _check_layers(layers)
        _fill(source, root, adapter_name, method, layers, time.perf_counter() - begun)
    except BaseException:
        before.restore(adapter_name)
        raise
    if not config.inference_mode:
        quantised.keep_gradients(root)


def check_reload(source: FactorSource, root: nn.Module, adapter_name: str) -> None:
    """The checks of :func:`inject` for a MiCA folder that will be loaded over an adapter which is already there."""
    layers = slots(root, adapter_name)
    _check_saved(source, layers)
    if isinstance(source.bank, Bank):
        targets = [target for layer in layers for target in layer.targets]
        found = look_up(source.bank, targets, prefix=getattr(root, "base_model_prefix", ""))
        _check_saved_bases(source, source.bank, layers, found)


def _check_layers(layers: Sequence[Slot]) -> None:
    """PEFT puts a layer around every module of a linear class, and its ``forward`` fails where the module does more than multiply."""
    other = [
        layer.targets[0].module for layer in layers if layer.kind == "linear" and not multiplies(layer.layer.get_base_layer())
    ]
    if other:
        names = sorted({module.rpartition(".")[2] for module in other})
        raise OptionError(
            f"PEFT has no layer for {abridge(other)}: the module does something else with its weight than multiply",
            hint=f"exclude_modules={names} leaves them out, target_parameters={[f'{name}.weight' for name in names]} adapts them",
        )


def _check_company(root: nn.Module, adapter_name: str, method: InitialisationMethod) -> None:
    """The base is one for all adapters of a model, so a method that changes it cannot share it."""
    from peft.tuners.lora import LoraLayer

    changed = {name: found.method for name, found in attachments(root).items() if found.method in RESIDUAL_METHODS}
    if changed:
        name, other = next(iter(changed.items()))
        raise OptionError(
            f"this base lacks what {other} moved into the adapter {name!r}, so {adapter_name!r} cannot be looked up for it",
            hint="attach to a freshly loaded base; svdbank export --to lora makes a trained adapter one for the unchanged base",
        )
    if method in RESIDUAL_METHODS:
        others = sorted({name for m in root.modules() if isinstance(m, LoraLayer) for name in m._get_available_adapters()})
        if others:
            raise OptionError(
                f"{method} changes the base's weights, under the adapters that are already there: {', '.join(others)}",
                hint="attach it alone, to a freshly loaded base",
            )


def _fill(
    source: FactorSource, root: nn.Module, adapter_name: str, method: InitialisationMethod, layers: list[Slot], surgery: float
) -> None:
    """Check everything, then put factors into every layer; B of MiCA is registered as frozen also where PEFT does not (4-bit, experts)."""
    targets = [target for layer in layers for target in layer.targets]
    _check_saved(source, layers)
    groups = sharding.plan(root, layers)
    found: Lookup | None = None
    bank: Bank | None = None
    decomposed, spent = 0, dict[str, float]()
    if source.bank is not None and not source.overwritten:
        if method in RESIDUAL_METHODS:
            residuals.check(root, layers, method)
        if isinstance(source.bank, Automatic):
            begun = time.perf_counter()
            made = source.bank.bank(root, layers, method)
            bank, decomposed, spent = made.bank, made.solved, {"find or decompose": time.perf_counter() - begun}
        else:
            bank = source.bank
        found = look_up(bank, targets, method=method, prefix=getattr(root, "base_model_prefix", ""))
        if method == "mica":
            _check_saved_bases(source, bank, layers, found)
    begun = time.perf_counter()
    assembled = _assembled(layers, found)
    rounding = 0.0
    with torch.no_grad():
        for layer, (A, B) in zip(layers, assembled, strict=True):
            layer.put(A, B)
            if method == "mica":
                _freeze(layer)
        sharding.apply(groups, layers, assembled)
        if found is not None and method in RESIDUAL_METHODS:
            rounding = residuals.subtract(targets, found.factors)
    if found is None or bank is None:
        return
    seconds = {"surgery": surgery, **spent, **found.seconds, "copy": time.perf_counter() - begun}
    record = Attachment(
        adapter_name, bank.place, found.names, found.unverified, seconds, method, rounding, found.floored, decomposed
    )
    root.__dict__.setdefault(RECORD, {})[adapter_name] = record
    if found.unverified:
        warnings.warn(
            f"{len(found.unverified)} of {len(found.names)} weights could not be read (meta device, quantised or sharded): only names "
            f"and shapes were compared with {bank.place}",
            UnverifiedBaseWarning,
            stacklevel=2,
        )


def _assembled(layers: Sequence[Slot], found: Lookup | None) -> list[tuple[Tensor, Tensor]]:
    """A and B of every layer; zeros where nothing was looked up."""
    if found is None:
        shapes = [tuple(factor.shape for factor in layer.factors) for layer in layers]
        return [(torch.zeros(A), torch.zeros(B)) for A, B in shapes]
    result, begin = [], 0
    for layer in layers:
        end = begin + len(layer.targets)
        result.append(layer.assemble(found.factors[begin:end]))
        begin = end
    return result


def _freeze(slot: Slot) -> None:
    from peft.tuners.lora.variants import _register_frozen_peft_weight

    layer, adapter = slot.layer, slot.adapter
    variant = layer.lora_variants.get(("mica",))
    if variant is not None:
        layer.lora_variant[adapter] = variant()
    _register_frozen_peft_weight(layer, adapter, slot.frozen_name)
    slot.factors[1].requires_grad_(False)


def _check_saved(source: FactorSource, layers: Sequence[Slot]) -> None:
    if source.saved is None:
        return
    bare = [layer.saved for layer in layers if layer.saved not in source.saved]
    if bare:
        raise CheckpointError(f"the adapter folder holds no factors for {len(bare)} modules that it targets, first {bare[0]}")


def _check_saved_bases(source: FactorSource, bank: Bank, layers: Sequence[Slot], found: Lookup) -> None:
    """A folder's B must be bank directions: the very ones, or an orthonormal mix of a band of them (another machine's bank)."""
    if source.saved is None:
        return
    strangers: list[str] = []
    position = 0
    for layer in layers:
        for B in layer.parts(source.saved[layer.saved].B):
            name, own = found.names[position], found.factors[position][1]
            position += 1
            if not lies_in(B, own) and not lies_in(B, bank.left([name], bank[name].rank)[name]):
                strangers.append(name)
    if strangers:
        raise WrongBaseError(
            f"{source.folder}: B of {len(strangers)} of {position} weights is not of {bank.place}, first {strangers[0]}",
            hint="open the bank that the adapter was made with, or leave bank= out to load it unchecked",
        )
