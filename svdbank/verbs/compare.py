"""``compare``: how large adapters are, how they lie to each other, and where they will fight, from coefficients alone."""

from __future__ import annotations

import itertools
from pathlib import Path

from svdbank import cache
from svdbank.bank.reading import Bank
from svdbank.composition.angles import Size, measure, relate
from svdbank.composition.inputs import Places, check_touching, domains_of, notes_of, read_inputs
from svdbank.composition.relations import Pair
from svdbank.core.errors import OptionError
from svdbank.core.specs import Struct
from svdbank.reporting.figures import check_image, draw_heat_map


class CompareReport(Struct, frozen=True):
    """Sizes of the adapters and relations of all pairs. ``image`` is the heat map that was written."""

    adapters: tuple[Size, ...]
    pairs: tuple[Pair, ...]
    image: str | None
    notes: tuple[str, ...]


def compare(
    adapters: Places,
    *,
    bank: str | Path | Bank | None = None,
    rebase: str | Path | Bank | None = None,
    base: str | Path | None = None,
    image: str | Path | None = None,
) -> CompareReport:
    """Compare two adapters or more, pair by pair, without a model and without an (out, in) matrix.

    Parameters
    ----------
    adapters
        Folders or ``org/name[@revision]`` on the Hub, also as ``NAME=PLACE`` or by name;
        a folder that ``stack`` wrote counts as the domains in it.
    bank
        Bank of the base: recognises factors that stand on its directions, and gives the share of each adapter in its minor subspace.
        One adapter alone may then be looked at.
    rebase, base
        As in :func:`svdbank.composition.inputs.read_inputs`.
    image
        File of a heat map, cosines by layer: ``.svg`` or ``.png``. Needs matplotlib (``pip install 'svdbank[report]'``).

    Raises :class:`OptionError` for adapters without a common weight and for two domains of one name, :class:`WrongBaseError` for
    adapters of different bases.
    """
    if image is not None:
        check_image(Path(image))
    opened = cache.opened(bank)
    read = read_inputs(adapters, bank=opened, rebase=rebase, base=base)
    parts = domains_of(read)
    if len(parts) < 2 and opened is None:
        raise OptionError(
            "comparing takes two adapters or more", hint="with --bank BANK, one is compared with the minor subspace"
        )
    if image is not None and len(parts) < 2:
        raise OptionError("a heat map needs two adapters or more")
    if len(parts) > 1:
        check_touching(parts)
    pairs = tuple(relate(one, parts[one], other, parts[other]) for one, other in itertools.combinations(parts, 2))
    sizes = tuple(measure(name, adapter, opened) for name, adapter in parts.items())
    if image is not None:
        columns = ["all", *dict.fromkeys(relation.where for pair in pairs for relation in pair.layers)]
        draw_heat_map(
            [f"{pair.one} · {pair.other}" for pair in pairs],
            columns,
            [[_cosine(pair, column) for column in columns] for pair in pairs],
            Path(image),
            across="layer",
            colour="cosine of ΔW",
        )
    return CompareReport(sizes, pairs, None if image is None else str(Path(image)), tuple(notes_of(read)))


def _cosine(pair: Pair, column: str) -> float:
    if column == "all":
        return pair.all.cosine
    return next((relation.cosine for relation in pair.layers if relation.where == column), float("nan"))
