"""Adapter folders on a loaded model, and which of them act."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from svdbank.core.errors import OptionError

#: Where a base model keeps what loading its adapters did to its own weights.
_CHANGED = "svdbank_changed"


def with_adapters(model: Any, stacks: Mapping[str, Sequence[str]]) -> Any:
    """The model with every folder loaded once, frozen, under its path as PEFT's name.

    Some change the base's own weights when they are loaded (OLoRA, KaSA, trained biases, rows that somebody set): :func:`acting` gives
    the base the values it has with those that act. Raises :class:`OptionError` for an adapter of replicated layers, whose base is another
    model, and for adapters that PEFT does not let act together as their sum.
    """
    import torch

    if torch.cuda.is_available() and not getattr(model, "hf_device_map", None):
        model = model.to("cuda")
    changed: dict[str, dict[Any, tuple[Any, Any]]] = {}
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if stacks:
        from svdbank.adapter.documents import UNCHANGED_BASE, read_documents
        from svdbank.adapter.folder import read_folder
        from svdbank.peft import load_adapter

        folders = list(dict.fromkeys(folder for stack in stacks.values() for folder in stack))
        for folder in folders:
            if "(layer_replication)" in (read_documents(folder).beyond or ""):
                raise OptionError(
                    f"{folder}: a LoRA over replicated layers (layer_replication): beside it, neither the base nor another adapter can "
                    "be measured"
                )
        for folder in folders:
            saved = read_folder(folder, any_kind=True)
            starts = str(saved.settings.init_lora_weights).lower() not in UNCHANGED_BASE
            changes = starts or saved.beyond or saved.others or saved.whole.replacing or saved.whole.beneath
            before = {parameter: parameter.detach().clone() for parameter in base.parameters()} if changes else {}
            model = load_adapter(model, folder, adapter_name=_peft_name(folder), is_trainable=False)
            changed[folder] = {
                own: (value, own.detach().clone()) for own, value in before.items() if not torch.equal(own.detach(), value)
            }
            _give(changed, ())
        for stack in stacks.values():
            _check_together(model, stack, changed)
    setattr(base, _CHANGED, {folder: own for folder, own in changed.items() if own})
    return model.eval()


@contextlib.contextmanager
def acting(model: Any, folders: Sequence[str]) -> Iterator[None]:
    """The model with exactly these adapters acting."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    _give(getattr(base, _CHANGED, {}), folders)
    if folders:
        model.base_model.set_adapter(in_order(model, [_peft_name(folder) for folder in folders]), inference_mode=True)
        yield
    elif hasattr(model, "disable_adapter"):
        with model.disable_adapter():
            yield
    else:
        yield


def in_order(model: Any, names: Sequence[str]) -> list[str]:
    """Adapters in the order in which PEFT has to apply them: DoRA scales what is there before it, so it comes first."""
    return sorted(names, key=lambda name: not getattr(model.peft_config[name], "use_dora", False))


def check_doras(model: Any, names: Mapping[str, str]) -> None:
    """Raise :class:`OptionError` for two of DoRA that are to act together; ``names`` are folders by PEFT's name."""
    doras = [folder for name, folder in names.items() if getattr(model.peft_config[name], "use_dora", False)]
    if len(doras) > 1:
        raise OptionError(f"{doras[0]} and {doras[1]}: two of DoRA (use_dora), of which each would scale what the other adds")


def _check_together(model: Any, stack: Sequence[str], changed: Mapping[str, Mapping[Any, tuple[Any, Any]]]) -> None:
    import torch

    check_doras(model, {_peft_name(folder): folder for folder in stack})
    for i, one in enumerate(stack):
        for other in stack[i + 1 :]:
            both = [own for own in changed[one] if own in changed[other]] if one != other else []
            if any(not torch.equal(changed[one][own][1], changed[other][own][1]) for own in both):
                raise OptionError(f"{one} and {other}: each changes the base's own weights when it is loaded, in its own way")


def _give(changed: Mapping[str, Mapping[Any, tuple[Any, Any]]], folders: Sequence[str]) -> None:
    """Give the base's parameters the values that they have with these folders acting."""
    import torch

    with torch.no_grad():
        for own in changed.values():
            for parameter, (before, _) in own.items():
                parameter.data.copy_(before)
        for folder in folders:
            for parameter, (_, after) in changed.get(folder, {}).items():
                parameter.data.copy_(after)


def _peft_name(folder: str) -> str:
    """A name for PEFT: it becomes a part of module paths, so it holds no dot and no slash."""
    return "a" + hashlib.sha256(folder.encode()).hexdigest()[:16]
