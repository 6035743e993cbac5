"""A bank that lies elsewhere, read by chunks: each is checked against the index, kept on this disk, and asked for once."""

from __future__ import annotations

import contextlib
import hashlib
import struct
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from shlex import quote

import google_crc32c

from svdbank.bank.chunks import checked_crc, crc_before
from svdbank.bank.files import Range
from svdbank.bank.index import data_files, parse_manifest, read_index
from svdbank.bank.layout import CRC_BYTES, INDEX_ENTRY, MANIFEST, FileRecord, Index, Manifest
from svdbank.bank.parts import Parts, remember, remembered
from svdbank.bank.reading import Bank
from svdbank.bank.sources import HubSource, OfflineError, Part, Source, StoreSource, read_all
from svdbank.core.errors import BankError, BankNotFoundError, DamageError
from svdbank.core.places import InStore, OnHub
from svdbank.core.specs import SourceFile

#: Two parts of a file become one request where the gap between them is at most this share of what is asked for: so gaps cost little.
_GAP = 1 / 16

#: Chunks of the largest table that is made here: an index may claim shapes without an end.
_LARGEST_TABLE = 1 << 20

#: Bytes of a manifest: it lists the plans, not the weights.
_MANIFEST_BYTES = 64 << 20


class Afar:
    """The files of a bank elsewhere, as they are recorded (:class:`svdbank.bank.files.Files`); what is read is kept in ``parts``.

    ``strict``: what cannot be kept is an OSError. Else a lookup goes on without.
    """

    def __init__(self, source: Source, parts: Parts, manifest: Manifest, data: bytes, *, strict: bool = False) -> None:
        self.source = source
        self.parts = parts
        self.strict = strict
        self.manifest = data
        self.records: dict[str, FileRecord] = dict(manifest.files)

    @property
    def place(self) -> str:
        return self.source.place

    def know(self, index: Index) -> None:
        """Take the records of the index, without which nothing but the index is read."""
        for family in index.families:
            self.records.update(family.metadata)
            self.records.update(data_files(family))

    def size(self, name: str) -> int:
        """As recorded: the size that the place has is compared with each answer."""
        return len(self.manifest) if name == MANIFEST else self._record(name).size

    def held(self) -> Iterator[tuple[str, int, list[str]]]:
        """Of each file of which something is on this disk, its name, the bytes that are as recorded, and what is not. Asks nothing."""
        for name, record in self.records.items():
            if record.chunk_bytes:
                spans = [_span(record, number) for number in range(len(record.chunks) + 1)]
                found = [
                    (number, data) for number, data in enumerate(self.parts.read(name, spans)) if data.count(0) != len(data)
                ]
                wrong = [f"chunk {number} on this disk" for number, data in found if not _is_recorded(record, number, data)]
                size = sum(len(data) for _, data in found)
            else:
                before = len(self.parts.damaged)
                size = len(self.parts.small(record) or b"")
                wrong = ["not the bytes that were published; removed from this disk"] * (len(self.parts.damaged) - before)
            if size or wrong:
                yield name, size, wrong

    def read_many(self, ranges: Sequence[Range]) -> list[bytes]:
        """Chunks, tables of chunks and small files, checked; any other part of a file of vectors as the place has it."""
        small: dict[str, FileRecord] = {}
        spans: dict[str, set[int]] = defaultdict(set)
        other: list[Range] = []
        for name, start, stop in ranges:
            if name == MANIFEST:
                continue
            record = self._record(name)
            if not record.chunk_bytes:
                small[name] = record
            elif (numbers := _spans(record, start, stop)) is None:
                other.append((name, start, stop))
            else:
                spans[name].update(numbers)
        whole = self._small_files(small)
        held = self._held(spans)
        raw = dict(zip(other, self._fetch([(self._file(name), start, stop) for name, start, stop in other]), strict=True))
        found: list[bytes] = []
        for name, start, stop in ranges:
            if name == MANIFEST:
                found.append(self.manifest[start:stop])
            elif name in whole:
                found.append(whole[name][start:stop])
            elif (numbers := _spans(self._record(name), start, stop)) is not None:
                found.append(b"".join(held[name, number] for number in numbers))
            else:
                found.append(raw[name, start, stop])
        return found

    def _small_files(self, wanted: dict[str, FileRecord]) -> dict[str, bytes]:
        """Whole small files, each the bytes that its record says."""
        found = {name: data for name, record in wanted.items() if (data := self.parts.small(record)) is not None}
        for again in (True, False):
            missing = [name for name in wanted if name not in found]
            fetched = self._fetch([(self._file(name), 0, wanted[name].size) for name in missing])
            for name, data in zip(missing, fetched, strict=True):
                if hashlib.sha256(data).hexdigest() == wanted[name].sha256:
                    found[name] = data
                    with self._keeping():
                        self.parts.keep_small(wanted[name], data)
                elif not again:
                    raise self._damage(f"{self.place}/{name}: not the bytes that were published")
        if not self.strict:
            self.parts.trim()
        return found

    def _held(self, wanted: dict[str, set[int]]) -> dict[tuple[str, int], bytes]:
        """Chunks and tables of files of vectors by file and number, each the one that its record says."""
        found: dict[tuple[str, int], bytes] = {}
        for name, numbers in wanted.items():
            record, ordered = self._record(name), sorted(numbers)
            if ordered[-1] == len(record.chunks) and (table := _usual_table(record)) is not None:
                found[name, ordered.pop()] = table
            for number, data in zip(ordered, self.parts.read(name, [_span(record, n) for n in ordered]), strict=True):
                if _is_recorded(record, number, data):
                    found[name, number] = data
                elif data.count(0) != len(data):  # neither a hole nor the end of what is here
                    self.parts.damaged.append(f"{name} chunk {number}")
        for again in (True, False):
            missing = [
                (name, number) for name, numbers in wanted.items() for number in sorted(numbers) if (name, number) not in found
            ]
            for name, fetched in groupby(self._fetch_spans(missing), key=itemgetter(0)):
                record, kept = self._record(name), list[tuple[int, bytes]]()
                for _, number, data in fetched:
                    if _is_recorded(record, number, data):
                        found[name, number] = data
                        kept.append((_span(record, number)[0], data))
                    elif not again:
                        what = "its table of chunks" if number == len(record.chunks) else f"chunk {number}"
                        raise self._damage(f"{self.place}/{name}: {what} is not the one recorded")
                with self._keeping():
                    self.parts.keep(name, kept)
        if wanted and not self.strict:
            self.parts.trim()
        return found

    def _fetch_spans(self, missing: Sequence[tuple[str, int]]) -> Iterator[tuple[str, int, bytes]]:
        """Chunks and tables as the place has them, neighbours in one request."""
        runs = [
            (name, self._record(name), run)
            for name, members in groupby(missing, key=itemgetter(0))
            for run in _runs([number for _, number in members])
        ]
        parts = [(self._file(name), _span(record, run[0])[0], _span(record, run[-1])[1]) for name, record, run in runs]
        for (name, record, run), data in zip(runs, self._fetch(parts), strict=True):
            first = _span(record, run[0])[0]
            for number in run:
                start, stop = _span(record, number)
                yield name, number, data[start - first : stop - first]

    def _fetch(self, parts: Sequence[Part]) -> Iterator[bytes]:
        if not parts:
            return
        try:
            yield from read_all(self.source, parts)
        except BankNotFoundError:  # the whole repository is gone
            raise
        except FileNotFoundError as cause:
            raise self._damage(f"{cause}: missing") from cause
        except OfflineError as cause:
            names = len({file.name for file, _, _ in parts})
            damaged = f"; {len(self.parts.damaged)} of what was here is damaged" if self.parts.damaged else ""
            raise OfflineError(
                f"{self.place}: {len(parts)} parts of {names} files are not on this disk, first of {parts[0][0].name}, "
                f"and HF_HUB_OFFLINE forbids fetching them{damaged}",
                hint=f"once, with a connection: HF_HUB_OFFLINE=0 svdbank pull {quote(self.place)}",
            ) from cause

    def _keeping(self) -> contextlib.AbstractContextManager[None]:
        """Where the disk does not take what was read, a lookup goes on without it."""
        return contextlib.nullcontext() if self.strict else contextlib.suppress(OSError)

    def _file(self, name: str) -> SourceFile:
        record = self._record(name)
        return SourceFile(name, record.size, record.sha256)

    def _record(self, name: str) -> FileRecord:
        try:
            return self.records[name]
        except KeyError:
            raise FileNotFoundError(f"{self.place}/{name}") from None

    def _damage(self, text: str) -> DamageError:
        return DamageError(
            text, hint=f"svdbank pull {quote(self.place)} looks at what is there now; svdbank verify {quote(self.place)}"
        )


