"""Text for training and measuring: files, folders and Hub datasets become documents.

``datasets`` reads, caches and streams. A *document* is one row of a table or one text file; a long text file is cut at line ends into
stretches of up to 64 Ki characters, and each stretch counts as a document when some are held out.
"""

from __future__ import annotations

import codecs
import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from svdbank.core.errors import CheckpointError, OptionError, SvdbankError
from svdbank.lm.libraries import first_line, import_datasets, quiet_datasets

#: Characters a text is cut at: bounds the memory of reading, tokenising and packing.
STRETCH = 64 * 1024

#: Of every row: its text, and whether a document begins and ends there.
COLUMNS = {"text": "string", "begins": "bool", "ends": "bool"}

_TABLES = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_COMPRESSED = {".gz", ".zst", ".bz2", ".xz"}
_HUB = re.compile(r"(?:hf://datasets/)?([\w.-]+/[\w.-]+)(?::([\w.-]+))?(?:@([\w./-]+))?", re.ASCII)


def read_documents(sources: Sequence[str], *, field: str = "text", split: str = "train", streaming: bool = False) -> Any:
    """Documents of all ``sources`` in order, as a ``datasets.Dataset`` (cached) or, streaming, an ``IterableDataset``.

    A source is a text file, a table (``.jsonl``, ``.json``, ``.csv``, ``.parquet``; compressed too) whose column ``field`` holds text,
    a folder of such files, or a Hub dataset ``org/name[:config][@revision]``, of which ``split`` is read. Columns: ``text`` (str),
    ``begins`` and ``ends`` (bool: a long text begins or ends here, and is not continued from or by a neighbouring row).

    Raises :class:`OptionError` for a source that is not there, holds no text or has no such column, :class:`CheckpointError` for one
    that cannot be read.
    """
    datasets = import_datasets()
    if not sources:
        raise OptionError("no text was named", hint="--data FILE")
    with quiet_datasets(), explained(sources):
        parts = [part for source in sources for part in _parts(datasets, source, field, split, streaming)]
        return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


def documents_of(source: str, *, field: str = "text", split: str = "train") -> Iterator[str]:
    """The texts of one source one by one, holding no more than a stretch; rows of a table whole."""
    with explained([source]):
        for row in read_documents([source], field=field, split=split, streaming=True):
            if row["text"] and not row["text"].isspace():
                yield row["text"]


def named_texts(data: Mapping[str, str | Path] | Sequence[str | Path]) -> dict[str, str]:
    """Texts by name; without names the file names serve. Raises :class:`OptionError` where two are the same."""
    if isinstance(data, Mapping):
        return {name: str(source) for name, source in data.items()}
    named: dict[str, str] = {}
    for source in data:
        name = Path(str(source)).name
        if name in named:
            raise OptionError(f"two texts are called {name!r}", hint="--data NAME=FILE gives them names")
        named[name] = str(source)
    return named


def check_source(source: str) -> None:
    """Refuse a source that is not there, or a file that is no text, before any library is loaded. A Hub dataset is not asked for."""
    path = Path(source).expanduser()
    with explained([source]):
        if path.is_file():
            _files(path)
        elif not path.exists():
            _hub_place(source)


def check_text(source: str, field: str, split: str) -> None:
    """Raise what reading the source raises, and :class:`OptionError` for one without text, after its first document."""
    if next(documents_of(source, field=field, split=split), None) is None:
        raise OptionError(f"{source}: holds no text", hint="look at the file, or name another --field")


@contextlib.contextmanager
def explained(sources: Sequence[str]) -> Iterator[None]:
    """What ``datasets`` raises while reading, as an error that names the source; ours come out of its wrapping."""
    try:
        yield
    except SvdbankError:
        raise
    except OSError as cause:
        raise CheckpointError(
            f"{cause.filename or ', '.join(sources)}: {cause.strerror or cause}", hint="check the path and its permissions"
        ) from cause
    except Exception as error:
        causes: list[BaseException] = [error]
        while causes[-1].__cause__ is not None:
            causes.append(causes[-1].__cause__)
        ours = next((cause for cause in causes if isinstance(cause, SvdbankError)), None)
        if ours is not None:
            raise ours from None
        raise CheckpointError(
            f"{', '.join(sources)}: cannot be read: {first_line(causes[-1])}",
            hint="every row of a table needs the same columns; look at the file, or name another one",
        ) from error


def _parts(datasets: Any, source: str, field: str, split: str, streaming: bool) -> list[Any]:
    path = Path(source).expanduser()
    if not path.exists():
        return [_column(_from_hub(datasets, source, split, streaming), field, source)]
    files = _files(path)
    tables: dict[str, list[str]] = {}
    plain: list[Path] = []
    for file in files:
        kind = _kind(file)
        if kind is None:
            plain.append(file)
        else:
            tables.setdefault(kind, []).append(str(file))
    parts = [
        _column(datasets.load_dataset(kind, data_files=names, split="train", streaming=streaming), field, source)
        for kind, names in tables.items()
    ]
    if plain:
        # Size and time are part of what names the cache: an edited file is read again.
        stated = [(str(file), stat.st_size, stat.st_mtime_ns) for file in plain for stat in (file.stat(),)]
        make = datasets.IterableDataset if streaming else datasets.Dataset
        parts.append(make.from_generator(_stretches, features=_features(datasets), gen_kwargs={"files": stated}))
    return parts


