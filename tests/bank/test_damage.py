"""Any file of a bank flipped, truncated, deleted or swapped is found and named; a lookup never returns wrong numbers."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import svdbank
from svdbank.bank.layout import MANIFEST, NO_DIGEST, manifest_digest
from tests.building.small import tree, write_small_checkpoint


@pytest.fixture(scope="module")
def whole(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    svdbank.build(write_small_checkpoint(folder / "model", minilm), folder / "bank", rank=18)
    return folder / "bank"


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("harm", [_flip, _truncate, Path.unlink], ids=["flipped", "truncated", "deleted"])
def test_every_harmed_file_is_found_and_named(harm: Callable[[Path], None], whole: Path, tmp_path: Path) -> None:
    names = sorted(tree(whole))
    assert len(names) > 30
    for name in names:
        bank = tmp_path / "bank"
        shutil.copytree(whole, bank)
        harm(bank / name)
        try:
            report = svdbank.verify(bank, data=True)
            assert not report.sound, name
            assert any(name in damage.file or name in damage.what for damage in report.damage), name
        except svdbank.BankError as error:
            # A manifest that claims another format: refused before anything is verified.
            assert name == MANIFEST and MANIFEST in str(error)
        shutil.rmtree(bank)


def test_every_flipped_byte_of_the_manifest_is_found(whole: Path, tmp_path: Path) -> None:
    bank = tmp_path / "bank"
    shutil.copytree(whole, bank)
    original = (bank / MANIFEST).read_bytes()
    for place in range(len(original)):
        data = bytearray(original)
        data[place] ^= 1
        (bank / MANIFEST).write_bytes(data)
        with contextlib.suppress(svdbank.BankError):  # another format version, said so
            assert not svdbank.verify(bank).sound, place


@pytest.mark.parametrize("name", [MANIFEST, "index", "plan.json"])
def test_a_pipe_in_place_of_a_small_file_hangs_nobody(name: str, whole: Path, tmp_path: Path) -> None:
    bank = tmp_path / "bank"
    shutil.copytree(whole, bank)
    path = bank / (json.loads((bank / MANIFEST).read_bytes())["index"] if name == "index" else name)
    path.unlink()
    os.mkfifo(path)
    assert not svdbank.verify(bank, data=True).sound


@pytest.mark.parametrize("change", [{"weights_per_shard": 10**15}, {"principal": -1}, {"out_features": 10**13}])
def test_an_index_whose_numbers_do_not_fit_is_refused_before_anything_is_allocated(
    change: dict[str, int], whole: Path, tmp_path: Path
) -> None:
    bank = tmp_path / "bank"
    shutil.copytree(whole, bank)
    _forge_index(bank, lambda family: family["spec"].update(change))
    with pytest.raises(svdbank.DamageError):
        svdbank.open(bank)


def test_structure_alone_finds_what_is_missing_or_of_another_size(whole: Path, tmp_path: Path) -> None:
    bank = tmp_path / "bank"
    shutil.copytree(whole, bank)
    (lost,) = bank.glob("*/right/c/1/0/0")
    lost.unlink()
    report = svdbank.verify(bank)
    assert [damage.what for damage in report.damage] == ["missing"]
    assert report.next is not None and report.next == f"svdbank repair {bank} --source MODEL"


def test_two_swapped_sibling_shards_are_found_by_data_and_by_a_lookup(whole: Path, tmp_path: Path) -> None:
    """Each is a valid shard with valid checksums; only the record of its place tells them apart."""
    bank = tmp_path / "bank"
    shutil.copytree(whole, bank)
    (first,) = bank.glob("*/left/c/0/0/0")
    (second,) = bank.glob("*/left/c/1/0/0")
    first.rename(first.with_name("t"))
    second.rename(first)
    first.with_name("t").rename(second)
    assert len(svdbank.verify(bank, data=True).damage) == 2
    opened = svdbank.open(bank)
    for name in opened:
        with pytest.raises(svdbank.DamageError, match="not the one recorded"):
            opened[name].left(4)


def test_a_lookup_never_returns_other_numbers_than_were_published(whole: Path, tmp_path: Path) -> None:
    """Every byte of a shard file flipped, one at a time: the same values or an error."""
    bank = tmp_path / "bank"
    shutil.copytree(whole, bank)
    (shard,) = bank.glob("*/left/c/0/0/0")
    original = shard.read_bytes()
    opened = svdbank.open(bank)
    name = opened.names[0]
    expected = opened[name].left(18)
    refused = 0
    for place in range(0, len(original), 7):
        data = bytearray(original)
        data[place] ^= 0x10
        shard.write_bytes(data)
        try:
            assert torch.equal(opened[name].left(18), expected), place
        except svdbank.DamageError:
            refused += 1
    assert refused >= len(original) // 7 * 0.99


def test_a_lost_chunk_is_an_error_and_never_zeros_or_nan(whole: Path, tmp_path: Path) -> None:
    """The shard index claims that a chunk was never written, with a valid checksum: zarr would return fill values."""
    import struct

    import google_crc32c

    bank = tmp_path / "bank"
    shutil.copytree(whole, bank)
    (shard,) = bank.glob("*/left/c/0/0/0")
    data = bytearray(shard.read_bytes())
    index = len(data) - 4 - 2 * 16
    struct.pack_into("<QQ", data, index + 16, 2**64 - 1, 2**64 - 1)
    struct.pack_into("<I", data, len(data) - 4, google_crc32c.value(bytes(data[index:-4])))
    shard.write_bytes(data)
    opened = svdbank.open(bank)
    with pytest.raises(svdbank.DamageError):
        opened[opened.names[0]].left(18)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"zarr_format": 2}, "zarr_format"),
        ({"consolidated_metadata": {"kind": "inline", "must_understand": False, "metadata": {}}}, "consolidated_metadata"),
        ({"data_type": "complex128"}, "complex128"),
        ({"codecs": [{"name": "numcodecs.pickle", "configuration": {}}]}, "numcodecs.pickle"),
        ({"storage_transformers": [{"name": "evil"}]}, "storage_transformers"),
    ],
)
def test_metadata_that_selects_other_code_is_refused_before_zarr_sees_it(
    change: dict[str, object], message: str, whole: Path, tmp_path: Path
) -> None:
    """Even where a forger has made every hash fit."""
    from svdbank.bank import zarr_metadata

    (path,) = whole.glob("*/sigma/zarr.json")
    forged = json.loads(path.read_bytes()) | change
    with pytest.raises(svdbank.DamageError, match=message):
        zarr_metadata.checked_metadata(json.dumps(forged).encode(), where="zarr.json")
    bank = tmp_path / "bank"
    shutil.copytree(whole, bank)
    name, data = path.relative_to(whole).as_posix(), json.dumps(forged).encode()
    (bank / name).write_bytes(data)
    record = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    _forge_index(bank, lambda family: family["metadata"][name].update(record))
    opened = svdbank.open(bank)
    with pytest.raises(svdbank.DamageError, match=message):
        opened[opened.names[0]].sigma(2)


def test_a_link_in_a_bank_is_damage(whole: Path, tmp_path: Path) -> None:
    bank = tmp_path / "bank"
    shutil.copytree(whole, bank)
    (shard,) = bank.glob("*/left/c/0/0/0")
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    (bank / "extra").symlink_to("/etc/hostname")
    report = svdbank.verify(bank)
    assert {damage.what for damage in report.damage} == {"not a regular file", "not a regular file or folder"}


def test_a_pipe_or_a_link_in_place_of_a_shard_is_refused_by_a_lookup(whole: Path, tmp_path: Path) -> None:
    """A pipe must not hang it, a link must not lead it elsewhere."""
    bank = tmp_path / "bank"
    shutil.copytree(whole, bank)
    (first,) = bank.glob("*/left/c/0/0/0")
    (second,) = bank.glob("*/left/c/1/0/0")
    first.unlink()
    os.mkfifo(first)
    second.rename(tmp_path / "elsewhere")
    second.symlink_to(tmp_path / "elsewhere")
    opened = svdbank.open(bank)
    for name in opened:
        with pytest.raises(svdbank.DamageError):
            opened[name].left(2)


def _forge_index(bank: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a bank's index and make every hash fit again."""
    manifest = json.loads((bank / MANIFEST).read_bytes())
    index = json.loads((bank / manifest["index"]).read_bytes())
    change(index["families"][0])
    data = json.dumps(index).encode()
    (bank / manifest["index"]).write_bytes(data)
    manifest["files"][manifest["index"]] |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    _write_manifest(bank, manifest)


