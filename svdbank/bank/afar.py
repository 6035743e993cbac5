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
from svdbank.core.errors import BankNotFoundError, DamageError
from svdbank.core.places import InStore, OnHub
from svdbank.core.specs import SourceFile

#: Two parts of a file become one request where the gap between them is at most this share of what is asked for: so gaps cost little.
_GAP = 1 / 16

#: Bytes of a manifest: it lists the plans, not the weights.
_MANIFEST_BYTES = 64 << 20


class Afar:
    """The files of a bank elsewhere, as they are recorded (:class:`svdbank.bank.files.Files`); what is read is kept in ``parts``."""

    def __init__(self, source: Source, parts: Parts, manifest: Manifest, data: bytes) -> None:
        self.source = source
        self.parts = parts
        self._manifest = data
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
        if name == MANIFEST:
            return len(self._manifest)
        return self._record(name).size

    def read_many(self, ranges: Sequence[Range]) -> list[bytes]:
        """Chunks, tables of chunks and small files, checked; any other part of a file of vectors as the place has it."""
        return self._read(ranges, keeping=False)

    def bring(self, ranges: Sequence[Range]) -> int:
        """Have these parts on this disk, or raise: OSError where they cannot be kept. Returns their bytes."""
        return sum(len(data) for data in self._read(ranges, keeping=True))

    def _read(self, ranges: Sequence[Range], *, keeping: bool) -> list[bytes]:
        found: dict[Range, bytes] = {}
        wanted: dict[str, FileRecord] = {}  # small files
        chunks: dict[str, set[int]] = defaultdict(set)  # of vectors, by number in the file
        other: list[Range] = []
        for name, start, stop in ranges:
            if name == MANIFEST:
                found[name, start, stop] = self._manifest[start:stop]
                continue
            record = self._record(name)
            if not record.chunk_bytes:
                wanted[name] = record
            elif (start, stop) == (len(record.chunks) * record.chunk_bytes, record.size):
                table = _usual_table(record)
                if table is None:
                    other.append((name, start, stop))
                else:
                    found[name, start, stop] = table
            elif start % record.chunk_bytes or stop % record.chunk_bytes or stop > len(record.chunks) * record.chunk_bytes:
                other.append((name, start, stop))
            else:
                chunks[name].update(range(start // record.chunk_bytes, stop // record.chunk_bytes))
        whole = self._small_files(wanted, keeping=keeping)
        held = self._chunks(chunks, keeping=keeping)
        found.update(zip(other, self._fetch([(self._file(name), start, stop) for name, start, stop in other]), strict=True))
        return [self._part(part, found, whole, held) for part in ranges]

    def _part(
        self, part: Range, found: dict[Range, bytes], whole: dict[str, bytes], held: dict[tuple[str, int], bytes]
    ) -> bytes:
        name, start, stop = part
        if part in found:
            return found[part]
        if name in whole:
            return whole[name][start:stop]
        each = self._record(name).chunk_bytes
        return b"".join(held[name, place] for place in range(start // each, stop // each))

    def _small_files(self, wanted: dict[str, FileRecord], *, keeping: bool) -> dict[str, bytes]:
        """Whole small files, each the bytes that its record says."""
        found = {name: data for name, record in wanted.items() if (data := self.parts.small(record)) is not None}
        for again in (True, False):
            missing = [name for name in wanted if name not in found]
            fetched = self._fetch([(self._file(name), 0, wanted[name].size) for name in missing])
            for name, data in zip(missing, fetched, strict=True):
                if hashlib.sha256(data).hexdigest() == wanted[name].sha256:
                    found[name] = data
                    self._keep(keeping, lambda record=wanted[name], data=data: self.parts.keep_small(record, data))
                elif not again:
                    raise self._damage(f"{self.place}/{name}: not the bytes that were published")
        return found

    def _chunks(self, wanted: dict[str, set[int]], *, keeping: bool) -> dict[tuple[str, int], bytes]:
        """Chunks by file and number, each the one that its record says."""
        found: dict[tuple[str, int], bytes] = {}
        for name, places in wanted.items():
            record, ordered = self._record(name), sorted(places)
            each = record.chunk_bytes
            for place, data in zip(ordered, self.parts.read(name, [(p * each, (p + 1) * each) for p in ordered]), strict=True):
                if _is_chunk(data, record.chunks[place]):
                    found[name, place] = data
                elif any(data):  # neither a hole nor the end of what is here
                    self.parts.damaged.append(f"{name} chunk {place}")
        for again in (True, False):
            missing = [
                (name, place) for name, places in wanted.items() for place in sorted(places) if (name, place) not in found
            ]
            for name, fetched in groupby(self._fetch_chunks(missing), key=itemgetter(0)):
                record, kept = self._record(name), list[tuple[int, bytes]]()
                for _, place, data in fetched:
                    if _is_chunk(data, record.chunks[place]):
                        found[name, place] = data
                        kept.append((place * record.chunk_bytes, data))
                    elif not again:
                        raise self._damage(f"{self.place}/{name}: chunk {place} is not the one recorded")
                if kept:
                    self._keep(keeping, lambda name=name, kept=kept: self.parts.keep(name, kept))
        if not keeping:
            self.parts.trim()
        return found

    def _fetch_chunks(self, missing: Sequence[tuple[str, int]]) -> Iterator[tuple[str, int, bytes]]:
        """Chunks as the place has them, neighbours in one request."""
        runs = [
            (name, run)
            for name, members in groupby(missing, key=itemgetter(0))
            for run in _runs([place for _, place in members])
        ]
        parts = []
        for name, run in runs:
            each = self._record(name).chunk_bytes
            parts.append((self._file(name), run[0] * each, (run[-1] + 1) * each))
        for (name, run), data in zip(runs, self._fetch(parts), strict=True):
            each = self._record(name).chunk_bytes
            for place in run:
                yield name, place, data[(place - run[0]) * each : (place - run[0] + 1) * each]

    def _fetch(self, parts: Sequence[Part]) -> Iterator[bytes]:
        if not parts:
            return
        try:
            yield from read_all(self.source, parts)
        except FileNotFoundError as cause:
            raise self._damage(f"{cause}: missing") from cause
        except OfflineError as cause:
            names = len({file.name for file, _, _ in parts})
            damaged = f"; {len(self.parts.damaged)} of what was here is damaged" if self.parts.damaged else ""
            raise OfflineError(
                f"{self.place}: {len(parts)} parts of {names} files are not on this disk, first of {parts[0][0].name}, "
                f"and HF_HUB_OFFLINE forbids fetching them{damaged}",
                hint=f"once, with a connection: HF_HUB_OFFLINE=0 svdbank pull {quote(self.place)} --rank RANK",
            ) from cause

    def _keep(self, keeping: bool, keep: object) -> None:
        """Keep something; where the disk does not take it, a lookup goes on without, and a pull does not."""
        with contextlib.nullcontext() if keeping else contextlib.suppress(OSError):
            keep()  # type: ignore[operator]

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


def open_afar(named: OnHub | InStore, home: Path, limit: int, *, anew: bool = False) -> Bank:
    """Open a bank elsewhere; parts are kept below ``home``, at most ``limit`` bytes of them.

    What an address meant when it was last looked at it means until it is looked at ``anew``: then nothing is asked of any network until
    something is read that is not here. Raises BankNotFoundError where there is no bank, DamageError for a manifest or an index that is
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
            return _opened(source, parts, manifest, data)
    else:
        source = _source(named, None)
    try:
        data = source.whole(MANIFEST, _MANIFEST_BYTES)
    except FileNotFoundError as cause:
        raise BankNotFoundError(
            f"{source.place}: no bank there (it has no {MANIFEST})",
            hint=f"svdbank build {named.repository}" if isinstance(named, OnHub) else None,
        ) from cause
    manifest = parse_manifest(data, source.place)
    parts = Parts(home / manifest.digest[:32], limit)
    parts.begin(source.place, data, manifest.digest)
    remember(home, address, source.place, manifest.digest)
    if isinstance(named, OnHub):
        remember(home, source.place, source.place, manifest.digest)
    return _opened(source, parts, manifest, data)


def _opened(source: Source, parts: Parts, manifest: Manifest, data: bytes) -> Bank:
    files = Afar(source, parts, manifest, data)
    index = read_index(files, manifest)
    files.know(index)
    return Bank(files, manifest, index)


def _source(named: OnHub | InStore, place: str | None) -> Source:
    if isinstance(named, InStore):
        return StoreSource(named)
    return HubSource(named, None if place is None else place.rpartition("@")[2])


def _as_published(data: bytes, digest: str) -> Manifest | None:
    """The manifest of this digest, or None where these bytes are not it."""
    try:
        manifest = parse_manifest(data, "")
    except DamageError:
        return None
    return manifest if manifest.digest == digest else None


def _is_chunk(data: bytes, crc: int) -> bool:
    """True for the chunk that is recorded with this crc32c, its own checksum behind it."""
    return len(data) > CRC_BYTES and crc_before(data, len(data)) == crc and google_crc32c.value(data[:-CRC_BYTES]) == crc


def _usual_table(record: FileRecord) -> bytes | None:
    """The table of chunks of a file whose chunks lie in order and fill it, where that is the one recorded: then nothing need be read."""
    entries = (record.size - len(record.chunks) * record.chunk_bytes - CRC_BYTES) // INDEX_ENTRY
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
