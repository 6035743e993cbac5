"""Text for training and measuring: files, folders and Hub datasets become documents, documents become blocks of tokens.

``datasets`` reads, caches and streams. A *document* is one row of a table or one text file; a long text file is cut at line ends into
stretches of up to 64 Ki characters, and each stretch counts as a document when some are held out.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svdbank.core.errors import CheckpointError, OptionError, SvdbankError, missing_extra

if TYPE_CHECKING:
    from torch import Tensor

#: Characters a text is cut at: bounds the memory of reading, tokenising and packing.
STRETCH = 64 * 1024

#: Rows packed at a time. What does not fill a block at the end of such a batch is dropped.
_PACKED_TOGETHER = 1000

_COLUMNS = {"text": "string", "begins": "bool", "ends": "bool"}
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
    datasets = _datasets()
    if not sources:
        raise OptionError("no text was named", hint="--data FILE")
    with quiet_datasets(), explained(sources):
        parts = [part for source in sources for part in _parts(datasets, source, field, split, streaming)]
        return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


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


def pack(documents: Any, tokenizer: Any, length: int) -> Any:
    """Blocks ``input_ids`` (length,) int32 from the documents laid end to end, each closed by the tokenizer's end-of-sequence token.

    Where the tokenizer begins a text with a token of its own (BOS), so does each document. What does not fill a last block is dropped.
    """
    prefix, end = document_marks(tokenizer)
    mapped = hasattr(documents, "select")
    known: dict[str, Any] = {}
    if mapped:
        # datasets would pickle the tokenizer to name the cache file, which differs from run to run.
        identity = f"{documents._fingerprint} {tokenizer_digest(tokenizer)} {prefix} {end} {STRETCH}"
        known = {"new_fingerprint": _digest(identity), "load_from_cache_file": True}
    with quiet_datasets():
        tokens = documents.map(
            _tokenise,
            batched=True,
            batch_size=100,
            remove_columns=list(_COLUMNS),
            fn_kwargs={"tokenizer": tokenizer, "prefix": prefix, "end": end},
            **known,
        )
        if mapped:
            known["new_fingerprint"] = _digest(f"{tokens._fingerprint} {length}")
        blocks = tokens.with_format("arrow").map(
            _pack_batch, batched=True, batch_size=_PACKED_TOGETHER, fn_kwargs={"length": length}, **known
        )
    return blocks.with_format(None)


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Blocks as a batch: ``input_ids`` and ``labels`` (rows, length) int64. Transformers shifts the labels itself."""
    import torch

    tokens = torch.tensor([row["input_ids"] for row in rows], dtype=torch.int64)
    return {"input_ids": tokens, "labels": tokens.clone()}


def documents_of(source: str, *, field: str = "text", split: str = "train") -> Iterator[str]:
    """The texts of one source one by one, holding no more than a stretch; rows of a table whole."""
    with explained([source]):
        for row in read_documents([source], field=field, split=split, streaming=True):
            if row["text"] and not row["text"].isspace():
                yield row["text"]


