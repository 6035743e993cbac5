"""The spectrum as data: what the table says is what NumPy finds in the weights, and every way out of it says the same."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import svdbank
from svdbank.bank.spectrum import rank_marks
from svdbank_cli.main import run
from tests.building.small import write_made_checkpoint

#: Singular values of weights that are made: 20 ordinary ones; two equal ones; one that is 0.
SIGMA = [
    [float(20 - i) for i in range(20)],
    [*(float(20 - i) for i in range(16)), 3.0, 2.0, 2.0, 1.0],
    [*(float(20 - i) for i in range(19)), 0.0],
]


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> svdbank.Bank:
    """Of 24x40: 20 singular values that were made, and four that are 0."""
    folder = tmp_path_factory.mktemp("spectrum")
    return svdbank.build(write_made_checkpoint(folder / "model", SIGMA), folder / "bank", rank=8)


def test_the_table_says_what_numpy_finds(bank: svdbank.Bank) -> None:
    rows = bank.spectrum()
    assert [row.name for row in rows] == list(bank) and [row.layer for row in rows] == [0, 1, 2]
    for row in rows:
        ladder = sorted([0.0] * 4 + SIGMA[row.layer])  # type: ignore[index]
        assert row.role == "query" and (row.out_features, row.in_features, row.rank) == (24, 40, 8)
        # float64 rounding of a product of three matrices with σ_max 20: some 1e-14.
        assert row.sigma_max == pytest.approx(20) and row.sigma_min == pytest.approx(0, abs=1e-13)
        assert row.sigma_rank == pytest.approx(ladder[7], rel=1e-12) and row.sigma_next == pytest.approx(ladder[8], rel=1e-12)
        assert row.gap == pytest.approx((ladder[8] - ladder[7]) / 20, rel=1e-10) and row.condition > 1e14
    # Ranks 1 to 3 lie among the zeros; with another zero, rank 4 too; between two equal σ, rank 6.
    assert [row.unresolved for row in rows] == [3, 4, 4] and [row.resolved_rank for row in rows] == [8, 8, 8]


def test_a_data_frame_and_csv_hold_the_same(bank: svdbank.Bank, capsys: pytest.CaptureFixture[str]) -> None:
    rows = bank.spectrum()
    frame = rows.to_pandas()
    assert list(frame.columns) == list(rows.columns) and len(frame) == 3
    assert str(frame.layer.dtype) == "Int64" and frame.expert.isna().all()
    assert frame.sigma_next.tolist() == [row.sigma_next for row in rows]
    capsys.readouterr()
    assert run(["info", str(bank.path), "--csv"]) == 0
    read = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [float(row["sigma_rank"]) for row in read] == [row.sigma_rank for row in rows]
    assert {row["expert"] for row in read} == {""}


def test_weights_are_a_row_each_also_as_json(bank: svdbank.Bank, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["info", str(bank.path), "--weights"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in bank)
    assert run(["info", str(bank.path), "--weights", "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == list(bank)
    assert run(["info", str(bank.path), "--weights", "--csv"]) == 2


def test_xarray_opens_the_bank_and_reads_the_same_numbers(bank: svdbank.Bank) -> None:
    import xarray

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Object at .* is not recognized")  # the bank's own JSON files
        tree = xarray.open_datatree(bank.path, engine="zarr", consolidated=False)
    (family,) = tree.children.values()
    assert family.attrs["weights"] == list(bank)
    assert family.left.dims == ("weight", "rank", "out") and family.left.shape == (3, 8, 24)
    stored = bank.rows("sigma", bank.names)
    assert np.array_equal(family.sigma.values, torch.stack(list(stored.values())).numpy())
    assert np.array_equal(family.sigma_max.values, [bank[name].certificate.sigma_max for name in bank])


def test_info_draws_every_family_and_says_what_lookups_read(bank: svdbank.Bank, capsys: pytest.CaptureFixture[str]) -> None:
    info = svdbank.info(bank.path)
    (family,) = info.families
    assert [mark for mark, _ in family.curve] == [1, 2, 3, 4, 6, 8]
    assert family.curve[-1][1] == pytest.approx(4 / 20, rel=1e-12)  # the median of 4/20, 3/20 and 4/20 is of layer 0 and 2
    assert [(size.rank, size.left, size.both) for size in info.sizes] == [(8, 3 * 16 * 24 * 4, 3 * 16 * (24 + 40) * 4)]
    assert run(["info", str(bank.path)]) == 0
    shown = capsys.readouterr().out
    (row,) = [line for line in shown.splitlines() if "query-24x40" in line]
    assert any(ch in row for ch in "▁▂▃▄▅▆▇█") and "rank  MiCA reads" in shown and "4.6 kB" in shown


def test_marks_are_ascending_and_end_at_the_rank() -> None:
    assert rank_marks(1) == (1,) and rank_marks(2) == (1, 2) and rank_marks(18) == (1, 2, 3, 4, 6, 8, 12, 16, 18)
    for rank in range(1, 300):
        marks = rank_marks(rank)
        assert marks[-1] == rank and list(marks) == sorted(set(marks)) and len(marks) <= 2 * math.log2(rank) + 2


def test_without_pandas_the_error_names_the_command(bank: svdbank.Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(svdbank.MissingExtraError) as caught:
        bank.spectrum().to_pandas()
    assert "svdbank[data]" in str(caught.value.hint)


def test_the_spectrum_needs_neither_torch_nor_numpy() -> None:
    frozen = Path(__file__).parents[1] / "data" / "format-1"
    probe = f"import sys, svdbank; rows = svdbank.open({str(frozen)!r}).spectrum(); rows.to_csv()"
    probe += "\nprint(len(rows), [name for name in ('torch', 'numpy', 'zarr', 'pandas') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True).stdout == "2 []\n"
