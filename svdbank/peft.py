"""Where svdbank meets PEFT: the same ``LoraConfig(init_lora_weights="mica")``, with a lookup in place of the SVDs.

PEFT does everything as it always does — matching modules, replacing them, ranks, scales, freezing, saving. Only the step in which it
would decompose each weight is rerouted: modules that ask for a MiCA basis are noted, and when PEFT has replaced them all, their
bases are looked up together and copied in.

Scope of :func:`use_bank`: PEFT's classes are patched while at least one block is open in the process, but a patch acts only in
the thread (and asyncio task) that opened the block; elsewhere PEFT behaves as always. Blocks nest, the innermost bank counts, and
leaving the last one restores PEFT, also after an exception.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from svdbank.adapter.attachment import Attachment, Target, UnverifiedBaseWarning, look_up
from svdbank.adapter.folder import read_folder
from svdbank.bank.reading import Bank
from svdbank.errors import BankError, CheckpointError, OptionError, WrongBaseError, missing_extra
from svdbank.pipeline import locating

__all__ = ["Attachment", "UnverifiedBaseWarning", "attachment", "get_peft_model", "load_adapter", "use_bank"]

#: Where a model keeps what was attached to it: a dict of adapter name → Attachment on the base model.
_RECORD = "svdbank_attachments"


def get_peft_model(
    model: nn.Module, config: Any, *, bank: Bank | str | Path, adapter_name: str = "default", **options: Any
) -> Any:
    """``peft.get_peft_model`` with the bases from ``bank`` instead of one SVD a weight; returns PEFT's own ``PeftModel``.

    ``B`` (out, r) holds the bank's r most minor left vectors, cast to the weight's dtype as PEFT casts its own, and is frozen for
    good; ``A`` is zero. ``config`` is a ``LoraConfig`` with ``init_lora_weights="mica"`` in any capitalisation (PEFT's own code
    freezes ``B`` only for the lower-case spelling, so it is normalised). ``options`` go to PEFT.

    Raises :class:`WrongBaseError` when the model is not the bank's, :class:`BankError` for weights or ranks the bank lacks,
    :class:`OptionError` for a config that wants no MiCA. The model is then as it was before the call.
    """
    peft = _peft()
    if not _wants_mica(config):
        raise OptionError(
            f"init_lora_weights={getattr(config, 'init_lora_weights', None)!r} takes nothing from a bank",
            hint="LoraConfig(init_lora_weights='mica', …), or call peft.get_peft_model",
        )
    _normalise(config)
    with use_bank(bank):
        return peft.get_peft_model(model, config, adapter_name=adapter_name, **options)


@contextlib.contextmanager
def use_bank(bank: Bank | str | Path) -> Iterator[Bank]:
    """Inside this block, PEFT's MiCA initialisation looks its bases up in ``bank``: for trainers that call PEFT themselves.

    Covers ``get_peft_model``, ``add_adapter``, ``PeftModel.from_pretrained``, ``load_adapter``, ``add_weighted_adapter`` and
    Transformers' ``model.add_adapter`` and ``model.load_adapter`` (which otherwise leaves ``B`` training). Other initialisations
    are not touched. See the module's text for threads. Yields the opened bank.
    """
    opened = bank if isinstance(bank, Bank) else locating.open(bank)
    with _reroute(_Source(opened)):
        yield opened


def load_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    bank: Bank | str | Path | None = None,
    adapter_name: str = "default",
    is_trainable: bool = True,
    **options: Any,
) -> Any:
    """Load a saved adapter folder without any SVD and with ``B`` frozen; returns the ``PeftModel``.

    ``model`` is a base model, or a ``PeftModel`` that gets one more adapter. With a ``bank`` the base is recognised as in
    :func:`get_peft_model`, and an adapter that records another base digest is refused. ``options`` go to
    ``PeftModel.from_pretrained`` or ``PeftModel.load_adapter``.

    Raises :class:`CheckpointError` for a folder that is no adapter or lacks factors of targeted modules, and what
    :func:`get_peft_model` raises. A plain LoRA folder loads as in PEFT.
    """
    peft = _peft()
    saved = read_folder(folder)
    opened = None if bank is None else bank if isinstance(bank, Bank) else locating.open(bank)
    if opened is not None and saved.cache is not None:
        _check_digest(opened, saved.cache.base_digest, saved.cache.weights, folder)
    config = peft.LoraConfig.from_pretrained(str(folder))
    if _wants_mica(config):
        _normalise(config)
    added = _added_prefix(model, saved.factors)
    if added:
        options.setdefault("key_mapping", {"^": added})
    with _reroute(_Source(opened, expected=frozenset(added + module for module in saved.factors))):
        if isinstance(model, peft.PeftModel):
            # It reads the config by itself, with whatever spelling is on disk: inject_adapter normalises it.
            model.load_adapter(str(folder), adapter_name, is_trainable=is_trainable, **options)
            return model
        return peft.PeftModel.from_pretrained(
            model, str(folder), adapter_name=adapter_name, is_trainable=is_trainable, config=config, **options
        )


def attachment(model: nn.Module, adapter_name: str = "default") -> Attachment:
    """What attaching ``adapter_name`` found: the weights, whether each was verified, the time by step.

    Raises :class:`OptionError` where no bank was attached under that name.
    """
    found: dict[str, Attachment] = getattr(model, _RECORD, {})
    if adapter_name not in found:
        raise OptionError(f"no bank was attached under the adapter name {adapter_name!r}")
    return found[adapter_name]


# What is behind it


@dataclass
class _Source:
    """Where bases come from in one block. Without a bank, factors are left zero: saved ones will be loaded over them.

    ``expected`` are the modules that saved factors exist for, where it is known: another one would keep what it was given here.
    """

    bank: Bank | None
    expected: frozenset[str] | None = None


@dataclass
class _Injection:
    """One run of PEFT's ``inject_adapter``: the module path of every base layer, and the layers that asked for a basis."""

    paths: dict[int, str]
    waiting: list[Any] = field(default_factory=list)


