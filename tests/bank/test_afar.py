"""A bank that lies elsewhere: what is asked for, what is believed, what is kept."""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import google_crc32c
import huggingface_hub.constants
import msgspec
import pytest
import torch

import svdbank
from svdbank.bank.layout import NO_DIGEST, FileRecord, Index, Manifest, shard_file
from svdbank.bank.parts import part_folders
from svdbank.core.errors import SvdbankError
from svdbank.core.specs import from_json, to_json
from tests.building.small import tree
from tests.checkpoint.hub_server import Fault, LocalHub

NAME = "hf://org/bank"


@pytest.fixture
def far(hub: LocalHub, near: svdbank.Bank, own_home: Path) -> LocalHub:
    """The small bank on the Hub, and a cache that has seen nothing."""
    hub.commit("org/bank", tree(near.path))
    return hub


def asked(hub: LocalHub) -> list[str]:
    """Requests for files of the bank: the client asks something of its own once a process."""
    return [request for request in hub.requests if "/resolve/" in request]


def same(bank: svdbank.Bank, near: svdbank.Bank, rank: int) -> None:
    for array in ("left", "right", "sigma"):
        ours, theirs = (getattr(one, array)(near.names, rank) for one in (bank, near))
        assert all(torch.equal(ours[name], theirs[name]) for name in near)
    assert all(torch.equal(ours, bank.probes(near.names)[name]) for name, ours in near.probes(near.names).items())


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def vectors(home: Path) -> list[Path]:
    return sorted(path for path in (home / "parts").rglob("*") if path.is_file() and "vectors" in path.parts)


def test_a_lookup_asks_for_its_chunks_once_and_for_nothing_else(far: LocalHub, near: svdbank.Bank, own_home: Path) -> None:
    bank = svdbank.open(NAME)
    assert bank.place == f"hf://org/bank@{far.repositories['org/bank'].branches['main']}" and list(bank) == list(near)
    before = len(far.ranges)
    assert torch.equal(bank.left(near.names[:2], 16)[near.names[0]], near.left(near.names[:2], 16)[near.names[0]])
    # A chunk of 16 vectors of 24 float32 and its checksum, at the beginning of two files; the array's metadata.
    assert [part for path, part in far.ranges[before:] if path.endswith("/0/0")] == ["bytes=0-1539"] * 2
    assert sum("/c/" not in path for path, _ in far.ranges[before:]) == len(far.ranges[before:]) - 2 == 1
    same(bank, near, 24)
    count = len(asked(far))
    same(svdbank.open(NAME), near, 24)
    same(svdbank.open(bank.place), near, 1)
    assert len(asked(far)) == count


def test_chunks_that_are_neighbours_are_one_request_and_gaps_are_not_read(far: LocalHub, near: svdbank.Bank) -> None:
    bank = svdbank.open(NAME)
    bank.left(near.names, 24)
    (file, *_), size = {path for path, _ in far.ranges if path.endswith("/left/c/0/0/0")}, 16 * 24 * 4 + 4
    assert [part for path, part in far.ranges if path == file] == [f"bytes=0-{2 * size - 1}"]


def test_what_a_name_means_is_kept_until_it_is_pulled(far: LocalHub, near: svdbank.Bank, own_home: Path) -> None:
    first = svdbank.open(NAME).place
    later = far.commit("org/bank", {"README.md": b"another commit"})
    assert svdbank.open(NAME).place == first
    assert svdbank.pull(NAME, rank=16).place == svdbank.open(NAME).place == f"hf://org/bank@{later}"
    assert svdbank.open(first).place == first


def test_offline_what_was_read_is_there_and_the_rest_is_refused_by_name(
    far: LocalHub, near: svdbank.Bank, monkeypatch: pytest.MonkeyPatch
) -> None:
    svdbank.open(NAME).left(near.names, 16)
    offline(monkeypatch)
    bank = svdbank.open(NAME)
    assert torch.equal(bank.left(near.names, 16)[near.names[5]], near.left(near.names, 16)[near.names[5]])
    with pytest.raises(svdbank.BankError, match=r"6 parts of 6 files are not on this disk, first of .*left/c/0/0/0") as refused:
        bank.left(near.names, 17)
    assert refused.value.hint is not None and f"svdbank pull {bank.place}" in refused.value.hint
    with pytest.raises(svdbank.BankError, match=r"hf://org/other: manifest.json is not on this disk"):
        svdbank.open("hf://org/other")


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def files_named(repository: dict[str, bytes], end: str) -> str:
    return next(name for name in sorted(repository) if name.endswith(end))


