"""Blocks and windows begin with what the tokenizer begins a text with, and no token of a document is counted twice."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from svdbank.core.errors import OptionError
from svdbank.lm.blocks import Collator, pack
from svdbank.lm.marks import Marks, end_of_document, marks_of, missing_bos
from svdbank.lm.measuring import padded, row_losses
from svdbank.lm.windows import Window, sample, windows

TEXTS = [
    f"{name} grants the licence number {i} to {'all of ' * (i % 7)}the public.\n" * (1 + i % 3)
    for i, name in enumerate("abcdefgh")
]
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]


def tokenizer(single: str | None = None, **options: Any) -> Any:
    """A small BPE whose post-processor is the template ``single``."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    )
    if single is not None:
        made.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[(name, i) for i, name in enumerate(SPECIAL)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, **{"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"} | options
    )


def gemma(**options: Any) -> Any:
    from transformers import GemmaTokenizer

    letters = sorted({*"".join(TEXTS)} - {" "} | {"▁"})
    return GemmaTokenizer(vocab={token: i for i, token in enumerate([*SPECIAL, *letters])}, merges=[], **options)


def byte_level(name: str) -> Any:
    """Written in Python, without the library ``tokenizers``."""
    import transformers

    return getattr(transformers, name)()


@pytest.mark.parametrize(
    ("made", "marks", "missing"),
    [
        (lambda: tokenizer(), Marks((), ()), 2),
        (lambda: tokenizer(bos_token=None), Marks((), ()), None),
        (lambda: tokenizer("<bos> $A"), Marks((2,), ()), None),
        (lambda: tokenizer("<bos> $A <eos>"), Marks((2,), (1,)), None),
        (lambda: tokenizer("$A <eos>"), Marks((), (1,)), 2),
        (lambda: tokenizer("<eos> $A", bos_token="<eos>"), Marks((1,), ()), None),  # OPT: one token is both
        (lambda: tokenizer("$A <eos>", bos_token="<eos>"), Marks((), (1,)), 1),
        (lambda: tokenizer("<mask> <bos> $A"), Marks((4, 2), ()), None),  # GLM: two tokens
        (lambda: gemma(add_bos_token=True), Marks((2,), ()), None),
        (lambda: gemma(add_bos_token=False), Marks((), ()), 2),
        (lambda: gemma(add_bos_token=True, add_eos_token=True), Marks((2,), (1,)), None),
        (lambda: byte_level("ByT5Tokenizer"), Marks((), (1,)), None),
        (lambda: byte_level("PerceiverTokenizer"), Marks((4,), (5,)), None),
    ],
    ids=[
        "none", "no-bos-at-all", "bos", "bos-and-eos", "eos", "bos-is-eos-before", "bos-is-eos-after", "two", "gemma",
        "gemma-without", "gemma-both", "slow-eos", "slow-both",
    ],
)  # fmt: skip
def test_the_tokenizer_is_asked_what_it_adds(made: Any, marks: Marks, missing: int | None) -> None:
    asked = made()
    assert marks_of(asked) == marks
    assert missing_bos(asked) == missing
    text = TEXTS[3]
    assert asked(text)["input_ids"] == [*marks.before, *asked(text, add_special_tokens=False)["input_ids"], *marks.after]


def test_a_tokenizer_without_an_end_cannot_close_a_document() -> None:
    assert end_of_document(tokenizer("<bos> $A <eos>", eos_token=None)) == (1,)
    with pytest.raises(OptionError, match="no end-of-sequence token"):
        end_of_document(tokenizer("<bos> $A", eos_token=None))


