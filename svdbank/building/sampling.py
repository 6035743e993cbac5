"""Some weights of a bank, drawn so that nobody can know which, and what looking at them shows."""

from __future__ import annotations

import math
import secrets
from fractions import Fraction

from svdbank.bank.reading import Bank
from svdbank.core.errors import OptionError
from svdbank.core.specs import Struct

#: Chances for which a verdict says how many bad weights it takes.
_CHANCES = (0.95, 0.99)


class Sample(Struct, frozen=True):
    """Which weights were looked at, of each family some, drawn by the system's randomness, and what that shows.

    Attributes
    ----------
    share
        The least share of a family that was drawn: k bad weights, wherever they are, are seen with a chance of at least
        ``1 − (1 − share)ᵏ``.
    names
        The weights.
    needed
        By chance: how many bad weights a bank must have so that one of them was drawn with at least that chance.
    """

    share: float
    names: tuple[str, ...]
    needed: dict[str, int]


def draw(bank: Bank, share: float) -> Sample:
    """Draw ``share`` of each family's weights, at least one; OptionError unless ``0 < share ≤ 1``.

    Whoever made the bank must not know which: the draw is the system's, and there is no seed.
    """
    if not 0 < share <= 1:
        raise OptionError(f"a sample is more than 0 and at most 1 of the weights, not {share:g}", hint="--sample 5%")
    generator, names, least = secrets.SystemRandom(), list[str](), Fraction(1)
    families: dict[str, list[str]] = {}
    for name in bank:
        families.setdefault(bank[name].family.name, []).append(name)
    for members in families.values():
        count = max(1, math.ceil(share * len(members)))
        names += generator.sample(members, count)
        least = min(least, Fraction(count, len(members)))
    missed = float(1 - least)
    needed = {
        f"{chance:g}": 1 if not missed else max(1, math.ceil(math.log(1 - chance) / math.log(missed))) for chance in _CHANCES
    }
    return Sample(float(least), tuple(names), needed)
