"""Documents become blocks of tokens, and blocks become batches."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from svdbank.lm.libraries import import_datasets, quiet_datasets
from svdbank.lm.marks import end_of_document, marks_of
from svdbank.lm.texts import COLUMNS, STRETCH

if TYPE_CHECKING:
    from torch import Tensor


#: The label of a token that is not predicted: torch's and Transformers' own.
IGNORED = -100

#: Rows packed at a time. What does not fill a block at the end of such a batch is dropped.
_PACKED_TOGETHER = 1000

#: Part of the names of cached blocks: another one where blocks are made in another way.
_MADE = 2


def pack(documents: Any, tokenizer: Any, length: int) -> Any:
    """Blocks of ``length`` tokens from the documents laid end to end, each closed by an end-of-sequence token.

    Where the tokenizer begins a text with tokens of its own (BOS), so do each document and each block, also one that begins inside a
    document. Columns: ``input_ids`` (length,) int32; ``starts`` int32, where a document, or at 0 the rest of one, begins; ``context``,
    how many tokens at the head of the block are read and not predicted. What does not fill a last block is dropped.
    """
    before, end = marks_of(tokenizer).before, end_of_document(tokenizer)
    mapped = hasattr(documents, "select")
    known: dict[str, Any] = {}
    if mapped:
        # datasets would pickle the tokenizer to name the cache file, which differs from run to run.
        identity = f"{documents._fingerprint} {tokenizer_digest(tokenizer)} {end} {STRETCH} {_MADE}"
        known = {"new_fingerprint": _digest(identity), "load_from_cache_file": True}
    with quiet_datasets():
        tokens = documents.map(
            _tokenise,
            batched=True,
            batch_size=100,
            remove_columns=list(COLUMNS),
            fn_kwargs={"tokenizer": tokenizer, "end": list(end)},
            **known,
        )
        if mapped:
            known["new_fingerprint"] = _digest(f"{tokens._fingerprint} {length} {before}")
        blocks = tokens.with_format("arrow").map(
            _pack_batch,
            batched=True,
            batch_size=_PACKED_TOGETHER,
            remove_columns=["document"],
            fn_kwargs={"length": length, "before": list(before)},
            **known,
        )
    return blocks.with_format(None)


def first(blocks: Any, count: int) -> Any:
    """The first ``count`` blocks as a mapped dataset, also of a stream."""
    datasets = import_datasets()
    if hasattr(blocks, "select"):
        return blocks.select(range(min(count, len(blocks))))
    return datasets.Dataset.from_list(list(itertools.islice(blocks, count)))


@dataclass(frozen=True)
class Collator:
    """Makes batches of blocks: ``input_ids`` and ``labels`` (rows, length) int64. Transformers shifts the labels itself.

    A label is −100 where nothing is predicted, as the ``prefix`` tokens that begin a document. With ``packing``, positions begin anew
    at each document (``position_ids``), which ends attention there too, and nothing is predicted from the document before.
    """

    prefix: int
    packing: bool = False

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        import torch

        tokens = torch.tensor([row["input_ids"] for row in rows], dtype=torch.int64)
        labels = tokens.clone()
        positions = torch.arange(tokens.shape[1]).repeat(len(rows), 1)
        for row, own, places in zip(rows, labels, positions, strict=True):
            own[: row["context"]] = IGNORED
            for start in row["starts"][1:]:
                own[start : start + max(self.prefix, int(self.packing))] = IGNORED
                places[start:] = torch.arange(len(places) - start)
        batch = {"input_ids": tokens, "labels": labels}
        return batch | {"position_ids": positions} if self.packing else batch


def tokenizer_digest(tokenizer: Any) -> str:
    """Hash over what a tokenizer does: its own serialisation, or its vocabulary where it has none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return _digest(text)


def _tokenise(rows: dict[str, list[Any]], *, tokenizer: Any, end: list[int]) -> dict[str, list[Any]]:
    pieces, begins, ends = [], [], []
    for text, first_part, last_part in zip(rows["text"], rows["begins"], rows["ends"], strict=True):
        if text and not text.isspace():
            cuts = [text[i : i + STRETCH] for i in range(0, len(text), STRETCH)]
            pieces += cuts
            begins += [bool(first_part)] + [False] * (len(cuts) - 1)
            ends += [False] * (len(cuts) - 1) + [bool(last_part)]
    if not pieces:
        return {"input_ids": [], "document": []}
    encoded = tokenizer(pieces, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return {
        "input_ids": [[*ids, *(end if stop else ())] for ids, stop in zip(encoded, ends, strict=True)],
        "document": begins,
    }


def _pack_batch(table: Any, *, length: int, before: list[int]) -> Any:
    import numpy
    import pyarrow
    import pyarrow.compute

    rows = table["input_ids"].combine_chunks()
    tokens = pyarrow.compute.list_flatten(rows).to_numpy(zero_copy_only=False).astype(numpy.int32)
    sizes = pyarrow.compute.list_value_length(rows).to_numpy(zero_copy_only=False)
    begins = table["document"].combine_chunks().to_numpy(zero_copy_only=False)
    heads = numpy.unique((numpy.cumsum(sizes) - sizes)[begins])
    blocks = list(_cut(tokens, heads, length, numpy.array(before, dtype=numpy.int32)))
    return pyarrow.table(
        {
            "input_ids": pyarrow.array([ids for ids, _, _ in blocks], pyarrow.list_(pyarrow.int32())),
            "starts": pyarrow.array([starts for _, starts, _ in blocks], pyarrow.list_(pyarrow.int32())),
            "context": pyarrow.array([context for _, _, context in blocks], pyarrow.int32()),
        }
    )


def _cut(tokens: Any, heads: Any, length: int, before: Any) -> Iterator[tuple[Any, list[int], int]]:
    """(tokens, starts, context) of each block, from documents end to end of which one begins at each of ``heads``."""
    import numpy

    at, following = 0, int(numpy.searchsorted(heads, 0))
    while True:
        fresh = following < len(heads) and heads[following] == at
        parts, starts, filled = [before], [0], len(before)
        following += fresh
        while filled < length and at < len(tokens):
            stop = int(heads[following]) if following < len(heads) else len(tokens)
            taken = min(stop - at, length - filled)
            parts.append(tokens[at : at + taken])
            at, filled = at + taken, filled + taken
            if at == stop < len(tokens) and filled < length:
                starts.append(filled)
                # A block that has room for no more than BOS ends with it; the document then begins the next one.
                parts.append(before[: length - filled])
                filled += len(parts[-1])
                following += filled < length
        if filled < length:
            return
        yield numpy.concatenate(parts), starts, max(1, len(before) + (not fresh))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
