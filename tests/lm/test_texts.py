"""Files become documents, documents become blocks: nothing is lost, doubled or leaked."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from svdbank.core.errors import CheckpointError, OptionError
from svdbank.lm import texts
from svdbank.lm.blocks import pack
from svdbank.lm.held_out import hold_out
from svdbank.lm.texts import documents_of, read_documents
from tests.lm.models import write_jsonl


@pytest.fixture(scope="module")
def tokenizer(small: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(small)


@pytest.fixture(scope="module")
def licences() -> list[str]:
    from svdbank.lm.packaged import licence_texts

    return [text[:3000] for text in licence_texts()[:40]]


def sources(folder: Path, documents: list[str]) -> dict[str, Path]:
    """The same documents in every form that is read."""
    import pyarrow
    import pyarrow.parquet

    folder.mkdir()
    (folder / "plain").mkdir()
    for i, text in enumerate(documents):
        (folder / "plain" / f"{i:04}.txt").write_text(text, newline="")
    pyarrow.parquet.write_table(pyarrow.table({"text": documents, "n": list(range(len(documents)))}), folder / "t.parquet")
    with gzip.open(folder / "t.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"n": 1, "text": text}) + "\n" for text in documents)
    return {
        "folder": folder / "plain",
        "jsonl": write_jsonl(folder / "t.jsonl", documents),
        "parquet": folder / "t.parquet",
        "jsonl.gz": folder / "t.jsonl.gz",
    }


def test_every_form_gives_the_same_documents_mapped_and_streamed(tmp_path: Path, licences: list[str]) -> None:
    wanted = [text for text in licences[:6] if "\r" not in text]
    for name, source in sources(tmp_path / "data", wanted).items():
        for streaming in (False, True):
            found = [row["text"] for row in read_documents([str(source)], streaming=streaming)]
            assert found == wanted, (name, streaming)
        assert list(documents_of(str(source))) == wanted, name


def test_blocks_are_the_documents_end_to_end(tmp_path: Path, tokenizer: Any, licences: list[str]) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", licences)
    blocks = pack(read_documents([str(path)]), tokenizer, 64)["input_ids"]
    laid = [*itertools.chain.from_iterable([*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in licences)]
    assert [*itertools.chain.from_iterable(blocks)] == laid[: len(laid) // 64 * 64]
    assert {len(block) for block in blocks} == {64} and len(laid) // 64 == len(blocks) > 100


def test_a_long_text_is_cut_without_losing_a_character_and_closed_once(
    tmp_path: Path, tokenizer: Any, licences: list[str]
) -> None:
    text = "\n".join(licences * 2)
    assert len(text) > 2 * texts.STRETCH
    (tmp_path / "t.txt").write_text(text)
    rows = list(read_documents([str(tmp_path / "t.txt")]))
    assert "".join(row["text"] for row in rows) == text
    assert [row["begins"] for row in rows] == [True] + [False] * (len(rows) - 1)
    assert [row["ends"] for row in rows] == [False] * (len(rows) - 1) + [True]
    tokens = [*itertools.chain.from_iterable(pack(read_documents([str(tmp_path / "t.txt")]), tokenizer, 2)["input_ids"])]
    assert tokens.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(tokens) == text + tokenizer.eos_token


def test_held_out_documents_are_never_trained_on(tmp_path: Path, licences: list[str]) -> None:
    documents = read_documents([str(write_jsonl(tmp_path / "t.jsonl", licences + licences[::-1]))])
    training, held_out = hold_out(documents, share=0.2, seed=3)
    assert not {*training["text"]} & {*held_out["text"]}
    assert sorted([*training["text"], *held_out["text"]]) == sorted([*licences, *licences])
    assert len({*held_out["text"]}) == round(0.2 * len({*licences}))
    again = hold_out(read_documents([str(write_jsonl(tmp_path / "u.jsonl", licences[::-1]))]), share=0.2, seed=3)[1]
    assert {*again["text"]} == {*held_out["text"]}, "the order of documents does not matter"
    assert {*hold_out(documents, share=0.2, seed=4)[1]["text"]} != {*held_out["text"]}
    assert hold_out(documents, share=0, seed=3)[1] is None


def test_streamed_documents_are_held_out_by_the_same_rule(tmp_path: Path, licences: list[str]) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", licences)
    training, held_out = hold_out(read_documents([str(path)], streaming=True), share=0.3, seed=0)
    one, other = {row["text"] for row in training}, {row["text"] for row in held_out}
    assert one and other and not one & other and one | other == {*licences}


def test_a_single_document_is_cut_in_two_at_a_line_end(tmp_path: Path, licences: list[str]) -> None:
    path = write_jsonl(tmp_path / "t.jsonl", licences[:1])
    training, held_out = hold_out(read_documents([str(path)]), share=0.1, seed=0)
    assert training["text"][0] + held_out["text"][0] == licences[0]
    assert training["text"][0].endswith("\n") and 0 < len(held_out["text"][0]) < len(licences[0]) / 3


def test_the_mark_that_some_programs_begin_a_file_with_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes(b"\xef\xbb\xbfone\n")
    assert read_documents([str(tmp_path / "t.txt")])["text"] == ["one\n"]


def test_an_edited_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("one\n")
    assert read_documents([str(path)])["text"] == ["one\n"]
    path.write_text("two, and longer\n")
    assert read_documents([str(path)])["text"] == ["two, and longer\n"]


def test_a_folder_leaves_out_binaries_and_hidden_files(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "a.pyc").write_bytes(b"\x00\x01\x02")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("secret\n")
    assert read_documents([str(tmp_path)])["text"] == ["x = 1\n"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("t.txt", b"", "empty"),
        ("t.txt", b"\x00\x01", "not a text file"),
        ("t.txt", b"caf\xe9\n", "not UTF-8 text"),
        ("t.txt", b"plain\n" * 50_000 + "é".encode()[:1] + b"\n", "at byte 300000"),
        ("t.jsonl", b'{"body": "x"}\n', "no column 'text'; there are body"),
        ("t.jsonl", b'{"text": 5}\n', "holds no text but Value"),
        ("t.jsonl", b'{"text": "x"\n', "cannot be read"),
        ("t.parquet", b"PAR1 not really", "cannot be read"),
    ],
)
def test_what_cannot_be_read_is_said_with_its_file(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises((OptionError, CheckpointError), match=says) as caught:
        read_documents([str(tmp_path / name)])
    assert name in str(caught.value)


def test_a_source_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"nowhere\.txt: no such file"):
        read_documents([str(tmp_path / "nowhere.txt")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(OptionError, match="no text in this folder"):
        read_documents([str(tmp_path / "empty")])
