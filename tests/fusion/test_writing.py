"""What a fuse leans on when several threads read: hashes in any order, and copies where the system can and cannot."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest

from svdbank.checkpoint.writing.blocks import Piece, cut
from svdbank.checkpoint.writing.hashes import Hashes
from svdbank.core import disk
from svdbank.core.specs import TensorSource, WeightSpec


@pytest.mark.parametrize("system", ["as it is", "EXDEV", "absent"])
def test_bytes_of_another_file_arrive_whatever_the_system_can(
    system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> int:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    if system == "EXDEV":
        monkeypatch.setattr(os, "copy_file_range", refused, raising=False)
    elif system == "absent":
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    data = os.urandom(3 << 20)
    (tmp_path / "source").write_bytes(data)
    with (tmp_path / "source").open("rb") as source, disk.creating(tmp_path / "target") as target:
        target.append(b"head")
        assert target.append_from(source.fileno(), 5, 2 << 20) == 2 << 20
        assert target.append_from(source.fileno(), len(data) - 10, 100) == 10
    assert (tmp_path / "target").read_bytes() == b"head" + data[5 : 5 + (2 << 20)] + data[-10:]


@pytest.mark.parametrize("backwards", [False, True])
def test_a_weight_has_its_hash_in_whatever_order_its_blocks_are_read(backwards: bool) -> None:
    rows, columns = 4096, 4096
    source = TensorSource("w", "f", "BF16", (rows, columns), 100, 100 + 2 * rows * columns)
    spec = WeightSpec(
        name="w", module="w", kind="linear", family="", out_features=rows, in_features=columns, dtype="BF16", sources=(source,)
    )
    blocks = list(cut(source, Piece(spec, 0, source, slice(0, rows))))
    assert len(blocks) > 4
    data = os.urandom(2 * rows * columns)
    hashes = Hashes(["w"], blocks)
    for block in reversed(blocks) if backwards else blocks:
        hashes.feed(block, memoryview(data)[block.begin - 100 : block.end - 100])
    # No checkpoint is at hand: a weight that had to be read again would fail.
    assert hashes.final(spec, None) == hashlib.sha256(data).hexdigest()  # type: ignore[arg-type]
