"""A bank of format 1 written once and kept: every later version must read the same numbers from it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import svdbank

FROZEN = Path(__file__).parents[1] / "data" / "format-1"
QUERY = "encoder.layer.0.attention.self.query.weight"


def test_the_frozen_bank_still_reads(tmp_path: Path) -> None:
    """Two weights of 24 x 40, rank 18, both sides, float32; values as they were on the day it was written."""
    bank = svdbank.open(shutil.copytree(FROZEN, tmp_path / "bank"))
    assert svdbank.verify(bank.path, data=True).sound
    assert (len(bank), bank.rank, bank.side, bank.dtype) == (2, 18, "both", "float32")
    assert bank.base_digest() == "ed13d3585a782eb2f2cc3575172c74f314bd6c1bfb40291eef2dffd4ae1a58d0"
    basis = bank[QUERY]
    assert basis.sigma(18)[-1].item() == 0.12111283628367467
    # float32 values printed in full: equal, not close.
    assert basis.left(1)[:3, 0].tolist() == [0.1502745896577835, -0.14440731704235077, -0.0977434366941452]
    assert basis.right(18)[0, :3].tolist() == [0.1593630015850067, 0.010623475536704063, -0.024434547871351242]


def test_today_writes_what_the_frozen_bank_holds(minilm: Path, tmp_path: Path) -> None:
    """Same files by name: a change of the layout is a change of the format. The vectors' last bits may differ by processor."""
    from tests.building.small import tree, write_small_checkpoint

    bank = svdbank.build(write_small_checkpoint(tmp_path / "model", minilm), tmp_path / "bank", rank=18)

    def names(folder: Path) -> set[str]:
        return {name for name in tree(folder) if not name.startswith("index-")}

    assert names(bank.path) == names(FROZEN)
    frozen = svdbank.open(shutil.copytree(FROZEN, tmp_path / "frozen"))
    for name in bank:
        assert bank[name].source_sha256 == frozen[name].source_sha256
        # Both are float32 roundings of the same float64 subspace: 2⁻²⁴ an entry, with room for one more bit.
        assert (bank[name].sigma(18) - frozen[name].sigma(18)).abs().max().item() == pytest.approx(0, abs=1e-12)
        assert (bank[name].left(18) - frozen[name].left(18)).abs().max().item() < 1e-6
