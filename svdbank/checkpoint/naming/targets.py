"""``target_modules`` as PEFT understands it, on module names.

One string ``all-linear``, or names that match a module's last components, or one regular expression that matches the whole name
(``peft.tuners.tuners_utils.check_target_module_exists``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from svdbank.core.errors import OptionError
from svdbank.core.expressions import Expression, is_plain

ALL_LINEAR = "all-linear"

#: The kinds of weight that it means: PEFT takes routers, which were linear modules in older Transformers, as parameters.
ALL_LINEAR_KINDS = frozenset({"linear", "router", "grouped"})


@dataclass(frozen=True)
class Targets:
    """Targets after parsing: the shorthand, the names, or the expression."""

    all_linear: bool
    names: tuple[str, ...]
    pattern: Expression | None

    def named(self, module: str) -> bool:
        """True when a name or the expression, rather than the shorthand, matches ``module``."""
        if self.pattern is not None:
            return self.pattern.fullmatch(module)
        return any(_ends(module, name) for name in self.names)

    def silent(self, modules: Iterable[str]) -> list[str]:
        """The names that match none of ``modules``."""
        paths = list(modules)
        return [name for name in self.names if not any(_ends(path, name) for path in paths)]


def _ends(module: str, name: str) -> bool:
    return module == name or module.endswith("." + name)


def parse_targets(targets: str | Sequence[str]) -> Targets:
    """Read targets; OptionError for none, an empty one, an invalid expression, or an expression beside other targets."""
    return _parse((targets,) if isinstance(targets, str) else tuple(targets))


@lru_cache(maxsize=64)
def _parse(targets: tuple[str, ...]) -> Targets:
    if not targets or not all(isinstance(target, str) and target for target in targets):
        raise OptionError(
            "no target modules were named", hint="leave --targets out for every linear weight, or name one: q_proj"
        )
    expressions = [target for target in targets if not is_plain(target)]
    if expressions and len(targets) > 1:
        raise OptionError(
            f"{expressions[0]!r} is a regular expression and stands beside other targets; PEFT takes either names or one expression",
            hint=f"join them: '.*\\.({'|'.join(t for t in targets if t not in expressions)})' or one expression for all",
        )
    if expressions:
        return Targets(False, (), Expression(expressions[0]))
    names = tuple(target for target in targets if target.lower() != ALL_LINEAR)
    return Targets(len(names) < len(targets), names, None)


def matches(module: str, targets: str | Sequence[str]) -> bool:
    """True when ``module`` (a dotted module path) is targeted.

    ``all-linear`` matches any module: a name does not say which class it has, so callers that use it know that they hold linear
    ones. Raises OptionError for targets that :func:`parse_targets` refuses.
    """
    parsed = parse_targets(targets)
    return parsed.all_linear or parsed.named(module)
