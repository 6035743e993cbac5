"""A bank copied into an object store: the manifest last, so that whoever reads meets a whole bank or none."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import svdbank
import svdbank.sharing.copying as copying
from svdbank.core.errors import LockedError, OptionError
from svdbank.core.stores import open_store
from svdbank.sharing.claim import CLAIM, Claim
from tests import stores
from tests.building.small import tree


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        for known in (stack.enter_context(stores.s3()), stack.enter_context(stores.gcs(tmp_path_factory.mktemp("gcs")))):
            for name, value in known.items():
                patch.setenv(name, value)
        yield


@pytest.fixture(params=["s3", "gs"])
def address(request: pytest.FixtureRequest, running: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("SVDBANK_HOME", str(tmp_path / "svdbank"))
    return f"{request.param}://bucket/{tmp_path.name}"


def held(address: str) -> dict[str, bytes]:
    store: Any = open_store(address)
    names = [entry["path"] for batch in store.list() for entry in batch]
    return {name: bytes(store.get(name).bytes()) for name in names}


def test_a_pushed_bank_is_its_files_and_is_pushed_once(address: str, banks: dict[str, Path], tmp_path: Path) -> None:
    (banks["hub"] / ".used").touch()
    report = svdbank.push(banks["hub"], address)
    mine = {name: data for name, data in tree(banks["hub"]).items() if name != ".used"}
    assert held(address) == mine and report.committed and report.created and report.changed == len(mine)
    again = svdbank.push(banks["hub"], address)
    assert not again.committed and again.changed == 0
    pulled = svdbank.pull(address, into=tmp_path / "pulled")
    assert pulled.digest == report.digest and tree(tmp_path / "pulled") == mine


def test_another_bank_takes_its_place_when_told_to(address: str, banks: dict[str, Path]) -> None:
    svdbank.push(banks["less"], address)
    with pytest.raises(OptionError, match="another bank"):
        svdbank.push(banks["hub"], address)
    svdbank.push(banks["hub"], address, force=True)
    assert held(address) == tree(banks["hub"])
    for option in ({"base": "org/base"}, {"public": True}):
        with pytest.raises(OptionError, match="no repository"):
            svdbank.push(banks["hub"], address, **option)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="nothing to push to"):
        svdbank.push(banks["hub"], "https://example.org/bank")


def test_a_copy_that_stops_leaves_a_whole_bank_or_none(
    address: str, banks: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before files are put and deleted, over the bank that was there."""
    old, new = tree(banks["less"]), tree(banks["hub"])
    done: list[str] = []
    stop_at = None

    def stopping(call: Any) -> Any:
        def counted(store: Any, place: Any, file: Any) -> Any:
            if len(done) == stop_at:
                raise ConnectionError("stopped")
            result = call(store, place, file)
            done.append(getattr(file, "name", file))
            return result

        return counted

    monkeypatch.setattr(copying, "_AT_ONCE", 1)
    monkeypatch.setattr(copying, "_put", stopping(copying._put))
    monkeypatch.setattr(copying, "_delete", stopping(copying._delete))
    svdbank.push(banks["less"], address)
    done.clear()
    svdbank.push(banks["hub"], address, force=True)
    assert held(address) == new
    deleted, put = (number for number, name in enumerate(done) if name == "manifest.json")
    total = len(done)
    assert 0 == deleted < put < total - 1
    for number in (0, 1, 2, put - 1, put, put + 1, total - 1):
        stop_at = None
        svdbank.push(banks["less"], address, force=True)
        done.clear()
        stop_at = number
        with pytest.raises(ConnectionError):
            svdbank.push(banks["hub"], address, force=True)
        found = held(address)
        known = old if found.get("manifest.json") == old["manifest.json"] else new
        assert ("manifest.json" in found) == (number in (0, put + 1, total - 1))
        assert "manifest.json" not in found or {name: found.get(name) for name in known} == known, number
    stop_at = None
    done.clear()
    assert CLAIM in held(address)
    svdbank.push(banks["hub"], address)  # the bank that was being put there: nothing has to be forced
    assert held(address) == new and all(name not in new for name in done)


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], object]]:
    """What is done, once each, before a push looks for the first time whether the place is still its own."""
    waiting = list[Callable[[], object]]()
    real = Claim.hold

    def hold(claim: Claim) -> None:
        if waiting:
            waiting.pop()()
        real(claim)

    monkeypatch.setattr(Claim, "hold", hold)
    monkeypatch.setattr(copying, "_AT_ONCE", 1)
    return waiting


