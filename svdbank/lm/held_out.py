"""Which documents are held out from training."""

from __future__ import annotations

import hashlib
from typing import Any

from svdbank.core.errors import OptionError
from svdbank.lm.libraries import import_datasets


def hold_out(documents: Any, *, share: float, seed: int) -> tuple[Any, Any]:
    """(training, held-out) documents. The same ``seed`` and text give the same split, whatever the order of the documents.

    A document goes by the hash of its text, so that copies of a held-out document are never trained on. Of mapped data, the
    ``share`` with the smallest hashes is held out, at least one; of streamed data, those whose hash lies below ``share``. A single
    document is cut in two at a line end. Raises :class:`OptionError` where nothing is left on one side.
    """
    if share == 0:
        return documents, None
    if not hasattr(documents, "select"):
        bound = share * 2.0**64
        return (
            documents.filter(lambda row: _hash(row["text"], seed) >= bound),
            documents.filter(lambda row: _hash(row["text"], seed) < bound),
        )
    hashes = [_hash(text, seed) for batch in documents.select_columns("text").iter(1000) for text in batch["text"]]
    present = sorted({value for value in hashes if value >= 0})
    if not present:
        raise OptionError("the data holds no text", hint="look at the files, or name another --field")
    if len(present) == 1:
        return _cut_in_two(next(text for text, h in zip(documents["text"], hashes, strict=True) if h >= 0), share)
    bound = present[min(max(1, round(share * len(present))), len(present) - 1)]
    training = [i for i, value in enumerate(hashes) if value >= bound]
    held_out = [i for i, value in enumerate(hashes) if 0 <= value < bound]
    return documents.select(training), documents.select(held_out)


def _cut_in_two(text: str, share: float) -> tuple[Any, Any]:
    """One document alone: its end is held out, from the line end nearest below the share."""
    datasets = import_datasets()
    place = text.rfind("\n", 0, round(len(text) * (1 - share))) + 1
    place = place or round(len(text) * (1 - share))
    halves = (text[:place], text[place:])
    return tuple(datasets.Dataset.from_dict({"text": [half], "begins": [True], "ends": [True]}) for half in halves)


def _hash(text: str | None, seed: int) -> int:
    """64 bits of the text and the seed; −1 for a text with nothing in it."""
    if not text or text.isspace():
        return -1
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, key=str(seed).encode()).digest(), "big")
