"""The ``--only`` option of benchmarks that have sections."""

from __future__ import annotations

import argparse
from collections.abc import Iterable


def add_option(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    """``--only a,b``: a tuple of ``names`` in the order given; all of them by default."""
    known = tuple(names)

    def chosen(text: str) -> tuple[str, ...]:
        asked = tuple(text.split(","))
        if unknown := [name for name in asked if name not in known]:
            raise argparse.ArgumentTypeError(f"no section is called {', '.join(unknown)}; there are {', '.join(known)}")
        return asked

    parser.add_argument("--only", type=chosen, default=known, metavar="SECTIONS", help=f"comma-separated: {', '.join(known)}")