_source: ContextVar[_Source | None] = ContextVar("svdbank_source", default=None)
_injection: ContextVar[_Injection | None] = ContextVar("svdbank_injection", default=None)
_lock = threading.Lock()
_open_blocks = 0
_undo: list[Callable[[], None]] = []


@contextlib.contextmanager
def _reroute(source: _Source) -> Iterator[None]:
    global _open_blocks
    with _lock:
        if _open_blocks == 0:
            _patch()
        _open_blocks += 1
    token = _source.set(source)
    try:
        yield
    finally:
        _source.reset(token)
        with _lock:
            _open_blocks -= 1
            if _open_blocks == 0:
                while _undo:
                    _undo.pop()()


def _patch() -> None:
    """Wrap the places where PEFT decides to decompose, and the one where Transformers forgets that B is frozen."""
    _peft()
    from peft.tuners.lora.layer import Embedding, LoraLayer
    from peft.tuners.lora.model import LoraModel
    from peft.tuners.tuners_utils import BaseTuner
    from transformers.integrations.peft import PeftAdapterMixin

    _wrap(LoraLayer, "mica_init", _mica_init)
    _wrap(Embedding, "mica_init", _mica_init)
    _wrap(BaseTuner, "inject_adapter", _inject_adapter)
    _wrap(LoraModel, "add_weighted_adapter", _add_weighted_adapter)
    _wrap(PeftAdapterMixin, "load_adapter", _transformers_load_adapter)


def _wrap(owner: type, name: str, ours: Callable[..., Any]) -> None:
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        source = _source.get()
        return original(self, *args, **kwargs) if source is None else ours(source, original, self, *args, **kwargs)

    def undo() -> None:
        # Somebody may have wrapped ours since; then it stays in their chain and, with no block open, passes everything through.
        if owner.__dict__.get(name) is wrapper:
            setattr(owner, name, original)

    setattr(owner, name, wrapper)
    _undo.append(undo)


