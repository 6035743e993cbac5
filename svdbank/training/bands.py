"""Which directions of the bank a new adapter stands on."""

from __future__ import annotations

from svdbank.adapter.components import Band
from svdbank.adapter.reading import read_adapter
from svdbank.bank.reading import Bank
from svdbank.core.errors import OptionError
from svdbank.training.options import TrainOptions


def free_band(options: TrainOptions, bank: Bank) -> Band:
    """The ``rank`` directions of the bank next to those that the adapters beneath stand on; ``[0, rank)`` where there are none.

    An adapter that does not stand on the bank's directions (an ordinary LoRA) takes none. Raises :class:`OptionError` where two of those
    beneath stand on the same directions, :class:`WrongBaseError` for an adapter of another base.
    """
    taken: list[tuple[Band, str]] = []
    for folder in options.on_top_of:
        adapter = read_adapter(folder, bank=bank)
        bands = [band for key in adapter.weights for band in adapter.bands(key)]
        if not bands:
            continue
        start, stop = min(band[0] for band in bands), max(band[1] for band in bands)
        for (other_start, other_stop), other in taken:
            if start < other_stop and other_start < stop:
                raise OptionError(
                    f"{folder} and {other} stand on the same directions of the bank, {max(start, other_start)}:{min(stop, other_stop)}",
                    hint="train the second on top of the first, or merge them",
                )
        taken.append(((start, stop), folder))
    first = max((stop for (_, stop), _ in taken), default=0)
    return first, first + options.rank