def tokenizer_digest(tokenizer: Any) -> str:
    """Hash over what a tokenizer does: its own serialisation, or its vocabulary where it has none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return _digest(text)


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
        with Path(name).open(encoding="utf-8", errors="strict") as file:
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
            f"{name}: not UTF-8 text ({cause.reason} at byte {cause.start})", hint="convert it: iconv -f latin1 -t utf-8"
        ) from cause


def _from_hub(datasets: Any, source: str, split: str, streaming: bool) -> Any:
    found = _HUB.fullmatch(source)
    if found is None or Path(source).suffix.lower() in {*_TABLES, ".txt", ".md"}:
        raise OptionError(
            f"{source}: no such file or folder, and not a dataset of the Hub", hint="check the path, or write org/name[:config]"
        )
    name, config, revision = found.groups()
    try:
        return datasets.load_dataset(name, config, split=split, revision=revision, streaming=streaming)
    except Exception as cause:
        raise CheckpointError(
            f"{source}: neither a file here nor a dataset that the Hub gives: {_first_line(cause)}",
            hint="check the path or the name; HF_TOKEN for a private dataset; org/name:config where it has several",
        ) from cause


def _column(dataset: Any, field: str, source: str) -> Any:
    """The column of text of a table, named ``text``; each row is a whole document."""
    datasets = _datasets()
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
    return datasets.Features({name: datasets.Value(kind) for name, kind in _COLUMNS.items()})


def _whole(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
    true = [True] * len(rows["text"])
    return {"text": rows["text"], "begins": true, "ends": true}


def _cut_in_two(text: str, share: float) -> tuple[Any, Any]:
    """One document alone: its end is held out, from the line end nearest below the share."""
    datasets = _datasets()
    place = text.rfind("\n", 0, round(len(text) * (1 - share))) + 1
    place = place or round(len(text) * (1 - share))
    halves = (text[:place], text[place:])
    return tuple(datasets.Dataset.from_dict({"text": [half], "begins": [True], "ends": [True]}) for half in halves)


def _hash(text: str | None, seed: int) -> int:
    """63 bits of the text and the seed; −1 for a text with nothing in it."""
    if not text or text.isspace():
        return -1
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, key=str(seed).encode()).digest(), "big")


def _tokenise(rows: dict[str, list[Any]], *, tokenizer: Any, prefix: list[int], end: int) -> dict[str, list[list[int]]]:
    pieces, begins, ends = [], [], []
    for text, first_part, last_part in zip(rows["text"], rows["begins"], rows["ends"], strict=True):
        if text and not text.isspace():
            cuts = [text[i : i + STRETCH] for i in range(0, len(text), STRETCH)]
            pieces += cuts
            begins += [bool(first_part)] + [False] * (len(cuts) - 1)
            ends += [False] * (len(cuts) - 1) + [bool(last_part)]
    if not pieces:
        return {"input_ids": []}
    encoded = tokenizer(pieces, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return {
        "input_ids": [
            [*(prefix if begin else ()), *ids, *([end] if stop else ())]
            for begin, ids, stop in zip(begins, encoded, ends, strict=True)
        ]
    }


def _pack_batch(table: Any, *, length: int) -> Any:
    import numpy
    import pyarrow
    import pyarrow.compute

    tokens = pyarrow.compute.list_flatten(table["input_ids"].combine_chunks()).to_numpy(zero_copy_only=False)
    count = len(tokens) // length
    offsets = numpy.arange(0, (count + 1) * length, length, dtype=numpy.int32)
    values = pyarrow.array(tokens[: count * length].astype(numpy.int32))
    return pyarrow.table({"input_ids": pyarrow.ListArray.from_arrays(offsets, values)})


def document_marks(tokenizer: Any) -> tuple[list[int], int]:
    """Tokens before a document, and the one after it. Raises :class:`OptionError` for a tokenizer without an end of sequence."""
    end = tokenizer.eos_token_id
    if end is None:
        raise OptionError(
            "the model's tokenizer has no end-of-sequence token to put between documents",
            hint="name one as eos_token in the model's tokenizer_config.json",
        )
    before = list(tokenizer("")["input_ids"])
    while before and before[-1] == end and end != tokenizer.bos_token_id:
        before.pop()
    return before, int(end)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


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
            f"{', '.join(sources)}: cannot be read: {_first_line(causes[-1])}",
            hint="every row of a table needs the same columns; look at the file, or name another one",
        ) from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:300]


@contextlib.contextmanager
def quiet_datasets() -> Iterator[None]:
    """Without the bars of ``datasets``: progress goes to our callback."""
    datasets = _datasets()
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def first(blocks: Any, count: int) -> Any:
    """The first ``count`` blocks as a mapped dataset, also of a stream."""
    datasets = _datasets()
    if hasattr(blocks, "select"):
        return blocks.select(range(min(count, len(blocks))))
    return datasets.Dataset.from_list(list(itertools.islice(blocks, count)))


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as cause:
        raise missing_extra("datasets", "peft") from cause
    return datasets