def _mica_init(source: _Source, original: Callable[..., Any], layer: Any, adapter_name: str) -> None:
    injection = _injection.get()
    if injection is None:
        raise BankError("a MiCA layer is being created outside a model, so its weight has no name to look up in the bank")
    if not any(parameter.device.type == "meta" for parameter in _factors(layer, adapter_name)):
        injection.waiting.append(layer)


def _inject_adapter(
    source: _Source, original: Callable[..., Any], tuner: Any, model: Any, adapter_name: str, *a: Any, **k: Any
) -> None:
    config = tuner.peft_config[adapter_name]
    if not _wants_mica(config):
        original(tuner, model, adapter_name, *a, **k)
        return
    _normalise(config)
    root = tuner.model
    before = _Snapshot(root)
    injection = _Injection(before.paths)
    token = _injection.set(injection)
    begun = time.perf_counter()
    try:
        original(tuner, model, adapter_name, *a, **k)
        surgery = time.perf_counter() - begun
        _fill(source, root, adapter_name, injection, surgery)
    except BaseException:
        before.restore(adapter_name, injection.waiting)
        raise
    finally:
        _injection.reset(token)


def _add_weighted_adapter(source: _Source, original: Callable[..., Any], tuner: Any, *args: Any, **kwargs: Any) -> Any:
    """PEFT overwrites the combined adapter's factors straight away, so nothing needs to be looked up, at whatever rank."""
    token = _source.set(_Source(None))
    try:
        return original(tuner, *args, **kwargs)
    finally:
        _source.reset(token)