def _write_manifest(bank: Path, manifest: dict[str, Any]) -> None:
    manifest["digest"] = NO_DIGEST
    data = json.dumps(manifest).encode()
    (bank / MANIFEST).write_bytes(data.replace(NO_DIGEST.encode(), manifest_digest(data, NO_DIGEST).encode()))


def test_an_index_that_leaves_a_data_file_out_is_refused(whole: Path, tmp_path: Path) -> None:
    bank = tmp_path / "bank"
    shutil.copytree(whole, bank)
    _forge_index(bank, lambda family: family["files"].update(left=[]))
    with pytest.raises(svdbank.DamageError, match="does not record every data file"):
        svdbank.open(bank)


def test_metadata_that_claims_another_shape_than_the_index_is_refused(whole: Path, tmp_path: Path) -> None:
    bank = tmp_path / "bank"
    shutil.copytree(whole, bank)
    (path,) = bank.glob("*/sigma/zarr.json")
    data = json.dumps(json.loads(path.read_bytes()) | {"shape": [10**12, 18]}).encode()
    path.write_bytes(data)
    name = path.relative_to(bank).as_posix()
    record = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    _forge_index(bank, lambda family: family["metadata"][name].update(record))
    opened = svdbank.open(bank)
    with pytest.raises(svdbank.DamageError, match="1000000000000"):
        opened[opened.names[0]].sigma(2)


