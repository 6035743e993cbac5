"""Whatever can tell sizes and return byte ranges can hold a bank, and is believed no more than a disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

import svdbank
from svdbank.bank.files import Folder, Range
from svdbank.bank.index import read_index, read_manifest
from tests.building.small import tree, write_small_checkpoint


class InMemory:
    """A bank in a dictionary, which counts how often it is asked for bytes."""

    place = "memory://bank"

    def __init__(self, content: dict[str, bytes]) -> None:
        self.content = content
        self.rounds = 0

    def size(self, name: str) -> int:
        if name not in self.content:
            raise FileNotFoundError(name)
        return len(self.content[name])

    def read_many(self, ranges: Sequence[Range]) -> list[bytes]:
        self.rounds += 1
        return [self.content[name][start:stop] for name, start, stop in ranges]


def opened(files: InMemory) -> svdbank.Bank:
    manifest = read_manifest(files)
    return svdbank.Bank(files, manifest, read_index(files, manifest))


@pytest.fixture(scope="module")
def local(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> svdbank.Bank:
    folder = tmp_path_factory.mktemp("files")
    return svdbank.build(write_small_checkpoint(folder / "model", minilm, layers=6), folder / "bank", rank=18)


def test_a_bank_that_is_on_no_disk_reads_the_same(local: svdbank.Bank) -> None:
    bank = opened(InMemory(tree(local.path)))
    assert list(bank) == list(local) and bank.base_digest() == local.base_digest()
    for method in ("left", "right", "sigma"):
        for rank in (1, 16, 18):
            ours, theirs = (getattr(b, method)(local.names, rank) for b in (bank, local))
            assert all(torch.equal(ours[name], theirs[name]) for name in local)
    assert all(torch.equal(bank[name].probe(), local[name].probe()) for name in local)


def test_a_lookup_of_many_weights_asks_twice(local: svdbank.Bank) -> None:
    """Tables of chunks, then chunks, however many weights there are: a far place is waited for twice."""
    files = InMemory(tree(local.path))
    bank = opened(files)
    bank.left(bank.names[:1], 16)  # which reads and checks the metadata of the array
    before = files.rounds
    bank.left(bank.names, 16)
    assert files.rounds - before == 2


def test_a_lookup_larger_than_a_batch_reads_the_same(local: svdbank.Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = local.left(local.names, 18)
    monkeypatch.setattr("svdbank.bank.chunks.BATCH_BYTES", 1)
    files = InMemory(tree(local.path))
    for name, left in opened(files).left(local.names, 18).items():
        assert torch.equal(left, expected[name])
    assert files.rounds > 2 * len(local)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:100] + bytes([data[100] ^ 1]) + data[101:],
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),
        lambda data: data + b"\0",
        lambda data: data[:-1],
        lambda data: None,
    ],
    ids=["a bit of a vector", "a bit of the table", "a byte more", "a byte less", "no file"],
)
def test_bytes_that_were_not_published_are_refused_wherever_they_come_from(
    change: Callable[[bytes], bytes | None], local: svdbank.Bank
) -> None:
    files = InMemory(tree(local.path))
    bank = opened(files)
    (name,) = (name for name in files.content if name.endswith("/left/c/2/0/0"))
    changed = change(files.content.pop(name))
    if changed is not None:
        files.content[name] = changed
    with pytest.raises(svdbank.DamageError, match="left/c/2/0/0"):
        bank.left(bank.names, 16)
    bank.left(bank.names[:2], 16)


def test_a_folder_refuses_what_is_no_regular_file_and_reports_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"0123456789")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "folder").mkdir()
    folder = Folder(tmp_path)
    assert folder.size("file") == 10
    assert folder.read_many([("file", 2, 4), ("file", 0, 0), ("file", 9, 10)]) == [b"23", b"", b"9"]
    for name in ("link", "folder"):
        with pytest.raises(svdbank.DamageError):
            folder.size(name)
        with pytest.raises(svdbank.DamageError):
            folder.read_many([(name, 0, 1)])
    for name in ("absent", "file/below"):
        with pytest.raises(FileNotFoundError):
            folder.size(name)
        with pytest.raises(FileNotFoundError):
            folder.read_many([(name, 0, 1)])
    with pytest.raises(svdbank.DamageError, match="ends 1 bytes early"):
        folder.read_many([("file", 5, 11)])
