"""A bank in an object store or on a web server: read, checked and pulled as one on the Hub."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

import svdbank
from tests import stores
from tests.building.small import tree
from tests.stores import Web


@pytest.fixture(scope="module")
def addresses(near: svdbank.Bank, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The small bank in each kind of store."""
    with ExitStack() as running, pytest.MonkeyPatch.context() as patch:
        for known in (running.enter_context(stores.s3()), running.enter_context(stores.gcs(tmp_path_factory.mktemp("gcs")))):
            for name, value in known.items():
                patch.setenv(name, value)
        served = running.enter_context(stores.web(tree(near.path)))
        found = {"s3": "s3://bucket/banks/small", "gs": "gs://bucket/banks/small", "http": served.address}
        for kind in ("s3", "gs"):
            stores.put(found[kind], tree(near.path))
        yield found


@pytest.fixture
def site(near: svdbank.Bank, own_home: Path) -> Iterator[Web]:
    with stores.web(tree(near.path)) as running:
        yield running


@pytest.mark.parametrize("kind", ["s3", "gs", "http"])
def test_a_bank_in_a_store_reads_pulls_and_verifies_as_one_here(
    kind: str, addresses: dict[str, str], near: svdbank.Bank, own_home: Path
) -> None:
    address = addresses[kind]
    bank = svdbank.open(address + "/")
    for array in ("left", "right"):
        ours, theirs = (getattr(one, array)(near.names, 24) for one in (bank, near))
        assert all(torch.equal(ours[name], theirs[name]) for name in near)
    before = bank.files.source.traffic.requests  # type: ignore[attr-defined]
    again = svdbank.open(address)
    again.left(near.names, 24)
    assert again.files.source.traffic.requests == 0 < before  # type: ignore[attr-defined]
    assert svdbank.verify(address).sound and svdbank.verify(address, data=True).sound
    report = svdbank.pull(address)
    assert tree(Path(report.path)) == tree(near.path)
    (shard, *_) = sorted(Path(report.path).glob("*/left/c/1/0/0"))
    shard.write_bytes(bytes(shard.stat().st_size))
    mended = svdbank.repair(report.path)
    assert mended.origin == address and len(mended.fetched) == 1 and mended.solved == 0
    assert mended.sound and tree(Path(report.path)) == tree(near.path)
    with pytest.raises(svdbank.BankNotFoundError, match="no bank there"):
        svdbank.open(f"{address}/none")


def test_a_web_server_gives_the_licence_and_its_notices_too(site: Web, own_home: Path) -> None:
    """What push sends beside a bank, though such a server lists nothing."""
    beside = {
        "README.md": b"a card",
        "LICENSE.md": b"yes",
        "NOTICE": b"by us",
        "USE_POLICY.md": b"no harm",
        "COPYING.txt": b"do",
    }
    site.files.update(beside)
    folder = Path(svdbank.pull(site.address).path)
    assert {name: (folder / name).read_bytes() for name in beside} == beside and svdbank.verify(folder).sound


def test_ranges_are_asked_for_one_by_one_and_gaps_are_not_read(site: Web, near: svdbank.Bank) -> None:
    bank = svdbank.open(site.address)
    before = site.sent
    bank.left(near.names, 16)
    chunk, metadata = 16 * 24 * 4 + 4, len(site.files[f"{next(iter(bank.index.families)).spec.name}/left/zarr.json"])
    assert site.sent - before == 6 * chunk + metadata


@pytest.mark.parametrize(
    ("harm", "error", "text"),
    [
        (
            lambda status, headers, data: (status, headers, data[:-1] + bytes([data[-1] ^ 1])),
            svdbank.DamageError,
            "not the one recorded",
        ),
        (lambda status, headers, data: (status, headers, data[:-1]), svdbank.BankError, "left/c"),
        (
            lambda status, headers, data: (status, {**headers, "ETag": '"x"'}, data),
            svdbank.DamageError,
            "changed while it was read",
        ),
        (
            lambda status, headers, data: (200, {k: v for k, v in headers.items() if k != "Content-Range"}, data),
            svdbank.BankError,
            "does not answer byte ranges",
        ),
        (
            lambda status, headers, data: (206, {**headers, "Content-Range": f"bytes 4-{3 + len(data)}/99999"}, data),
            svdbank.DamageError,
            "99999 bytes, recorded were|were asked for",
        ),
        (lambda status, headers, data: (416, headers, b""), svdbank.DamageError, "ends before the bytes that were asked for"),
        (lambda status, headers, data: (404, {}, b""), svdbank.DamageError, "missing"),
        (lambda status, headers, data: (403, {}, b""), svdbank.BankError, "refuses access|cannot be read"),
        (lambda status, headers, data: (500, {}, b""), svdbank.BankError, "cannot be read"),
    ],
    ids=["other bytes", "fewer bytes", "another ETag", "no ranges", "another size", "416", "404", "403", "500"],
)
def test_a_web_server_that_answers_something_else_is_refused_by_name(
    harm: object, error: type[svdbank.SvdbankError], text: str, site: Web, near: svdbank.Bank, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("svdbank.core.stores._TRIES", 1)
    bank = svdbank.open(site.address)
    bank.left(near.names[1:2], 16)
    site.harm = lambda name, *answer: harm(*answer) if "left/c/" in name else answer  # type: ignore[operator]
    with pytest.raises(error, match=text) as refused:
        bank.left(near.names, 24)
    assert site.address in str(refused.value)


def test_a_server_error_that_passes_is_not_noticed(site: Web, near: svdbank.Bank) -> None:
    failed: list[str] = []

    def once(name: str, status: int, headers: dict[str, str], data: bytes) -> tuple[int, dict[str, str], bytes]:
        if name in failed:
            return status, headers, data
        failed.append(name)
        return 503, {}, b""

    site.harm = once
    assert torch.equal(svdbank.open(site.address).left(near.names, 16)[near.names[0]], near.left(near.names, 16)[near.names[0]])
    assert failed


def test_a_bank_that_was_published_over_another_is_refused_and_pull_finds_it(
    site: Web, near: svdbank.Bank, minilm: Path, tmp_path: Path
) -> None:
    from tests.building.small import write_small_checkpoint

    svdbank.open(site.address).left(near.names[:1], 16)
    other = svdbank.build(write_small_checkpoint(tmp_path / "model", minilm, layers=5), tmp_path / "bank", rank=24)
    site.files = tree(other.path)
    with pytest.raises(svdbank.DamageError, match=r"right/zarr.json: not the bytes that were published"):
        svdbank.open(site.address).right(near.names, 16)
    report = svdbank.verify(site.address)
    assert [damage.file for damage in report.damage] == ["manifest.json"] and str(report.next).startswith("svdbank pull http")
    svdbank.pull(site.address, rank=16)
    assert svdbank.open(site.address).names == other.names and svdbank.verify(site.address).sound


def test_credentials_are_in_no_message(addresses: dict[str, str], own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2-secret")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setattr("svdbank.core.stores._TRIES", 0)
    with pytest.raises(svdbank.BankError) as refused:
        svdbank.open(addresses["s3"])
    assert "hunter2" not in f"{refused.value} {refused.value.hint}" and "s3://bucket/banks/small" in str(refused.value)


def test_without_obstore_the_extra_is_named(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(importlib.import_module("sys").modules, "obstore.store", None)
    with pytest.raises(svdbank.MissingExtraError) as refused:
        svdbank.open("s3://bucket/bank")
    assert refused.value.hint == "pip install 'svdbank[s3]'"