@pytest.mark.parametrize("name", [MANIFEST, "index"])
def test_a_folder_in_place_of_the_manifest_or_the_index_is_damage(name: str, whole: Path, tmp_path: Path) -> None:
    bank = tmp_path / "bank"
    shutil.copytree(whole, bank)
    path = bank / (name if name == MANIFEST else json.loads((bank / MANIFEST).read_bytes())["index"])
    path.unlink()
    path.mkdir()
    with pytest.raises(svdbank.DamageError):
        svdbank.open(bank)


@pytest.mark.parametrize("family", ["../evil", "a/b", "", ".hidden", "UPPER", "a\\b"])
def test_a_family_name_that_leads_elsewhere_is_refused(family: str, whole: Path, tmp_path: Path) -> None:
    bank = tmp_path / "bank"
    shutil.copytree(whole, bank)
    _forge_index(bank, lambda entry: entry["spec"].update(name=family))
    with pytest.raises(svdbank.DamageError, match="not a family name"):
        svdbank.open(bank)


def test_an_unknown_major_format_is_refused_with_the_upgrade(whole: Path, tmp_path: Path) -> None:
    bank = tmp_path / "bank"
    shutil.copytree(whole, bank)
    manifest = json.loads((bank / MANIFEST).read_bytes()) | {"format": 2, "something": "new"}
    (bank / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(svdbank.BankError, match="format 2") as caught:
        svdbank.open(bank)
    assert not isinstance(caught.value, svdbank.DamageError)
    assert "pip install -U" in str(caught.value.hint)


def test_an_unfinished_bank_is_not_read_and_says_how_to_go_on(whole: Path, tmp_path: Path) -> None:
    bank = tmp_path / "bank"
    shutil.copytree(whole, bank)
    (bank / MANIFEST).unlink()
    with pytest.raises(svdbank.DamageError, match="lost; the bank was published"):  # no index is there before it is
        svdbank.open(bank)
    for index in bank.glob("index-*.json"):
        index.unlink()
    with pytest.raises(svdbank.BankNotFoundError, match="not finished") as caught:
        svdbank.open(bank)
    assert "resumes" in str(caught.value.hint)


def _renamed(family: dict[str, Any], name: str) -> None:
    family["spec"]["weights"][0] = family["weights"][0]["name"] = name


def _huge(family: dict[str, Any]) -> None:
    """Shapes that fit each other, and no memory."""
    spec, length = family["spec"], 2**40
    spec.update(out_features=length, in_features=length)
    for records in family["files"].values():
        for record in records:
            record["chunk_bytes"] = 16 * length * 4 + 4
            record["size"] = len(record["chunks"]) * record["chunk_bytes"] + spec["weights_per_shard"] * 2 * 16 + 4


@pytest.mark.parametrize(
    "change",
    [
        _huge,
        lambda family: _renamed(family, ""),
        lambda family: _renamed(family, "x" * 5000),
        lambda family: family["spec"].update(name="a" * 300),
    ],
    ids=["huge shapes", "an empty name", "a long name", "a family that no file system takes"],
)
def test_an_index_that_fits_itself_and_no_model_is_refused_by_every_reader(
    change: Callable[[dict[str, Any]], None], whole: Path, tmp_path: Path
) -> None:
    bank = tmp_path / "bank"
    shutil.copytree(whole, bank)
    _forge_index(bank, change)
    with pytest.raises(svdbank.DamageError):
        svdbank.open(bank)
    assert not svdbank.verify(bank).sound
    assert svdbank.rm(bank) > 0


@pytest.mark.parametrize("name", ["i\0", "i" * 5000, "../index.json", "a\\b"], ids=["NUL", "long", "up", "backslash"])
def test_a_manifest_that_names_what_no_file_is_called_is_damage(name: str, whole: Path, tmp_path: Path) -> None:
    bank = tmp_path / "bank"
    shutil.copytree(whole, bank)
    manifest = json.loads((bank / MANIFEST).read_bytes())
    record = manifest["files"][manifest["index"]]
    _write_manifest(bank, manifest | {"index": name, "files": manifest["files"] | {name: record}})
    with pytest.raises(svdbank.DamageError):
        svdbank.open(bank)
    _write_manifest(bank, manifest | {"files": manifest["files"] | {name: record}})
    report = svdbank.verify(bank, data=True) if name.startswith("i" * 9) else None
    assert report is None or not report.sound


_ZEROS = {"name": "regular", "configuration": {"chunk_shape": [0, 0, 0]}}


@pytest.mark.parametrize(
    "change",
    [
        {"chunk_grid": _ZEROS},
        {"codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, *[{"name": "crc32c"}] * 100_000]},
        {"codecs": [{"name": "bytes", "configuration": {"endian": "little"}}]},
        {"fill_value": "x"},
        {"fill_value": 10**400},
        {"dimension_names": ["weight"]},
        {"shape": [0, 18, 24]},
        {"shape": [2**50, 18, 24]},
        {"attributes": {"svdbank": json.loads("[" * 500 + "]" * 500)}},
    ],
    ids=lambda change: f"{next(iter(change))}-{len(str(change))}",
)
def test_vectors_whose_metadata_say_what_format_1_does_not_are_damage(
    change: dict[str, object], whole: Path, tmp_path: Path
) -> None:
    """Other Zarr readers would believe them, though the index has the right hash."""
    import time

    bank = tmp_path / "bank"
    shutil.copytree(whole, bank)
    (path,) = bank.glob("*/left/zarr.json")
    data = json.dumps(json.loads(path.read_bytes()) | change).encode()
    path.write_bytes(data)
    name = path.relative_to(bank).as_posix()
    _forge_index(bank, lambda family: family["metadata"][name].update(size=len(data), sha256=hashlib.sha256(data).hexdigest()))
    begun = time.process_time()
    if "attributes" in change:  # deep, and nothing but deep
        assert svdbank.verify(bank).sound
    else:
        opened = svdbank.open(bank)
        with pytest.raises(svdbank.DamageError):
            opened[opened.names[0]].left(2)
        assert not svdbank.verify(bank).sound
    assert time.process_time() - begun < 3