def _transformers_load_adapter(source: _Source, original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """Transformers puts new parameters in place of PEFT's, and those train; PEFT's layers still know which ones must not."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    result = original(model, *args, **kwargs)
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module._freeze_non_trainable_peft_weights()
    return result


def _fill(source: _Source, root: nn.Module, adapter_name: str, injection: _Injection, surgery: float) -> None:
    """Copy a basis into every waiting layer: B from the bank, A zero, B registered as frozen also where PEFT does not (4-bit)."""
    import torch
    from peft.tuners.lora.variants import _register_frozen_peft_weight

    layers = injection.waiting
    targets = [_target(layer, injection.paths[id(layer.get_base_layer())], adapter_name) for layer in layers]
    bare = [target.module for target in targets if source.expected is not None and target.module not in source.expected]
    if bare:
        raise CheckpointError(f"the adapter folder holds no factors for {len(bare)} modules that it targets, first {bare[0]}")
    found = None if source.bank is None else look_up(source.bank, targets, prefix=getattr(root, "base_model_prefix", ""))
    begun = time.perf_counter()
    with torch.no_grad():
        for i, layer in enumerate(layers):
            A, B = _materialised(layer, adapter_name)
            A.zero_()
            if found is None:
                B.zero_()
            else:
                B.copy_(found.left[i])
            _register_frozen_peft_weight(
                layer, adapter_name, "lora_embedding_B" if _is_embedding(layer, adapter_name) else "lora_B"
            )
    if found is None or source.bank is None:
        return
    seconds = {"surgery": surgery, **found.seconds, "copy": time.perf_counter() - begun}
    record = Attachment(adapter_name, str(source.bank.path), found.names, found.unverified, seconds)
    root.__dict__.setdefault(_RECORD, {})[adapter_name] = record
    if found.unverified:
        warnings.warn(
            f"{len(found.unverified)} of {len(found.names)} weights could not be read (meta device, quantised or sharded): only names "
            f"and shapes were compared with {source.bank.path}",
            UnverifiedBaseWarning,
            stacklevel=2,
        )


def _target(layer: Any, path: str, adapter_name: str) -> Target:
    return Target(
        module=path,
        weight=layer.get_base_layer().weight,
        transposed=_is_embedding(layer, adapter_name) or bool(getattr(layer, "fan_in_fan_out", False)),
        out_features=layer.out_features,
        in_features=layer.in_features,
        rank=layer.r[adapter_name],
    )


def _is_embedding(layer: Any, adapter_name: str) -> bool:
    return adapter_name in layer.lora_embedding_A


def _factors(layer: Any, adapter_name: str) -> tuple[nn.Parameter, nn.Parameter]:
    """A (r, in) and B (out, r) of a layer."""
    if _is_embedding(layer, adapter_name):
        return layer.lora_embedding_A[adapter_name], layer.lora_embedding_B[adapter_name]
    return layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight


def _materialised(layer: Any, adapter_name: str) -> tuple[nn.Parameter, nn.Parameter]:
    """A and B, on the CPU where PEFT sent them to the meta device after a base that is not loaded yet: a basis has to lie somewhere."""
    import torch

    factors = _factors(layer, adapter_name)
    if not any(factor.device.type == "meta" for factor in factors):
        return factors
    A, B = (nn.Parameter(torch.empty_like(f, device="cpu"), requires_grad=f.requires_grad) for f in factors)
    if _is_embedding(layer, adapter_name):
        layer.lora_embedding_A[adapter_name], layer.lora_embedding_B[adapter_name] = A, B
    else:
        layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight = A, B
    return A, B


class _Snapshot:
    """The module tree before an injection, so that a refused attach leaves the model as it was. References only, no copies."""

    def __init__(self, root: nn.Module) -> None:
        self.paths = {id(module): _plain(name) for name, module in root.named_modules()}
        self._children = [(module, dict(module._modules)) for module in root.modules()]
        self._grad = [(parameter, parameter.requires_grad) for parameter in root.parameters()]
        self._known = {id(module) for module, _ in self._children}

    def restore(self, adapter_name: str, layers: list[Any]) -> None:
        for layer in layers:
            if id(layer) in self._known:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    layer.delete_adapter(adapter_name)
        for module, children in self._children:
            module._modules.clear()
            module._modules.update(children)
        for parameter, grad in self._grad:
            parameter.requires_grad_(grad)


def _plain(name: str) -> str:
    """Module path without the wrappers of torch.compile and of an earlier PEFT adapter."""
    return ".".join(part for part in name.split(".") if part not in ("_orig_mod", "base_layer"))


def _wants_mica(config: Any) -> bool:
    value = getattr(config, "init_lora_weights", None)
    return isinstance(value, str) and value.lower() == "mica"


def _normalise(config: Any) -> None:
    """Spell the method as PEFT's freeze expects it, and refuse what MiCA cannot be combined with."""
    config.init_lora_weights = "mica"
    if getattr(config, "ensure_weight_tying", False):
        raise OptionError(
            "ensure_weight_tying cannot be combined with MiCA: a tied embedding and head need two different bases",
            hint="target the embedding and the head each by name, without ensure_weight_tying",
        )


def _added_prefix(model: nn.Module, saved: Iterable[str]) -> str:
    """``"bert."`` where the adapter of a bare ``BertModel`` meets a ``BertForMaskedLM``, else nothing."""
    wrapped: Any = model
    root: nn.Module = wrapped.get_base_model() if hasattr(model, "get_base_model") else model
    prefix = str(getattr(root, "base_model_prefix", "") or "")
    paths = {_plain(name) for name, _ in root.named_modules()}
    if prefix and not any(module in paths for module in saved) and all(f"{prefix}.{module}" in paths for module in saved):
        return f"{prefix}."
    return ""


def _check_digest(bank: Bank, digest: str, weights: tuple[str, ...], folder: str | Path) -> None:
    lacking = [name for name in weights if name not in bank]
    if lacking:
        raise BankError(f"{bank.path}: the bank lacks {len(lacking)} weights of the adapter {folder}, first {lacking[0]}")
    if bank.base_digest(weights) != digest:
        raise WrongBaseError(
            f"{folder}: this adapter was made on other weights than those of {bank.path}",
            hint="open the bank of the adapter's base",
        )


def _peft() -> Any:
    try:
        import peft
        import transformers  # noqa: F401 - PEFT's classes need it, and so do the patches
    except ImportError as cause:
        raise missing_extra("peft", "peft") from cause
    return peft
