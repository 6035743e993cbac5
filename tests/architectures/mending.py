"""What a model says when it cannot be made of a configuration, read for the field that is meant and the value that it wants."""

from __future__ import annotations

import inspect
import re
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from tests.architectures.shrinking import head_dim, limit, proportional

Fields = dict[str, Any]


def mended(fields: Fields, error: Exception) -> bool:
    """Change the field that ``error`` speaks of, here or in a part; False where it speaks of none."""
    text = str(error)
    rules = (_stated, _divisible, _absent, _rotations_of_kinds, _sections, _words, _required, _caches, _empty)
    return any(rule(fields, text, error) for rule in rules)


def parts(fields: Fields) -> Iterator[Fields]:
    """The fields, and those of every part."""
    yield fields
    for value in fields.values():
        if isinstance(value, dict):
            yield from parts(value)


def _set(fields: Fields, name: str, value: Any, *, add: bool = False) -> bool:
    """Set a field wherever it is (or, with ``add``, everywhere where it is nowhere); whether anything changed."""
    where = [part for part in parts(fields) if name in part] or (list(parts(fields)) if add else [])
    changed = [part for part in where if part.get(name) != value]
    for part in changed:
        part[name] = value
    return bool(changed)


def _stated(fields: Fields, text: str, error: Exception) -> bool:
    """``x must be 0, got 256``, ``make sure that `is_decoder=True```."""
    number = re.search(r"(\w+) must be (\d+), got", text) or re.search(r"requires (\w+) ?=+ ?(\d+)", text)
    if number:
        return _set(fields, number[1], int(number[2]), add=True)
    flag = re.search(r"`(?:config\.)?(\w+) ?=+ ?(True|False)`", text)
    return bool(flag) and _set(fields, flag[1], flag[2] == "True", add=True)


def _divisible(fields: Fields, text: str, error: Exception) -> bool:
    """``a (2) must be divisible by b (16)``, ``must fit the head: a=16, b=8``."""
    found = re.search(r"`?(\w+)`? \(?(?:got )?(\d+)\)?.* divisible by `?(\w+)`? \(?(?:got )?(\d+)", text)
    if found is not None:
        return _set(fields, found[1], int(found[4]))
    fits = re.search(r"must fit .*\w+=(\d+), (\w+)=\d+", text)
    return bool(fits) and _set(fields, fits[2], int(fits[1]))


def _absent(fields: Fields, text: str, error: Exception) -> bool:
    """A part has no base for its rotary embedding, a model no token to start with, a layer no window."""
    window = re.search(r"Could not find a `(\w+)` argument in the config", text)
    if window:
        return _set(fields, window[1], limit(window[1]))
    token = re.search(r"no attribute '(\w+_token_id)'", text)
    if token and token[1] not in fields:
        fields[token[1]] = 1
        return True
    if re.search(r"no attribute 'rope_theta'", text) is None:
        return False
    lacking = [part for part in parts(fields) if "model_type" in part and "rope_theta" not in part]
    for part in lacking:
        part["rope_theta"] = 10000.0
    return bool(lacking)


def _rotations_of_kinds(fields: Fields, text: str, error: Exception) -> bool:
    """Kinds of layers without a rotary embedding of their own."""
    kind = re.fullmatch(r"'(\w+_attention)'", text)
    lacking = [part for part in parts(fields) if isinstance(part.get("rope_parameters"), dict)]
    if kind is None or not lacking:
        return False
    changed = [
        part for part in lacking if kind[1] in (part.get("layer_types") or ()) and kind[1] not in part["rope_parameters"]
    ]
    for part in changed:
        part["rope_parameters"][kind[1]] = {"rope_type": "default", "rope_theta": 10000.0}
    return bool(changed)


