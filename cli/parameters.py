"""Kinds of values that options take, beside click's own."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Literal

import click

if TYPE_CHECKING:
    _ParamType = click.ParamType[Any]
else:  # in click 8.1 no generic class
    _ParamType = click.ParamType

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


class CountType(_ParamType):
    """A number of parameters: ``5000000``, ``5M``, ``0.5M``, ``1B``."""

    name = "N[k|M|B]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmb]?)", str(value).strip().lower())
        if match is None or (count := int(float(match[1]) * _UNITS[match[2]])) < 1:
            self.fail(f"{value!r} is no number of parameters: 5000000, 5M or 0.5M", param, ctx)
        return count


class PatternType(_ParamType):
    """``MODULE=NUMBER``."""

    name = "MODULE=N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, float]:
        if isinstance(value, tuple):
            return value
        module, _, number = str(value).rpartition("=")
        try:
            return module, float(number)
        except ValueError:
            self.fail(f"{value!r} is not MODULE=NUMBER, e.g. v_proj=8", param, ctx)


class LayersType(_ParamType):
    """``0,3,5-8``."""

    name = "N,N-M"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        found: list[int] = []
        for part in str(value).split(","):
            match = re.fullmatch(r"\s*(\d{1,6})(?:-(\d{1,6}))?\s*", part)
            if match is None:
                self.fail(f"{value!r} is no list of layers, e.g. 0,3,5-8", param, ctx)
            found += range(int(match[1]), int(match[2] or match[1]) + 1)
        return tuple(dict.fromkeys(found))


class RankType(_ParamType):
    """A positive number or the word ``all``."""

    name = "RANK|all"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | Literal["all"]:
        try:
            return "all" if value == "all" else int(value)
        except ValueError:
            self.fail(f"{value!r} is neither a number nor 'all'", param, ctx)


class SizeType(_ParamType):
    """A number of bytes, alone or with a unit: ``20GB`` is 20·10⁹, ``20GiB`` 20·2³⁰."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"(\d{1,18}(?:\.\d{1,18})?)\s*(?:([kmgt])(i?)b?|b)?", value.strip().lower())
        if found is None:
            self.fail(f"{value!r} is not a size: 500MB, 20GB, 16GiB", param, ctx)
        power = " kmgt".index(found[2] or " ")
        return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


class ShareType(_ParamType):
    """A share: ``5%`` or ``0.05``."""

    name = "SHARE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*(%?)", str(value).strip())
        share = float(found[1]) / (100 if found[2] else 1) if found is not None else 0.0
        if not 0 < share <= 1:
            self.fail(f"{value!r} is no share of the weights: 5% or 0.05", param, ctx)
        return share


class AgeType(_ParamType):
    """A length of time in seconds: ``30d``, ``12h``, ``8w``. An ``m`` would be minutes to some and months to others."""

    name = "TIME"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        found = re.fullmatch(r"(\d{1,6}(?:\.\d{1,3})?)\s*([hdw])", str(value).strip().lower())
        if found is None:
            self.fail(f"{value!r} is no length of time: 30d, 12h, 8w", param, ctx)
        return float(found[1]) * {"h": 3600.0, "d": 86400.0, "w": 7 * 86400.0}[found[2]]
