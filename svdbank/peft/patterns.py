"""Regular expressions of a folder's config, tried on the model's names before PEFT hands them to ``re``, which nothing interrupts."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from typing import Any

from svdbank.adapter.folder import AdapterFolder
from svdbank.core.errors import OptionError
from svdbank.core.expressions import is_plain

#: Processor seconds that all expressions of a config may take on all names; a wide bound in wall time where a process cannot be given one.
_SECONDS, _WALL = 2, 120

#: The very engine, in a process that the system ends: another engine may be quick where this one is not.
_TRY = """
import json, re, sys
seconds, whole, begins, names = json.load(sys.stdin)
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
except ImportError:
    pass
for pattern in whole:
    for name in names:
        re.fullmatch(pattern, name)
for pattern in begins:
    for name in names:
        re.match(pattern, name)
"""


def check_patterns(model: Any, saved: AdapterFolder) -> None:
    """OptionError where PEFT would take for ever to match what a config names against the names of ``model``."""
    settings = saved.settings
    whole = [one for one in (settings.target_modules, settings.exclude_modules) if isinstance(one, str)]
    layers = [settings.layers_pattern] if isinstance(settings.layers_pattern, str) else settings.layers_pattern or []
    begins = [rf"(.*\.)?({one})$" for one in _expressions((*settings.rank_pattern, *settings.alpha_pattern))]
    begins += [rf".*\.{one}\.(\d+)\." for one in _expressions(layers)]
    whole = _expressions(whole)
    if not whole and not begins:
        return
    root = model.get_base_model() if hasattr(model, "get_base_model") else model
    names = [name for name, _ in root.named_modules()] + [name for name, _ in root.named_parameters()]
    question = json.dumps([_SECONDS, whole, begins, names])
    try:
        ended = subprocess.run(
            [sys.executable, "-I", "-c", _TRY], input=question, text=True, capture_output=True, timeout=_WALL
        )
        quick = ended.returncode >= 0  # what is no expression, PEFT says in its own words
    except subprocess.TimeoutExpired:
        quick = False
    if not quick:
        raise OptionError(
            f"{saved.path}: the regular expressions of its config take too long on the names of this model, and PEFT would not end: "
            f"{', '.join(repr(one[:80]) for one in (*whole, *begins)[:3])}",
            hint="name the modules one by one; an expression whose repetitions are not nested is quick",
        )


def _expressions(patterns: Iterable[str]) -> list[str]:
    return [one for one in patterns if not is_plain(one) and one != "all-linear"]