@pytest.mark.parametrize("end", ["manifest.json", "index", "left/zarr.json", "sigma/c/0/0", "left/c/0/0/0", "right/c/3/0/0"])
@pytest.mark.parametrize(
    "harm",
    [
        lambda data, other: flip(data, len(data) // 3),
        lambda data, other: data[: len(data) // 2],
        lambda data, other: data + b"\0",
        lambda data, other: other,
        lambda data, other: None,
        lambda data, other: bytes(len(data)),
    ],
    ids=["flip", "cut", "longer", "swap", "lost", "zeros"],
)
def test_harm_on_the_server_is_found_by_whoever_reads_it(
    end: str, harm: Callable[[bytes, bytes], bytes | None], hub: LocalHub, near: svdbank.Bank, own_home: Path
) -> None:
    files = tree(near.path)
    name = next(name for name in sorted(files) if (name.startswith("index-") if end == "index" else name.endswith(end)))
    other = files[name.replace("c/0/0/0", "c/1/0/0") if "/c/0/0/0" in name else files_named(files, "right/c/2/0/0")]
    changed = harm(files[name], other)
    if changed is None:
        del files[name]
    else:
        files[name] = changed
    hub.commit("org/bank", files)
    with pytest.raises(SvdbankError) as refused:
        same(svdbank.open(NAME), near, 24)
    expected = svdbank.BankNotFoundError if name == "manifest.json" and changed is None else svdbank.DamageError
    assert isinstance(refused.value, expected) and (name in str(refused.value) or name == "manifest.json")
    with pytest.raises(SvdbankError):
        svdbank.pull(NAME)
    assert not list((own_home / "banks").rglob("manifest.json")) if (own_home / "banks").exists() else True


@pytest.mark.parametrize(
    ("fault", "error", "text"),
    [
        (Fault("other-range", "left/c/0", times=99), svdbank.DamageError, "bytes .* were asked for, the server sends"),
        (Fault("other-etag", "left/c/1", times=99), svdbank.DamageError, "changed while it was read"),
        (Fault("no-range", "left/c/0", times=99), svdbank.BankError, "does not answer byte ranges"),
        (Fault("wrong-bytes", "left/c/0", times=99), svdbank.DamageError, "chunk .* is not the one recorded"),
        (Fault("status", "left/c/0", status=416, times=99), svdbank.DamageError, "416"),
        (Fault("status", "left/c/0", status=404, times=99), svdbank.BankError, "404|missing"),
        (Fault("status", "left/c/0", status=403, times=99), svdbank.BankError, "403"),
    ],
    ids=["another range", "another ETag", "no ranges", "other bytes", "416", "404", "403"],
)
def test_a_server_that_answers_something_else_is_refused_by_name(
    fault: Fault, error: type[SvdbankError], text: str, far: LocalHub, near: svdbank.Bank
) -> None:
    bank = svdbank.open(NAME)
    bank.left(near.names[1:2], 16)
    far.faults.append(replace(fault))
    with pytest.raises(error, match=text):
        bank.left(near.names, 24)
        bank.left(near.names, 16)


@pytest.mark.parametrize(
    "fault",
    [
        Fault("status", "left/c/0"),
        Fault("status", "manifest.json", method="HEAD"),
        Fault("drop", "left/c/0"),
        Fault("wrong-bytes", "left/c/0"),
        Fault("wrong-bytes", "index-"),
    ],
    ids=["503", "503 at first", "broken off", "a wrong byte once", "a wrong byte of the index once"],
)
def test_what_goes_wrong_once_is_asked_for_again(fault: Fault, far: LocalHub, near: svdbank.Bank) -> None:
    far.faults.append(replace(fault))
    same(svdbank.open(NAME), near, 24)
    assert far.faults[0].times == 0


def test_another_commit_in_between_is_refused(far: LocalHub, near: svdbank.Bank) -> None:
    bank = svdbank.open(NAME)
    repository = far.repositories["org/bank"]
    old = repository.branches["main"]
    new = far.commit("org/bank", {"README.md": b"another"})
    repository.branches[old] = new  # the server answers for the old commit from the new one
    with pytest.raises(svdbank.DamageError, match=f"answers from commit {new[:12]}"):
        bank.left(near.names, 16)


@pytest.mark.parametrize("connected", [True, False], ids=["online", "offline"])
@pytest.mark.parametrize("what", ["vectors", "small", "published.json", "origin.json"])
@pytest.mark.parametrize(
    "harm",
    [
        lambda path: path.write_bytes(flip(path.read_bytes(), path.stat().st_size // 3)),
        lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        lambda path: path.write_bytes(b"\xff" * 4000),
        lambda path: path.unlink(),
        lambda path: (path.unlink(), path.symlink_to("/etc/passwd")),
        lambda path: (path.unlink(), os.mkfifo(path)),
        lambda path: (path.unlink(), path.mkdir()),
    ],
    ids=["flip", "cut", "other bytes", "lost", "link", "pipe", "folder"],
)
def test_harm_in_what_is_kept_is_found_and_fetched_again_or_refused(
    harm: Callable[[Path], object],
    what: str,
    connected: bool,
    far: LocalHub,
    near: svdbank.Bank,
    own_home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    same(svdbank.open(NAME), near, 24)
    (folder,) = part_folders(own_home / "parts")
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and what in path.parts)
    for path in paths:
        harm(path)
    if connected or what == "origin.json":
        same(svdbank.open(NAME), near, 24)
        return
    offline(monkeypatch)
    with pytest.raises(svdbank.BankError, match="not on this disk"):
        same(svdbank.open(NAME), near, 24)


def test_chunks_of_another_weight_in_the_cache_are_found(far: LocalHub, near: svdbank.Bank, own_home: Path) -> None:
    same(svdbank.open(NAME), near, 24)
    one, two, *_ = vectors(own_home)
    shutil.copy(one, one.with_suffix(".kept"))
    shutil.copy(two, one)
    bank = svdbank.open(NAME)
    same(bank, near, 24)
    assert bank.files.parts.damaged  # type: ignore[attr-defined]


def test_a_cache_that_cannot_be_written_costs_requests_and_nothing_else(
    far: LocalHub, near: svdbank.Bank, own_home: Path
) -> None:
    own_home.write_bytes(b"a file where the folder belongs")
    same(svdbank.open(NAME), near, 24)
    with pytest.raises(OSError, match=r"Not a directory|File exists"):
        svdbank.pull(NAME, rank=16)


def test_what_was_used_longest_ago_goes_first(
    far: LocalHub, near: svdbank.Bank, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six files of two chunks of 1540 bytes each are read; beside index and metadata, which count too, the limit holds three."""
    svdbank.open(NAME).left(near.names[:1], 1)
    small = sum(path.stat().st_size for path in (own_home / "parts").rglob("small/*"))
    monkeypatch.setenv("SVDBANK_PARTS_LIMIT", str(small + 10_000))
    bank = svdbank.open(NAME)
    for age, name in enumerate(near.names):
        bank.left([name], 24)
        os.utime(vectors(own_home)[-1], (age + 1, age + 1))
    assert [path.name for path in vectors(own_home)] == ["3", "4", "5"]
    bank.left(near.names[3:4], 24)  # used again, so the last to go
    bank.left(near.names[:1], 24)
    assert [path.name for path in vectors(own_home)] == ["0", "3", "5"]
    monkeypatch.setenv("SVDBANK_PARTS_LIMIT", "0")
    same(svdbank.open(NAME), near, 24)
    assert not vectors(own_home) and not list((own_home / "parts").rglob("small/*"))
    monkeypatch.setenv("SVDBANK_PARTS_LIMIT", "much")
    with pytest.raises(svdbank.OptionError, match="SVDBANK_PARTS_LIMIT='much' is no size"):
        svdbank.open(NAME)


@pytest.mark.parametrize(
    "address",
    [
        "hf://",
        "hf://bank",
        "hf://org/../x",
        "https://huggingface.co/org/bank",
        "https://user:pw@host/x",
        "s3://",
        "s3://b/../x",
        "https://h/x?y=1",
    ],
)
def test_an_address_that_is_none_is_refused_before_any_request(address: str, hub: LocalHub, own_home: Path) -> None:
    with pytest.raises(svdbank.OptionError) as refused:
        svdbank.open(address)
    assert "pw" not in str(refused.value) and not hub.requests


def test_a_commit_that_was_asked_for_is_the_one_that_answers(far: LocalHub) -> None:
    repository = far.repositories["org/bank"]
    repository.branches["0" * 40] = repository.branches["main"]
    with pytest.raises(svdbank.DamageError, match="answers from commit"):
        svdbank.open(f"{NAME}@{'0' * 40}")


def test_a_folder_that_names_an_address_is_no_bank_unless_it_is_in_the_cache(
    far: LocalHub, near: svdbank.Bank, own_home: Path, tmp_path: Path
) -> None:
    svdbank.open(NAME).left(near.names, 16)
    (folder,) = part_folders(own_home / "parts")
    assert svdbank.open(folder).place == svdbank.open(NAME).place
    shutil.copytree(folder, tmp_path / "given")
    count = len(far.requests)
    for call in (svdbank.open, svdbank.rm, svdbank.verify):
        with pytest.raises(svdbank.BankNotFoundError):
            call(tmp_path / "given")
    assert len(far.requests) == count and (tmp_path / "given" / "origin.json").exists()


def in_another_order(files: dict[str, bytes]) -> dict[str, bytes]:
    """The same bank with the chunks of each file of vectors the other way round, as another writer may lay them."""
    manifest = from_json(files["manifest.json"], Manifest, where="", error=svdbank.DamageError)
    index = from_json(files.pop(manifest.index), Index, where="", error=svdbank.DamageError)
    families = []
    for family in index.families:
        records: dict[str, tuple[FileRecord, ...]] = {}
        for array, before in family.files.items():
            for shard, record in enumerate(before):
                name, each = shard_file(family.spec.name, array, shard), record.chunk_bytes
                places = range(len(record.chunks) - 1, -1, -1)
                data = b"".join(files[name][place * each : (place + 1) * each] for place in places)
                table = b"".join(struct.pack("<QQ", place * each, each) for place in places)
                crc = google_crc32c.value(table)
                files[name] = data + table + crc.to_bytes(4, "little")
                assert len(files[name]) == record.size
                new = FileRecord(record.size, hashlib.sha256(files[name]).hexdigest(), each, record.chunks[::-1], crc)
                records[array] = (*records.get(array, ()), new)
        families.append(msgspec.structs.replace(family, files=records))
    data = to_json(msgspec.structs.replace(index, families=tuple(families)))
    name = f"index-{hashlib.sha256(data).hexdigest()[:16]}.json"
    listed = {key: value for key, value in manifest.files.items() if key != manifest.index}
    listed[name] = FileRecord(len(data), hashlib.sha256(data).hexdigest(), 0, (), 0)
    text = to_json(msgspec.structs.replace(manifest, index=name, files=listed, digest=NO_DIGEST))
    digest = hashlib.sha256(text).hexdigest()
    return {**files, name: data, "manifest.json": text.replace(NO_DIGEST.encode(), digest.encode(), 1)}


def test_a_bank_whose_chunks_lie_in_another_order_is_read_by_its_tables(
    hub: LocalHub, near: svdbank.Bank, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tables cannot be known beforehand: they are read, checked and kept, so that offline all is here."""
    hub.commit("org/bank", in_another_order(tree(near.path)))
    svdbank.pull(NAME, rank=24)
    assert sum(path.endswith("/left/c/0/0/0") for path, _ in hub.ranges) == 2  # the table, then the chunks
    offline(monkeypatch)
    same(svdbank.open(NAME), near, 24)
    assert not svdbank.verify(part_folders(own_home / "parts")[0]).damage


def test_what_needs_a_folder_says_so(far: LocalHub, near: svdbank.Bank) -> None:
    bank = svdbank.open(NAME)
    with pytest.raises(svdbank.BankError, match="is read from afar, and this needs a folder") as refused:
        _ = bank.path
    assert refused.value.hint == f"svdbank pull {bank.place}"


def test_a_model_named_with_its_scheme_is_still_its_cached_bank(far: LocalHub, near: svdbank.Bank, own_home: Path) -> None:
    with pytest.raises(svdbank.BankNotFoundError, match="no repository that the Hub shows you"):
        svdbank.open("hf://org/model")
    far.commit("org/model", {"config.json": b"{}"})
    with pytest.raises(svdbank.BankNotFoundError, match="no bank there") as refused:
        svdbank.open("hf://org/model")
    assert refused.value.hint == "svdbank build org/model"
