"""What a user calls on a model: attach, load, ask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from svdbank import cache
from svdbank.adapter.fetching import located
from svdbank.adapter.folder import AdapterFolder, read_folder
from svdbank.adapter.methods import METHODS, RESIDUAL_METHODS
from svdbank.bank.reading import Bank
from svdbank.core.errors import BankError, CheckpointError, OptionError, WrongBaseError, missing_extra
from svdbank.core.specs import ProgressCallback
from svdbank.peft.automatic import AUTO
from svdbank.peft.configuration import method_of, normalise
from svdbank.peft.injection import FactorSource, attachments, check_reload
from svdbank.peft.loading import as_peft_loads, check_known, check_rows, explained
from svdbank.peft.lookup import Attachment
from svdbank.peft.patterns import check_patterns
from svdbank.peft.quantised import keep_gradients
from svdbank.peft.routing import reroute, use_bank
from svdbank.peft.snapshot import as_it_was


def get_peft_model(
    model: nn.Module,
    config: Any,
    *,
    bank: Bank | str | Path,
    find: bool = True,
    rank: int | None = None,
    progress: ProgressCallback | None = None,
    adapter_name: str = "default",
    **options: Any,
) -> Any:
    """``peft.get_peft_model`` with a lookup in ``bank`` instead of one SVD a weight; returns PEFT's own ``PeftModel``.

    ``bank`` is a bank, its folder, or a model's name; ``"auto"`` is the model's own in the cache, and where there is none, one that is made
    now, of the weights where they lie, at the rank of ``config`` or at ``rank``, which is at least that, and kept there. The log of
    ``svdbank`` says so, ``progress`` is called with each step.

    ``config`` is a ``LoraConfig`` with ``init_lora_weights`` one of

    ``"mica"``
        ``B`` (out, r) holds the bank's r most minor left vectors and is frozen for good; ``A`` is zero.
    ``"milora"``, ``"pissa"``
        ``A`` and ``B`` hold the r smallest, or largest, triplets, and the base's weights become ``W − s B A`` in place: the model's
        output is the same up to that one rounding, which :class:`Attachment` reports. The base then belongs to this adapter.

    in any capitalisation (PEFT's own code freezes MiCA's ``B`` only for the lower-case spelling, so it is normalised). ``options`` go to
    PEFT, ``find`` to :func:`use_bank`. Factors are float32; with ``autocast_adapter_dtype=False`` they get the weight's dtype.

    Raises :class:`WrongBaseError` when the model is not the bank's, :class:`BankError` for weights, ranks or sides the bank lacks,
    :class:`OptionError` for a config that takes nothing from a bank or a combination that has no meaning. The model is then as it was
    before the call.
    """
    peft = _peft()
    if method_of(config) is None:
        raise OptionError(
            f"init_lora_weights={getattr(config, 'init_lora_weights', None)!r} takes nothing from a bank",
            hint=f"LoraConfig(init_lora_weights=…) with one of {', '.join(METHODS)}, or call peft.get_peft_model",
        )
    normalise(config)
    with use_bank(bank, find=find, rank=rank, progress=progress):
        return peft.get_peft_model(model, config, adapter_name=adapter_name, **options)


def load_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    bank: Bank | str | Path | None = None,
    adapter_name: str = "default",
    is_trainable: bool = True,
    **options: Any,
) -> Any:
    """Load a saved adapter folder, or ``org/name[@revision]`` of one on the Hub, without any SVD, MiCA's ``B`` frozen; returns the
    ``PeftModel``.

    ``model`` is a base model, or a ``PeftModel`` that gets one more adapter, or other values for one of that name. With a ``bank`` the
    base is recognised as in :func:`get_peft_model`, an adapter that records another base digest is refused, and so is a MiCA adapter
    whose ``B`` is not of this bank. A MiLoRA or PiSSA folder needs the bank: the base becomes the same ``W − s B₀ A₀`` that the adapter
    was trained on. ``options`` go to ``PeftModel.from_pretrained`` or ``PeftModel.load_adapter``.

    Raises :class:`CheckpointError` for a folder that is no adapter or lacks factors of targeted modules, for tensors and settings that
    would be left out, and what :func:`get_peft_model` raises; the model is then as it was. A plain LoRA folder loads as in PEFT.
    """
    peft = _peft()
    if bank == AUTO:
        raise OptionError(
            f"bank={AUTO!r} is for an adapter that begins: a saved one belongs to the bank it was made with",
            hint="name that bank, or the model; without bank= a MiCA adapter loads unchecked",
        )
    place, shown = located(folder)
    read = read_folder(place, any_kind=True)
    check_known(peft, read)
    check_rows(model, read)
    check_patterns(model, read)
    if isinstance(model, peft.PeftModel) and "(layer_replication)" in (read.beyond or ""):
        raise CheckpointError(
            f"{shown}: {read.beyond} changes the layers beneath the adapters that are there",
            hint="load it alone, onto a freshly loaded base",
        )
    opened = cache.opened(bank)
    if opened is not None:
        _check_base(opened, read)
    with as_it_was(model, adapter_name), as_peft_loads(read, model) as saved, explained(read):
        return _loaded(peft, model, saved, opened, shown, adapter_name, is_trainable, options)


def _loaded(
    peft: Any,
    model: nn.Module,
    saved: AdapterFolder,
    opened: Bank | None,
    shown: str,
    adapter_name: str,
    is_trainable: bool,
    options: dict[str, Any],
) -> Any:
    """:func:`load_adapter` of a folder that PEFT can load."""
    place = str(saved.path)
    config = peft.LoraConfig.from_pretrained(place)
    method = method_of(config)
    on_residual = method is None and saved.cache is not None and saved.cache.method in RESIDUAL_METHODS
    if on_residual and opened is not None:
        # Written beside its residual base, where PEFT loads it as plain LoRA. A bank says that this is the unchanged base.
        config.init_lora_weights = saved.cache.method if saved.cache is not None else None
        method = method_of(config)
    if method is None and is_mica(saved):
        config.init_lora_weights = method = "mica"
    if method is not None:
        normalise(config)
    if method in RESIDUAL_METHODS and opened is None:
        raise OptionError(
            f"{shown}: a {method} adapter belongs to the base without its first triplets, which only a bank can take out",
            hint="load_adapter(model, folder, bank=…), or svdbank export --to lora for the unchanged base",
        )
    if method is None and is_trainable:  # of the other methods, the injection takes care
        keep_gradients(model)
    exact = {adapter_name} if options.get("autocast_adapter_dtype", True) else set()
    source = FactorSource(opened, saved=saved.factors, folder=shown, frozen=method == "mica", exact=exact)
    with reroute(source):
        if isinstance(model, peft.PeftModel):
            if on_residual and opened is not None:
                raise OptionError(
                    f"{shown}: {method} changes the base's weights, under the adapters that are already there",
                    hint="load it alone, onto a freshly loaded base",
                )
            if adapter_name in model.peft_config:
                there = method_of(model.peft_config[adapter_name])
                if there != method:
                    raise OptionError(
                        f"the adapter {adapter_name!r} is there already and starts from {there or 'plain LoRA'}, the folder from "
                        f"{method or 'plain LoRA'}",
                        hint="give it another adapter_name",
                    )
                if method == "mica":
                    check_reload(source, model.get_base_model(), adapter_name)
            # It reads the config by itself, with whatever spelling is on disk: the injection normalises it.
            model.load_adapter(place, adapter_name, is_trainable=is_trainable, **options)
            return model
        try:
            return peft.PeftModel.from_pretrained(
                model, place, adapter_name=adapter_name, is_trainable=is_trainable, config=config, **options
            )
        except WrongBaseError as cause:
            if on_residual:
                raise WrongBaseError(
                    str(cause),
                    hint="the checkpoint that init --residual-out wrote takes this adapter as it is: leave bank= out",
                ) from cause
            raise


def is_mica(saved: AdapterFolder) -> bool:
    """True for a folder that goes on as MiCA though its config says plain LoRA, because PEFT has no MiCA for parameters."""
    settings = saved.settings
    plain = settings.init_lora_weights is True and not settings.inference_mode
    return plain and bool(settings.target_parameters) and saved.cache is not None and saved.cache.method == "mica"


def attachment(model: nn.Module, adapter_name: str = "default") -> Attachment:
    """What attaching ``adapter_name`` found and did: the weights, whether each was verified, the time by step.

    Raises :class:`OptionError` where no bank was attached under that name.
    """
    found = attachments(model)
    if adapter_name not in found:
        raise OptionError(
            f"no bank was attached under the adapter name {adapter_name!r}",
            hint=f"there are: {', '.join(map(repr, found))}" if found else "get_peft_model(model, config, bank=…) attaches one",
        )
    return found[adapter_name]


def _check_base(bank: Bank, saved: AdapterFolder) -> None:
    lacking = [name for name in saved.base.weights if name not in bank]
    if lacking:
        raise BankError(
            f"{bank.place}: the bank lacks {len(lacking)} weights of the adapter {saved.path}, first {lacking[0]}",
            hint="svdbank build MODEL with --targets for them adds them to the bank",
        )
    if saved.base.is_of(bank) is False:
        raise WrongBaseError(
            f"{saved.path}: this adapter was made on other weights than those of {bank.place}",
            hint="open the bank of the adapter's base",
        )


def _peft() -> Any:
    try:
        import peft
        import transformers  # noqa: F401 - PEFT's classes need it, and so do the patches
    except ImportError as cause:
        raise missing_extra("peft", "peft") from cause
    return peft
