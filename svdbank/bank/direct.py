"""The files of a bank elsewhere as the place has them now, past what is kept on this disk: for whoever verifies."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from svdbank.bank.afar import Afar
from svdbank.bank.files import Range
from svdbank.bank.layout import MANIFEST
from svdbank.bank.sources import AHEAD, read_all
from svdbank.core.specs import SourceFile


class Direct:
    """As :class:`svdbank.bank.files.Files`: sizes from a listing, bytes as they come, nothing compared but the sizes."""

    def __init__(self, afar: Afar) -> None:
        self._source = afar.source
        self._sizes = afar.source.sizes([MANIFEST, *afar.records])
        self._ready: dict[str, bytes] = {}

    @property
    def place(self) -> str:
        return self._source.place

    def size(self, name: str) -> int:
        try:
            return self._sizes[name]
        except KeyError:
            raise FileNotFoundError(f"{self.place}/{name}") from None

    def read_many(self, ranges: Sequence[Range]) -> list[bytes]:
        return [
            self._ready[name][start:stop]
            if name in self._ready
            else next(read_all(self._source, [(SourceFile(name, self.size(name), ""), start, stop)]))
            for name, start, stop in ranges
        ]

    def names(self) -> Iterator[tuple[str, bool]]:
        """Every file of the listing, all of them regular ones; as :meth:`svdbank.bank.files.Folder.names`."""
        return ((name, True) for name in self._sizes if not name.startswith("."))

    def in_batches(self, names: Iterable[str]) -> Iterator[str]:
        """The same names, while their bytes are fetched many files at a time, and let go."""
        batch: list[str] = []
        for name in names:
            batch.append(name)
            if sum(self._sizes.get(one, 0) for one in batch) >= AHEAD:
                yield from self._fetched(batch)
                batch = []
        yield from self._fetched(batch)

    def _fetched(self, batch: list[str]) -> Iterator[str]:
        there = [SourceFile(name, self._sizes[name], "") for name in batch if self._sizes.get(name)]
        found = read_all(self._source, [(file, 0, file.size) for file in there])
        for name in batch:
            self._ready = {name: next(found)} if self._sizes.get(name) else {}
            yield name
        self._ready = {}
