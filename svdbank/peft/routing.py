"""The places where PEFT and Transformers are rerouted while a bank is in use.

Scope of :func:`use_bank`: their classes are patched while at least one block is open in the process, but a patch acts only in
the thread (and asyncio task) that opened the block; elsewhere they behave as always. Blocks nest, the innermost bank counts, and
leaving the last one restores them, also after an exception.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from torch import nn

from svdbank.bank.reading import Bank
from svdbank.core.errors import BankError, OptionError, missing_extra
from svdbank.core.specs import ProgressCallback, ignore_progress
from svdbank.peft.automatic import AUTO, Automatic
from svdbank.peft.configuration import method_of
from svdbank.peft.injection import FactorSource, inject
from svdbank.peft.layers import slots, unwrapped
from svdbank.peft.loading import check_loaded
from svdbank.sharing.finding import opened


@contextlib.contextmanager
def use_bank(
    bank: Bank | str | Path, *, find: bool = True, rank: int | None = None, progress: ProgressCallback | None = None
) -> Iterator[Bank | None]:
    """Inside this block, PEFT's initialisation looks its values up in ``bank``: for trainers that call PEFT themselves.

    Covers ``get_peft_model``, ``add_adapter``, ``PeftModel.from_pretrained``, ``load_adapter``, ``add_weighted_adapter`` and
    Transformers' ``model.add_adapter`` and ``model.load_adapter`` (which otherwise leaves ``B`` training), for configs with
    ``init_lora_weights`` "mica", "milora" or "pissa". Others are not touched. See the module's text for threads. Yields the opened bank.
    ``find``: where a model has no bank in the cache, the error says which one on the Hub could be pulled, by one request.

    ``"auto"``, ``rank`` and ``progress`` as in :func:`svdbank.peft.get_peft_model`; it yields None, since there is no bank before a model.
    """
    if bank == AUTO:
        with reroute(FactorSource(Automatic(rank, progress or ignore_progress))):
            yield None
        return
    if rank is not None:
        raise OptionError(f"rank={rank} is for bank={AUTO!r}: a bank that is there has its rank", hint="leave rank out")
    found = opened(bank, find=find)
    with reroute(FactorSource(found)):
        yield found


_source: ContextVar[FactorSource | None] = ContextVar("svdbank_source", default=None)
_lock = threading.Lock()
_open_blocks = 0
_undo: list[Callable[[], None]] = []


@contextlib.contextmanager
def reroute(source: FactorSource) -> Iterator[None]:
    """Take values from ``source`` inside this block and this thread."""
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
    """Wrap the places where PEFT makes layers and decides their dtype, and those where Transformers forgets what PEFT knows."""
    try:
        from peft import PeftModel
        from peft.tuners.lora.layer import Embedding, LoraLayer, ParamWrapper
        from peft.tuners.lora.model import LoraModel
        from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
        from transformers.integrations.peft import PeftAdapterMixin
    except ImportError as cause:
        raise missing_extra("peft", "peft") from cause

    _wrap(LoraLayer, "mica_init", _mica_init)
    _wrap(Embedding, "mica_init", _mica_init)
    _wrap(BaseTuner, "inject_adapter", _inject_adapter)
    _wrap(BaseTuner, "_cast_adapter_dtype", _cast_adapter_dtype)
    for layer in (BaseTunerLayer, ParamWrapper):
        _wrap(layer, "_move_adapter_to_device_of_base_layer", _move_adapter)
    _wrap(LoraModel, "add_weighted_adapter", _add_weighted_adapter)
    _wrap(PeftModel, "load_adapter", _load_adapter)
    _wrap(PeftAdapterMixin, "add_adapter", _transformers_add_adapter)
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


def _mica_init(source: FactorSource, original: Callable[..., Any], layer: Any, adapter_name: str) -> None:
    raise BankError("a MiCA layer is being created outside a model, so its weight has no name to look up in the bank")


def _inject_adapter(
    source: FactorSource,
    original: Callable[..., Any],
    tuner: Any,
    model: Any,
    adapter_name: str,
    autocast_adapter_dtype: bool = True,
    low_cpu_mem_usage: bool = False,
    state_dict: Any = None,
) -> None:
    _same_parameters(tuner, model, adapter_name)
    if source.frozen:
        tuner.peft_config[adapter_name].init_lora_weights = "mica"
    if method_of(tuner.peft_config[adapter_name]) is None:
        original(tuner, model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
    else:
        inject(source, original, tuner, model, adapter_name, state_dict)


def _same_parameters(tuner: Any, model: nn.Module, adapter_name: str) -> None:
    """Give a config the spelling of ``target_parameters`` of an adapter that is there, where both mean the same: PEFT compares the text."""
    config = tuner.peft_config[adapter_name]
    others = (
        own for name, own in tuner.peft_config.items() if name != adapter_name and getattr(own, "target_parameters", None)
    )
    other, mine = next(others, None), getattr(config, "target_parameters", None)
    if other is None or not mine or set(mine) == set(other.target_parameters):
        return
    paths = {unwrapped(name) for name, _ in model.named_parameters()}
    if _meant(mine, paths) == _meant(other.target_parameters, paths):
        config.target_parameters = type(mine)(other.target_parameters)


def _meant(targets: Iterable[str], paths: Iterable[str]) -> set[str]:
    """PEFT's rule: a target is a path, or its end from a dot on."""
    ends = tuple(f".{target}" for target in targets)
    return {path for path in paths if f".{path}".endswith(ends)}