def _sections(fields: Fields, text: str, error: Exception) -> bool:
    """Sections of a rotary embedding that the code has of its own, for larger heads."""
    default = next((found for file in _files(error) if (found := re.search(r"\"mrope_section\", \[([\d, ]+)\]", file))), None)
    if default is None:
        return False
    sections, changed = [int(number) for number in default[1].split(",")], False
    for part in parts(fields):
        own = part.get("rope_parameters")
        for rotation in (own, *own.values()) if isinstance(own, dict) else ():
            if isinstance(rotation, dict) and "rope_theta" in rotation and "mrope_section" not in rotation:
                turned = int(head_dim(part) * (rotation.get("partial_rotary_factor") or 1.0))
                rotation["mrope_section"] = proportional(sections, turned // 2)
                changed = True
    return changed


def _words(fields: Fields, text: str, error: Exception) -> bool:
    """A table of words by name, of which the code asks for some."""
    if "no attribute 'get'" not in text:
        return False
    words = [word for source in _sources(error) for word in re.findall(r"vocab_map\.get\(\"([^\"]+)\"\)", source)]
    return bool(words) and _set(fields, "vocabulary_map", {word: 3 + i for i, word in enumerate(dict.fromkeys(words))})


def _required(fields: Fields, text: str, error: Exception) -> bool:
    """``missing required fields: ['a', 'b']``."""
    found = re.search(r"missing required fields?: \[([^\]]+)\]", text)
    if found is None:
        return False
    changed = False
    for name in re.findall(r"\w+", found[1]):
        for part in parts(fields):
            if name in part and part[name] is None:
                part[name] = _value(name, part, "")
                changed = True
    return changed


def _caches(fields: Fields, text: str, error: Exception) -> bool:
    """All layers share the keys of layers that are not there: only the last one does."""
    return "layer types producing a cache" in text and _set(fields, "num_kv_shared_layers", 1)


def _empty(fields: Fields, text: str, error: Exception) -> bool:
    """Fields that are None and are read where it failed: numbers by their kind, lists of kinds by what they are compared with."""
    if "None" not in text and not isinstance(error, TypeError):
        return False
    named = _named(error)
    for source in _sources(error):
        for name in dict.fromkeys(named.get(word, word) for word in re.findall(r"\w+", source)):
            holders = [part for part in parts(fields) if name in part and part[name] is None]
            for part in holders:
                value = _value(name, part, source)
                if value is not None:
                    part[name] = value
                    return True
    return False


def _value(name: str, part: Fields, source: str) -> Any:
    layers = part.get("num_hidden_layers")
    if name.endswith("layer_types") and isinstance(layers, int):
        other = re.search(rf"{name}\[.*?\] [!=]= \"(\w+)\"", source)
        common = "dense" if name.startswith("mlp") else "full_attention"
        return [common if layer % 2 == 0 or not other else other[1] for layer in range(layers)]
    if f'{name}.split("/")' in source:
        return "1/2"
    if name.endswith("layer_map"):
        return [[0, 0]]
    return limit(name) or None


def _named(error: BaseException) -> dict[str, str]:
    """Other names of fields where it failed: of every configuration that was in use, and those that the module keeps them under."""
    found: dict[str, str] = {}
    for frame, _ in _frames(error):
        module = type(frame.f_locals.get("self"))
        if "__init__" in vars(module):
            found |= dict(re.findall(r"self\.(\w+) = (?:self\.)?config\.(\w+)", inspect.getsource(module.__init__)))
        for value in frame.f_locals.values():
            found |= getattr(type(value), "attribute_map", None) or {}
            found |= getattr(type(getattr(value, "config", None)), "attribute_map", None) or {}
    return found


def _files(error: BaseException) -> Iterator[str]:
    """The files of models that it failed in."""
    names = dict.fromkeys(frame.f_code.co_filename for frame, _ in _frames(error))
    return (Path(name).read_text() for name in names)


def _frames(error: BaseException) -> list[tuple[FrameType, int]]:
    """Where it failed inside models, last first."""
    while error.__cause__ is not None:
        error = error.__cause__
    return [
        (frame, line)
        for frame, line in reversed(list(traceback.walk_tb(error.__traceback__)))
        if "/transformers/models/" in frame.f_code.co_filename
    ]


def _sources(error: Exception) -> Iterator[str]:
    """The functions that it failed in, last first: of each the line that failed, then the whole."""
    for frame, line in _frames(error):
        lines, first = inspect.getsourcelines(frame.f_code)
        yield lines[line - first]
        yield "".join(lines)
