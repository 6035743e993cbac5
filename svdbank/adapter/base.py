"""What an adapter records of its base: a name that leads back to it, the task it is for, and the cached bank that the name finds."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from svdbank.adapter.folder import CACHE, CONFIG, SLIM, AdapterCache, LoraSettings, check_there
from svdbank.adapter.methods import RESIDUAL_METHODS
from svdbank.bank.reading import Bank
from svdbank.checkpoint.configuration import facts
from svdbank.checkpoint.source import read_config
from svdbank.core import disk
from svdbank.core.errors import BankError, CheckpointError, SvdbankError, WrongBaseError
from svdbank.core.specs import from_json

#: Names of classes that predict next tokens; T5WithLMHeadModel, of old configurations, is an encoder and a decoder.
_CAUSAL = re.compile(r"(ForCausalLM|(?<!With)LMHeadModel)$")

#: Model types whose …ForConditionalGeneration turns text into text; that of others takes images or sound.
_TEXT_TO_TEXT = frozenset({"t5", "mt5", "umt5", "longt5", "bart", "mbart"})


def is_bank(source: str | Path) -> bool:
    """True for the folder of a bank."""
    return (disk.expanded(source) / "manifest.json").is_file()


def base_of(model_or_bank: str | Path | Bank, bank: Bank) -> tuple[str, str | None]:
    """Name and revision of the base: the full path of a model's folder, or what the bank says.

    A bank knows a folder by its name alone, with which neither PEFT nor the cache finds it again.
    """
    if not isinstance(model_or_bank, Bank) and disk.expanded(model_or_bank).is_dir() and not is_bank(model_or_bank):
        return os.path.abspath(disk.expanded(model_or_bank)), None  # noqa: PTH100 - links stay as they were named
    return bank.manifest.base.name, bank.manifest.base.revision


def task_of(bases: Iterable[tuple[str, str | None]]) -> str | None:
    """PEFT's task type for the first of these names and revisions whose ``config.json`` is on this machine; None where it is not plain."""
    for name, revision in bases:
        folder = _configuration(name, revision)
        if folder is None:
            continue
        about = facts(read_config(folder), f"{folder}: config.json")
        if about.architectures and all(_CAUSAL.search(own) for own in about.architectures):
            return "CAUSAL_LM"
        generates = bool(about.architectures) and all(own.endswith("ForConditionalGeneration") for own in about.architectures)
        return "SEQ_2_SEQ_LM" if generates and about.model_type in _TEXT_TO_TEXT else None
    return None


def _configuration(name: str, revision: str | None) -> Path | None:
    """The folder with a base's ``config.json``, of a model on the Hub that in its cache; nothing is fetched."""
    path = disk.expanded(name)
    if path.is_dir():
        return path.resolve() if (path / "config.json").is_file() else None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    repository, _, own = name.removeprefix("hf://").partition("@")
    try:
        found = try_to_load_from_cache(repository, "config.json", revision=own or revision)
    except HFValidationError:
        return None
    return Path(found).parent.resolve() if isinstance(found, str) else None


def recorded_bank(source: Path, kind: str) -> Bank:
    """The cached bank of the base that an adapter folder, PEFT's or a slim one, records; ``kind`` is what needs it.

    Raises :class:`BankError` where there is none, :class:`WrongBaseError` where it is of other weights than the adapter says.
    """
    import svdbank

    check_there(source, slim=True)
    folder = source / "files" if (source / SLIM).is_file() else source
    settings, cache = None, None
    if (folder / CONFIG).is_file():
        settings = from_json((folder / CONFIG).read_bytes(), LoraSettings, where=str(folder / CONFIG), error=CheckpointError)
    if (folder / CACHE).is_file():
        cache = from_json((folder / CACHE).read_bytes(), AdapterCache, where=str(folder / CACHE), error=CheckpointError)
    named = settings.base_model_name_or_path if settings is not None else None
    if named and settings is not None and settings.revision and not Path(named).is_dir():
        named = f"{named}@{settings.revision}"
    # A residual method's config may name the base without its start.
    own = cache.base if cache is not None else None
    bases = [base for base in ((own, named) if kind in RESIDUAL_METHODS else (named, own)) if base]
    needs = f"{source}: {kind} needs the bank of the adapter's base"
    if not bases:
        raise BankError(f"{needs}, which it does not record", hint="--bank BANK, or the model's name if it is cached")
    failed: SvdbankError | None = None
    for base in dict.fromkeys(bases):
        try:
            bank: Bank = svdbank.open(base)
        except SvdbankError as cause:
            failed = failed or cause
            continue
        known = cache is not None and cache.weights and all(name in bank for name in cache.weights)
        if known and cache is not None and bank.base_digest(cache.weights) != cache.base_digest:
            raise WrongBaseError(
                f"{source}: its base is {base}, whose cached bank {bank.path} is of other weights",
                hint="--bank BANK of its base",
            )
        return bank
    raise BankError(
        f"{needs} ({failed}); --bank names one elsewhere", hint=failed.hint if failed is not None else None
    ) from failed