def _cast_adapter_dtype(
    source: FactorSource, original: Callable[..., Any], tuner: Any, adapter_name: str, autocast_adapter_dtype: bool = True
) -> None:
    """PEFT makes factors in the base's dtype and widens them; ours are made wide, so that no digit of the bank's is lost."""
    original(tuner, adapter_name, autocast_adapter_dtype)
    if not autocast_adapter_dtype and method_of(tuner.peft_config[adapter_name]) is not None:
        _narrow(tuner.model, adapter_name)


def _move_adapter(
    source: FactorSource, original: Callable[..., Any], layer: Any, adapter_name: str, *args: Any, **kwargs: Any
) -> None:
    """PEFT gives factors the base's dtype too, which takes digits from those just read, and makes new, trainable ones of an embedding's."""
    if adapter_name not in source.exact:
        original(layer, adapter_name, *args, **kwargs)
        return
    before = [(parameter.detach(), parameter.requires_grad) for parameter in _own(layer, adapter_name)]
    original(layer, adapter_name, *args, **kwargs)
    for moved, (values, trains) in zip(_own(layer, adapter_name), before, strict=True):
        moved.data = values.to(moved.device)
        moved.requires_grad_(trains)


def _own(layer: Any, adapter_name: str) -> list[nn.Parameter]:
    """The parameters of one adapter in a layer of PEFT's."""
    kept = [getattr(layer, name, None) for name in layer.adapter_layer_names]
    entries = [
        entry[adapter_name] for entry in kept if isinstance(entry, nn.ModuleDict | nn.ParameterDict) and adapter_name in entry
    ]
    return [
        parameter for entry in entries for parameter in ([entry] if isinstance(entry, nn.Parameter) else entry.parameters())
    ]


def _narrow(root: nn.Module, adapter_name: str) -> None:
    for slot in slots(root, adapter_name):
        slot.narrow()


def _add_weighted_adapter(source: FactorSource, original: Callable[..., Any], tuner: Any, *args: Any, **kwargs: Any) -> Any:
    """PEFT overwrites the combined adapter's factors straight away, so nothing needs to be looked up, at whatever rank."""
    token = _source.set(FactorSource(None, overwritten=True))
    try:
        return original(tuner, *args, **kwargs)
    finally:
        _source.reset(token)


def _load_adapter(source: FactorSource, original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """PEFT leaves out tensors whose names it does not find in the model, and keeps what it made where it finds no tensor."""
    result = original(model, *args, **kwargs)
    if source.folder:
        check_loaded(source.folder, result.missing_keys, result.unexpected_keys)
    return result


def _transformers_add_adapter(
    source: FactorSource, original: Callable[..., Any], model: Any, adapter_config: Any, adapter_name: str | None = None
) -> Any:
    with _as_it_was(model):
        result = original(model, adapter_config, adapter_name)
    if method_of(adapter_config) is not None:
        _narrow(model, adapter_name or "default")
    return result


def _transformers_load_adapter(
    source: FactorSource, original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any
) -> Any:
    """Transformers puts new parameters in place of PEFT's, and of an embedding beneath one, and those train; PEFT's layers still know
    which must not.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    with _as_it_was(model):
        result = original(model, *args, **kwargs)
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module._freeze_non_trainable_peft_weights()
            module.get_base_layer().requires_grad_(False)
    return result


@contextlib.contextmanager
def _as_it_was(model: Any) -> Iterator[None]:
    """Transformers notes an adapter on the model before it is made: take the notes back where making it failed."""
    kept = {name: model.__dict__[name] for name in ("_hf_peft_config_loaded", "peft_config") if name in model.__dict__}
    configs = dict(kept.get("peft_config", {}))
    try:
        yield
    except BaseException:
        for name in ("_hf_peft_config_loaded", "peft_config"):
            model.__dict__.pop(name, None)
        if "peft_config" in kept:
            kept["peft_config"].clear()
            kept["peft_config"].update(configs)
        model.__dict__.update(kept)
        raise
