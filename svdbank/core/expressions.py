"""Regular expressions from outside, matched as PEFT matches them and in bounded time.

PEFT hands patterns of a config to ``re``, in which ``(a+)+$`` takes for ever on a name that does not match. Here ``re`` says what is a
pattern, ``regex`` matches it, and its clock ends what takes too long. What the two would read differently is refused.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

from svdbank.core.errors import OptionError

if TYPE_CHECKING:
    import regex

#: Characters of a pattern: two thousand modules spelled out. Compiling one of these takes a second.
_LONGEST = 100_000

#: Seconds for one name, and for all names together on which one pattern took more than the last of these.
_ONE, _ALL, _SLOW = 1.0, 5.0, 0.01

#: Characters that make a pattern more than a name. The dot is none: it stands for itself too.
_META = re.compile(r"[\\^$*+?{}\[\]|()]")

#: What ``regex`` reads otherwise than ``re``: fuzzy matching, ``(?:q){e<=1}``, and POSIX classes.
_OTHERWISE = re.compile(r"\{(?!\d*,?\d*\})|\[\[:")


class Expression:
    """A pattern that PEFT would take. OptionError for what is none, and for what takes too long."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._compiled: regex.Pattern[str] = _compiled(pattern)
        self._left = _ALL

    def fullmatch(self, name: str) -> bool:
        """``re.fullmatch``."""
        return self._ask(self._compiled.fullmatch, name)

    def match(self, name: str) -> bool:
        """``re.match``."""
        return self._ask(self._compiled.match, name)

    def _ask(self, match: Callable[..., object], name: str) -> bool:
        # Processor time of this thread: what else the machine, or another thread, is at says nothing of the pattern.
        begun, allowed, spent = time.thread_time(), min(_ONE, self._left), 0.0
        while True:
            try:
                found = match(name, timeout=max(allowed - spent, 0.001))
                break
            except TimeoutError:
                spent = time.thread_time() - begun
                if spent < 0.9 * allowed:  # by the clock of regex, which others move too
                    continue
                raise OptionError(
                    f"the regular expression {_shown(self._pattern)} takes too long on {_shown(name)}",
                    hint="name the modules one by one; an expression whose repetitions are not nested is quick",
                ) from None
        if (spent := time.thread_time() - begun) > _SLOW:
            self._left -= spent
        return found is not None


def is_plain(pattern: str) -> bool:
    """True for a name: nothing in it is of a regular expression but dots."""
    return _META.search(pattern) is None


def ends(module: str, pattern: str) -> bool:
    """PEFT's rule for its patterns (``get_pattern_key``): ``re.match(rf"(.*\\.)?({pattern})$", module)``."""
    if is_plain(pattern) and "\n" not in module:
        start = len(module) - len(pattern)
        if start < 0 or (start > 0 and module[start - 1] != "."):
            return False
        return module.endswith(pattern) or all(own in (".", there) for own, there in zip(pattern, module[start:], strict=True))
    return _ending(pattern).match(module)


@lru_cache(maxsize=256)
def _ending(pattern: str) -> Expression:
    _compiled(pattern)  # by itself too: a bracket too many could close the group around it
    return Expression(rf"(.*\.)?({pattern})$")


def _compiled(pattern: str) -> regex.Pattern[str]:
    import regex  # it takes as long as all of `svdbank ls`, and few patterns are more than names

    hint = "to match a name's end, write the name alone: q_proj"
    if len(pattern) > _LONGEST:
        raise OptionError(f"a regular expression of {len(pattern)} characters: {_shown(pattern)}", hint=hint)
    if _OTHERWISE.search(pattern):
        raise OptionError(
            f"{_shown(pattern)}: a brace that counts nothing, or a POSIX class, which no name of a module has", hint=hint
        )
    try:
        re.compile(pattern)
        return regex.compile(pattern)
    except (re.error, regex.error, OverflowError, RecursionError, MemoryError) as cause:
        raise OptionError(f"{_shown(pattern)} is not a valid regular expression: {cause}", hint=hint) from cause


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:77]}…")