def test_of_two_banks_pushed_to_one_place_at_once_the_second_is_told(
    address: str, banks: dict[str, Path], meanwhile: list[Callable[[], object]]
) -> None:
    def second() -> None:
        with pytest.raises(LockedError, match="another bank to this place is under way"):
            svdbank.push(banks["less"], address)

    meanwhile.append(second)
    assert svdbank.push(banks["hub"], address).committed and not meanwhile
    assert held(address) == tree(banks["hub"])


def test_who_is_forced_out_puts_nothing_more_there(
    address: str, banks: dict[str, Path], meanwhile: list[Callable[[], object]]
) -> None:
    for _ in ("where nothing was", "over the other's bank"):
        meanwhile.append(lambda: svdbank.push(banks["less"], address, force=True))
        with pytest.raises(LockedError, match="took this place meanwhile"):
            svdbank.push(banks["hub"], address, force=True)
        assert held(address) == tree(banks["less"])


def test_one_bank_pushed_twice_at_once_is_there_whole(
    address: str, banks: dict[str, Path], meanwhile: list[Callable[[], object]], tmp_path: Path
) -> None:
    """From two folders, since one takes a lock."""
    copy = shutil.copytree(banks["hub"], tmp_path / "copy")
    meanwhile.append(lambda: svdbank.push(copy, address))
    with pytest.raises(LockedError) as caught:
        svdbank.push(banks["hub"], address)
    assert held(address) == tree(banks["hub"]) and "run the same command again" in str(caught.value.hint)
    assert not svdbank.push(banks["hub"], address).committed


def test_what_somebody_else_changes_meanwhile_is_seen_before_the_manifest_is_put(
    address: str, banks: dict[str, Path], meanwhile: list[Callable[[], object]]
) -> None:
    svdbank.push(banks["hub"], address)
    name = next(name for name in held(address) if "/left/c/" in name)
    open_store(address).delete(name.replace("left", "right"))
    meanwhile.append(lambda: stores.put(address, {name: b"x" * len(held(address)[name])}))
    with pytest.raises(svdbank.DamageError, match="does not hold"):
        svdbank.push(banks["hub"], address)
    assert svdbank.push(banks["hub"], address).changed == 2 and held(address) == tree(banks["hub"])


def test_a_store_without_conditional_requests_takes_a_bank_too(
    running: None, banks: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a bucket that is not there is said not to be."""
    from moto.s3.responses import S3Response

    real = S3Response.put_object

    def put_object(self: Any) -> Any:
        return (501, {}, "") if self.headers.get("If-None-Match") else real(self)

    monkeypatch.setattr(S3Response, "put_object", put_object)
    monkeypatch.setattr("svdbank.core.stores._TRIES", 0)
    svdbank.push(banks["hub"], "s3://bucket/plain")
    assert held("s3://bucket/plain") == tree(banks["hub"])
    for scheme in ("s3", "gs"):
        with pytest.raises(svdbank.BankError, match="cannot be"):
            svdbank.push(banks["hub"], f"{scheme}://nobucket/x")


def test_what_is_harmed_there_is_sent_again(address: str, banks: dict[str, Path]) -> None:
    svdbank.push(banks["hub"], address)
    name = next(name for name in held(address) if "/c/" in name)
    stores.put(address, {name: held(address)[name][:-1] + b"\1"})
    report = svdbank.push(banks["hub"], address)
    assert report.changed in (1, 2) and held(address) == tree(banks["hub"])


def test_an_unsound_bank_is_not_copied(address: str, banks: dict[str, Path]) -> None:
    path = next(path for path in sorted(banks["hub"].rglob("*")) if path.is_file() and "/c/" in str(path))
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    with pytest.raises(svdbank.DamageError):
        svdbank.push(banks["hub"], address)
    assert held(address) == {}
