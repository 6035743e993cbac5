"""Documents become blocks of tokens, and blocks become batches."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from svdbank.core.errors import OptionError
from svdbank.lm.libraries import import_datasets, quiet_datasets
from svdbank.lm.texts import COLUMNS, STRETCH

if TYPE_CHECKING:
    from torch import Tensor


#: Rows packed at a time. What does not fill a block at the end of such a batch is dropped.
_PACKED_TOGETHER = 1000


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
            remove_columns=list(COLUMNS),
            fn_kwargs={"tokenizer": tokenizer, "prefix": prefix, "end": end},
            **known,
        )
        if mapped:
            known["new_fingerprint"] = _digest(f"{tokens._fingerprint} {length}")
        blocks = tokens.with_format("arrow").map(
            _pack_batch, batched=True, batch_size=_PACKED_TOGETHER, fn_kwargs={"length": length}, **known
        )
    return blocks.with_format(None)


def first(blocks: Any, count: int) -> Any:
    """The first ``count`` blocks as a mapped dataset, also of a stream."""
    datasets = import_datasets()
    if hasattr(blocks, "select"):
        return blocks.select(range(min(count, len(blocks))))
    return datasets.Dataset.from_list(list(itertools.islice(blocks, count)))


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Blocks as a batch: ``input_ids`` and ``labels`` (rows, length) int64. Transformers shifts the labels itself."""
    import torch

    tokens = torch.tensor([row["input_ids"] for row in rows], dtype=torch.int64)
    return {"input_ids": tokens, "labels": tokens.clone()}


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


def tokenizer_digest(tokenizer: Any) -> str:
    """Hash over what a tokenizer does: its own serialisation, or its vocabulary where it has none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return _digest(text)


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


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