KINDS = {"none": None, "bos": "<bos> $A", "bos and eos": "<bos> $A <eos>", "two": "<mask> <bos> $A"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [6, 17, 64])
def test_every_token_of_a_document_is_predicted_once_after_the_tokenizer_s_own_beginning(kind: str, length: int) -> None:
    asked = tokenizer(KINDS[kind])
    before = list(marks_of(asked).before)
    found = list(windows(TEXTS, asked, length))
    for document, text in enumerate(TEXTS):
        ids = asked(text, add_special_tokens=False)["input_ids"]
        own = [window for window in found if window.document == document]
        predicted = [window.tokens[window.context :] for window in own]
        assert list(itertools.chain.from_iterable(predicted)) == ids[0 if before else 1 :]
        assert [window.ends for window in own] == [False] * (len(own) - 1) + [True]
        assert own[0].tokens[: own[0].context] == (before or ids[:1])
        for one, other in itertools.pairwise(own):
            assert other.tokens[: other.context] == [*before, one.tokens[-1]], "one token of context, after BOS"
        assert all(len(window.tokens) == length for window in own[:-1]) and len(own[-1].tokens) <= length
    assert sum(window.predicted for window in windows(TEXTS, asked, length, 50)) == 50


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [6, 17, 64])
def test_every_block_begins_with_bos_and_holds_each_token_once(kind: str, length: int) -> None:
    import datasets

    asked = tokenizer(KINDS[kind])
    before, end = list(marks_of(asked).before), list(end_of_document(asked))
    rows = {"text": TEXTS, "begins": [True] * len(TEXTS), "ends": [True] * len(TEXTS)}
    blocks = list(pack(datasets.Dataset.from_dict(rows), asked, length))
    assert all(len(block["input_ids"]) == length and block["input_ids"][: len(before)] == before for block in blocks)

    bodies = [[*asked(text, add_special_tokens=False)["input_ids"], *end] for text in TEXTS]
    laid = list(itertools.chain.from_iterable(bodies))
    heads = {0, *itertools.accumulate(map(len, bodies))}
    seen: list[int] = []
    collate = Collator(len(before))
    for block in blocks:
        labels = collate([block])["labels"][0].tolist()
        fresh = len(seen) in heads
        assert block["context"] == max(1, len(before) + (not fresh))
        pieces = [*block["starts"], length]
        assert pieces[0] == 0
        for i, (start, stop) in enumerate(itertools.pairwise(pieces)):
            marked = block["input_ids"][start : start + len(before)]
            assert marked == before[: len(marked)] and (i == 0 or len(seen) in heads)
            seen += block["input_ids"][start + len(before) : stop]
            assert set(labels[start : start + len(before)]) <= {-100}, "BOS is given, never predicted"
        predicted = [label for label in labels[1:] if label != -100]
        marks = sum(min(len(before), length - start) for start in block["starts"])
        assert len(predicted) == length - marks - (not before or not fresh)
    assert seen == laid[: len(seen)] and len(laid) - len(seen) < length


def test_packing_begins_positions_anew_and_predicts_nothing_across_documents() -> None:
    block = {"input_ids": [5, 6, 1, 7, 8, 1, 9], "starts": [0, 3, 6], "context": 1}
    plain, packed = Collator(0)([block]), Collator(0, packing=True)([block])
    assert "position_ids" not in plain and plain["labels"].tolist() == [[-100, 6, 1, 7, 8, 1, 9]]
    assert packed["position_ids"].tolist() == [[0, 1, 2, 0, 1, 2, 0]]
    assert packed["labels"].tolist() == [[-100, 6, 1, -100, 8, 1, -100]]
    begun = {"input_ids": [2, 6, 1, 2, 8, 1, 2], "starts": [0, 3, 6], "context": 2}
    assert Collator(1, packing=True)([begun])["labels"].tolist() == [[-100, -100, 1, -100, 8, 1, -100]]


def test_the_loss_of_a_window_counts_what_is_predicted_and_nothing_else() -> None:
    rows = [Window([2, 5, 6, 7], True, 2), Window([2, 8], True)]
    inputs = padded(rows)
    assert inputs["labels"].tolist() == [[-100, -100, 6, 7], [-100, 8, -100, -100]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    logits = torch.randn(2, 4, 10, generator=torch.Generator().manual_seed(0))
    surprise = -logits.log_softmax(-1)
    wanted = [surprise[0, 1, 6] + surprise[0, 2, 7], surprise[1, 0, 8]]
    assert row_losses(logits, inputs["labels"]).tolist() == pytest.approx([float(value) for value in wanted], rel=1e-6)


def test_a_sample_is_all_of_a_small_text_and_a_drawn_part_of_a_large_one() -> None:
    import datasets

    asked = tokenizer("<bos> $A")
    documents = datasets.Dataset.from_dict({"text": [*TEXTS, " \n"]})
    everything = sample(documents, asked, 16, blocks=1000, seed=0)
    assert sum(window.predicted for window in everything) == sum(window.predicted for window in windows(TEXTS, asked, 16))
    part = sample(documents, asked, 16, blocks=5, seed=0)
    assert 4 * 16 < sum(window.predicted for window in part) <= 5 * 16
    assert part == sample(documents, asked, 16, blocks=5, seed=0) != sample(documents, asked, 16, blocks=5, seed=1)
    assert len({window.document for window in part}) > 1