def open_afar(named: OnHub | InStore, home: Path, limit: int, *, anew: bool = False, strict: bool = False) -> Bank:
    """Open a bank elsewhere; parts are kept below ``home``, at most ``limit`` bytes of them.

    What an address meant when it was last looked at it means until it is looked at ``anew``: then nothing is asked of any network until
    something is read that is not here. ``strict``: see :class:`Afar`.

    Raises BankNotFoundError where there is no bank, DamageError for a manifest or an index that is
    not what was published, :class:`~svdbank.core.errors.BankError` where the place cannot be reached.
    """
    address = f"hf://{named}" if isinstance(named, OnHub) else named.address
    before = None if anew else remembered(home, address)
    if before is not None:
        place, digest = before
        source = _source(named, place)
        parts = Parts(home / digest[:32], limit)
        data = parts.manifest()
        if data is not None and (manifest := _as_published(data, digest)) is not None:
            return _opened(source, parts, manifest, data, strict)
    else:
        source = _source(named, None)
    try:
        data = source.whole(MANIFEST, _MANIFEST_BYTES)
    except BankNotFoundError:
        raise
    except FileNotFoundError as cause:
        shown = source.place
        is_model = isinstance(named, OnHub) and _has(source, "config.json")
        raise BankNotFoundError(
            f"{shown}: {'a model, and ' if is_model else ''}no bank there (it has no {MANIFEST})",
            hint=f"svdbank build {named}" if is_model else "check the spelling",
        ) from cause
    manifest = parse_manifest(data, source.place)
    parts = Parts(home / manifest.digest[:32], limit)
    parts.begin(source.place, data, manifest.digest)
    remember(home, address, source.place, manifest.digest)
    if isinstance(named, OnHub):
        remember(home, source.place, source.place, manifest.digest)
    return _opened(source, parts, manifest, data, strict)


