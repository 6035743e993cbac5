"""Which modules a config targets, by PEFT's rule: factors of others are left out where PEFT loads a folder."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from svdbank.adapter.settings import LoraSettings
from svdbank.core.expressions import Expression, is_plain


def untargeted(settings: LoraSettings, modules: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Of ``modules`` those that the config does not target (``check_target_module_exists`` of PEFT), each with the field that says so.

    A config without ``target_modules``, or with ``all-linear``, leaves it to the model which those are. Raises :class:`OptionError` for
    a pattern that is none.
    """
    targets, layers = settings.target_modules, settings.layers_to_transform
    numbers = layers if isinstance(layers, list) else [] if layers is None else [layers]
    for module in modules:
        if settings.exclude_modules and _named(settings.exclude_modules, module):
            yield module, "exclude_modules"
        elif any(_within(name, module) for name in settings.modules_to_save or ()):
            yield module, "modules_to_save"
        elif targets is not None and targets != "all-linear" and not _named(targets, module):
            yield module, "target_modules"
        elif numbers and isinstance(targets, list) and module not in targets and _layer(settings, module) not in numbers:
            yield module, "layers_to_transform"


def _named(names: Sequence[str] | str, module: str) -> bool:
    if isinstance(names, str):
        return Expression(names).fullmatch(module)
    return any(module == name or module.endswith(f".{name}") for name in names)


def _within(name: str, module: str) -> bool:
    """True for a module of that name, and what is inside one."""
    if is_plain(name):
        return f".{name}." in f".{module}."
    return Expression(rf"(^|.*\.)({name})($|\..*)").match(module)


def _layer(settings: LoraSettings, module: str) -> int | None:
    """The number of a module's layer: the first in its path, or the first after one of ``layers_pattern``."""
    said = settings.layers_pattern
    patterns = [said] if isinstance(said, str) and said else list(said or ())
    parts = module.split(".")
    for place, part in enumerate(parts[:-1]):
        if place < (1 if patterns else 2) or not part.isdecimal():
            continue
        if not patterns or any(_ends(".".join(parts[:place]), pattern) for pattern in patterns):
            return int(part)
    return None


def _ends(path: str, pattern: str) -> bool:
    if is_plain(pattern):
        return path == pattern or path.endswith(f".{pattern}")
    return Expression(rf"(?:^|.*?\.)({pattern})$").match(path)
