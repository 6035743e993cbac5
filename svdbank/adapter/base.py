"""What an adapter records of its base: a name that leads back to it, the task it is for, and the cached bank that the name finds."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from svdbank.bank.reading import Bank
from svdbank.checkpoint.configuration import ModelFacts, facts
from svdbank.checkpoint.source import read_config
from svdbank.core.places import OnDisk, OnHub, locate

#: Names of classes that predict next tokens; T5WithLMHeadModel, of old configurations, is an encoder and a decoder.
_CAUSAL = re.compile(r"(ForCausalLM|(?<!With)LMHeadModel)$")

#: Model types whose …ForConditionalGeneration turns text into text; that of others takes images or sound.
_TEXT_TO_TEXT = frozenset({"t5", "mt5", "umt5", "longt5", "bart", "mbart"})


def is_bank(source: str | os.PathLike[str]) -> bool:
    """True for the folder of a bank."""
    place = locate(source)
    return isinstance(place, OnDisk) and (place.path / "manifest.json").is_file()


def base_of(model_or_bank: str | Path | Bank, bank: Bank) -> tuple[str, str | None]:
    """Name and revision of the base: the full path of a model's folder, or what the bank says.

    A bank knows a folder by its name alone, with which neither PEFT nor the cache finds it again.
    """
    place = None if isinstance(model_or_bank, Bank) or is_bank(model_or_bank) else locate(model_or_bank)
    if isinstance(place, OnDisk) and place.path.is_dir():
        return os.path.abspath(place.path), None  # noqa: PTH100 - links stay as they were named
    return bank.manifest.base.name, bank.manifest.base.revision


def facts_of(bases: Iterable[tuple[str, str | None]]) -> ModelFacts | None:
    """What the first of these names and revisions whose ``config.json`` is on this machine says there; None where none is."""
    for name, revision in bases:
        folder = configuration_of(name, revision)
        if folder is not None:
            return facts(read_config(folder), f"{folder}: config.json")
    return None


def task_of(about: ModelFacts | None) -> str | None:
    """PEFT's task type for such a model; None where it is not plain."""
    if about is None or not about.architectures:
        return None
    if all(_CAUSAL.search(own) for own in about.architectures):
        return "CAUSAL_LM"
    generates = all(own.endswith("ForConditionalGeneration") for own in about.architectures)
    return "SEQ_2_SEQ_LM" if generates and about.model_type in _TEXT_TO_TEXT else None


def configuration_of(name: str, revision: str | None) -> Path | None:
    """The folder with a base's ``config.json``, of a model on the Hub that in its cache; nothing is fetched."""
    place = locate(name, one_word=True)
    if isinstance(place, OnDisk):
        return place.path.resolve() if (place.path / "config.json").is_file() else None
    if not isinstance(place, OnHub):
        return None
    if "huggingface_hub" not in sys.modules and not _cache_folder(place.repository).is_dir():
        return None  # seen without a library that takes as long to import as the work takes
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(place.repository, "config.json", revision=place.revision or revision)
    except HFValidationError:
        return None
    return Path(found).parent.resolve() if isinstance(found, str) else None


def _cache_folder(repository: str) -> Path:
    """Where the Hub's client keeps a model, by the environment variables that it reads."""
    hub = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    if not hub:
        home = os.environ.get("HF_HOME") or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
        hub = f"{home}/hub"
    return Path(os.path.expandvars(hub)).expanduser() / f"models--{repository.replace('/', '--')}"