def _files(path: Path) -> list[Path]:
    """The file, or every file of text below a folder, sorted; hidden files and those with zero bytes (binaries) left out."""
    if path.is_file():
        if path.stat().st_size == 0:
            raise OptionError(f"{path}: the file is empty", hint="name text, .jsonl, .csv or .parquet")
        if _kind(path) is None and _is_binary(path):
            raise OptionError(f"{path}: not a text file", hint="name text, .jsonl, .csv or .parquet")
        return [path]
    found = [
        file
        for file in sorted(path.rglob("*"))
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts) and file.stat().st_size
    ]
    texts = [file for file in found if _kind(file) is not None or not _is_binary(file)]
    if not texts:
        raise OptionError(f"{path}: no text in this folder", hint="name a folder of text, .jsonl, .csv or .parquet files")
    return texts


def _kind(file: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return _TABLES.get(suffixes[-1]) if suffixes else None


def _is_binary(file: Path) -> bool:
    with file.open("rb") as opened:
        return b"\0" in opened.read(8192)


def _stretches(files: Sequence[tuple[str, int, int]]) -> Iterator[dict[str, Any]]:
    """Rows of text files. Runs inside ``datasets``, perhaps in another process."""
    for name, _, _ in files:
        with Path(name).open(encoding="utf-8-sig", errors="strict") as file:  # without a BOM
            ahead = _stretch(file, name)
            begins = True
            while ahead:
                text, ahead = ahead, _stretch(file, name)
                yield {"text": text, "begins": begins, "ends": not ahead}
                begins = False


def _stretch(file: Any, name: str) -> str:
    """The next characters up to a line end, or to twice the length where there is none."""
    try:
        text: str = file.read(STRETCH)
        return text if not text or text.endswith("\n") else text + file.readline(STRETCH)
    except UnicodeDecodeError as cause:
        raise CheckpointError(
            f"{name}: not UTF-8 text ({cause.reason} at byte {_undecoded(Path(name))})",
            hint="convert it: iconv -f latin1 -t utf-8",
        ) from cause


def _undecoded(file: Path) -> int:
    """Where in a file that is not UTF-8 it stops being so; a decoder that reads on counts from where it last began."""
    decoder, read = codecs.getincrementaldecoder("utf-8")(), 0
    with file.open("rb") as opened:
        while piece := opened.read(STRETCH):
            kept = len(decoder.getstate()[0])
            try:
                decoder.decode(piece)
            except UnicodeDecodeError as cause:
                return read - kept + cause.start
            read += len(piece)
    return read - len(decoder.getstate()[0])


def _hub_place(source: str) -> tuple[str, str | None, str | None]:
    """Name, configuration and revision of a dataset of the Hub."""
    found = _HUB.fullmatch(source)
    if found is None or Path(source).suffix.lower() in {*_TABLES, ".txt", ".md"}:
        raise OptionError(
            f"{source}: no such file or folder, and not a dataset of the Hub", hint="check the path, or write org/name[:config]"
        )
    return found[1], found[2], found[3]


def _from_hub(datasets: Any, source: str, split: str, streaming: bool) -> Any:
    name, config, revision = _hub_place(source)
    try:
        return datasets.load_dataset(name, config, split=split, revision=revision, streaming=streaming)
    except Exception as cause:
        raise CheckpointError(
            f"{source}: neither a file here nor a dataset that the Hub gives: {first_line(cause)}",
            hint="check the path or the name; HF_TOKEN for a private dataset; org/name:config where it has several",
        ) from cause


def _column(dataset: Any, field: str, source: str) -> Any:
    """The column of text of a table, named ``text``; each row is a whole document."""
    datasets = import_datasets()
    features: Any = (
        dataset.features or dataset._resolve_features().features
    )  # a stream may not know them before it has been read
    names = list(features)
    if field not in names:
        raise OptionError(f"{source}: no column {field!r}; there are {', '.join(names)}", hint="--field NAME")
    if getattr(features[field], "dtype", None) not in ("string", "large_string"):
        raise OptionError(f"{source}: the column {field!r} holds no text but {features[field]}", hint="--field NAME")
    chosen = dataset.select_columns([field])
    if field != "text":
        chosen = chosen.rename_column(field, "text")
    return chosen.map(_whole, batched=True, features=_features(datasets))


def _features(datasets: Any) -> Any:
    return datasets.Features({name: datasets.Value(kind) for name, kind in COLUMNS.items()})


def _whole(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
    true = [True] * len(rows["text"])
    return {"text": rows["text"], "begins": true, "ends": true}