def _opened(source: Source, parts: Parts, manifest: Manifest, data: bytes, strict: bool) -> Bank:
    files = Afar(source, parts, manifest, data, strict=strict)
    index = read_index(files, manifest)
    files.know(index)
    return Bank(files, manifest, index)


def _source(named: OnHub | InStore, place: str | None) -> Source:
    if isinstance(named, InStore):
        return StoreSource(named)
    return HubSource(named, None if place is None else place.rpartition("@")[2])


def _has(source: Source, name: str) -> bool:
    """Whether there is a small file of this name."""
    try:
        source.whole(name, _MANIFEST_BYTES)
    except (BankError, OSError):
        return False
    return True


def _as_published(data: bytes, digest: str) -> Manifest | None:
    """The manifest of this digest, or None where these bytes are not it."""
    try:
        manifest = parse_manifest(data, "")
    except DamageError:
        return None
    return manifest if manifest.digest == digest else None


def _span(record: FileRecord, number: int) -> tuple[int, int]:
    """Where a chunk lies in its file; the number behind the last one is the table of chunks."""
    start = number * record.chunk_bytes
    return start, record.size if number == len(record.chunks) else start + record.chunk_bytes


def _spans(record: FileRecord, start: int, stop: int) -> range | None:
    """The numbers of the chunks that a part of a file consists of, or of its table; None for any other part."""
    chunks = len(record.chunks) * record.chunk_bytes
    if (start, stop) == (chunks, record.size):
        return range(len(record.chunks), len(record.chunks) + 1)
    if start % record.chunk_bytes or stop % record.chunk_bytes or not start < stop <= chunks:
        return None
    return range(start // record.chunk_bytes, stop // record.chunk_bytes)


def _is_recorded(record: FileRecord, number: int, data: bytes) -> bool:
    """True for the chunk, or the table, that is recorded with this number, its checksum behind it."""
    start, stop = _span(record, number)
    crc = record.index_crc32c if number == len(record.chunks) else record.chunks[number]
    return len(data) == stop - start and crc_before(data, len(data)) == crc and checked_crc(data) == crc


def _usual_table(record: FileRecord) -> bytes | None:
    """The table of chunks of a file whose chunks lie in order and fill it, where that is the one recorded: then nothing need be read."""
    entries = (record.size - len(record.chunks) * record.chunk_bytes - CRC_BYTES) // INDEX_ENTRY
    if entries > _LARGEST_TABLE:
        return None
    pairs = [number for place in range(len(record.chunks)) for number in (place * record.chunk_bytes, record.chunk_bytes)]
    pairs += [2**64 - 1] * (2 * entries - len(pairs))
    table = struct.pack(f"<{len(pairs)}Q", *pairs)
    table += google_crc32c.value(table).to_bytes(CRC_BYTES, "little")
    return table if checked_crc(table) == record.index_crc32c else None


def _runs(places: Sequence[int]) -> Iterator[list[int]]:
    """Ascending numbers as runs that one request asks for: gaps only where they are small beside what is wanted."""
    run: list[int] = []
    gaps = 0
    for place in places:
        gap = place - run[-1] - 1 if run else 0
        if run and gaps + gap > _GAP * (len(run) + 1):
            yield run
            run, gaps, gap = [], 0, 0
        run.append(place)
        gaps += gap
    if run:
        yield run
