"""What a shell offers after TAB where a bank, a model or an adapter is to be named."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import click
from click.shell_completion import CompletionItem

from svdbank.core.errors import SvdbankError


def complete_bank(context: click.Context, option: click.Parameter, typed: str) -> list[CompletionItem]:
    """Banks in the cache, by their models' names where these find them, and banks beside what is typed."""
    return _offered(typed, [*_cached(), *_beside(typed, ("manifest.json", "plan.json"))])


def complete_model(context: click.Context, option: click.Parameter, typed: str) -> list[CompletionItem]:
    """Models with a bank in the cache, those in the Hugging Face cache, and folders of models beside what is typed."""
    cached = (name for name in _cached() if not Path(name).is_absolute())
    return _offered(typed, [*cached, *_downloaded_models(), *_beside(typed, ("config.json",))])


def complete_adapter(context: click.Context, option: click.Parameter, typed: str) -> list[CompletionItem]:
    """Folders of adapters beside what is typed."""
    return _offered(typed, _beside(typed, ("adapter_config.json",)))


def complete_source(context: click.Context, option: click.Parameter, typed: str) -> list[CompletionItem]:
    """Banks and adapters."""
    return _offered(typed, [*_cached(), *_beside(typed, ("manifest.json", "plan.json", "adapter_config.json"))])


def _offered(typed: str, names: Iterable[str]) -> list[CompletionItem]:
    """The names that go on from what is typed; where none does, files, which the shell knows best."""
    found = [CompletionItem(name) for name in dict.fromkeys(names) if name.startswith(typed)]
    return found or [CompletionItem(typed, type="file")]


def _beside(typed: str, marks: tuple[str, ...]) -> Iterator[str]:
    """Folders where the typed path is going on that hold one of these files."""
    above = typed[: len(typed) - len(os.path.basename(typed))]  # noqa: PTH119 - the path as it is typed, ~ and dots included
    try:
        places = sorted(Path(above or ".").expanduser().iterdir())
    except OSError:
        return
    yield from (f"{above}{place.name}" for place in places if any((place / mark).is_file() for mark in marks))


def _cached() -> Iterator[str]:
    """Models that name a bank in the cache; the bank's own path where its model was a folder, whose name alone finds nothing."""
    from svdbank import cache
    from svdbank.bank.files import Folder
    from svdbank.bank.index import read_manifest

    for folder in cache.bank_folders():
        try:
            base = read_manifest(Folder(folder)).base
        except (SvdbankError, OSError):
            continue
        yield base.name if base.revision is not None else str(folder.absolute())


def _downloaded_models() -> Iterator[str]:
    from huggingface_hub.constants import HF_HUB_CACHE

    for folder in sorted(Path(HF_HUB_CACHE).glob("models--*--*/snapshots")):
        yield folder.parent.name.removeprefix("models--").replace("--", "/", 1)
