"""What a lookup returns, and what it refuses."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import svdbank
from tests.building.small import write_small_checkpoint


@pytest.fixture(scope="module")
def bank(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> svdbank.Bank:
    """Two weights of 24 x 40 at rank 18: two rank chunks, the second partly filled."""
    folder = tmp_path_factory.mktemp("lookup")
    return svdbank.build(write_small_checkpoint(folder / "model", minilm), folder / "bank", rank=18)


def test_rank_r_is_a_prefix_of_every_larger_rank(bank: svdbank.Bank) -> None:
    basis = bank[bank.names[0]]
    for side in (basis.left, basis.right):
        for rank in range(1, 18):
            assert torch.equal(side(rank), side(18)[:, -rank:])
    assert torch.equal(basis.sigma(7), basis.sigma(18)[-7:])


def test_the_last_column_is_the_most_minor_direction(bank: svdbank.Bank, minilm: Path) -> None:
    basis = bank[bank.names[0]]
    assert bool((basis.sigma(18)[:-1] >= basis.sigma(18)[1:]).all())
    assert float(basis.sigma(18)[-1]) == pytest.approx(basis.certificate.sigma_min, rel=1e-12)


def test_a_bulk_read_returns_what_single_reads_return_in_the_order_asked(bank: svdbank.Bank) -> None:
    names = list(reversed(bank.names))
    for method in ("left", "right", "sigma"):
        many = getattr(bank, method)(names, 5)
        assert list(many) == names
        for name in names:
            assert torch.equal(many[name], getattr(bank[name], method)(5))
    assert torch.equal(bank.probes(names)[names[0]], bank[names[0]].probe())


def test_rows_are_as_stored_most_minor_first(bank: svdbank.Bank) -> None:
    for array in ("left", "right"):
        rows = bank.rows(array, bank.names, 5)
        for name in bank:
            assert torch.equal(rows[name], getattr(bank[name], array)(5).mT.flip(0))
            assert torch.equal(bank.rows(array, [name])[name], getattr(bank[name], array)(18).mT.flip(0))
    for name, values in bank.rows("sigma", bank.names).items():
        assert torch.equal(values, bank[name].sigma(18).flip(0)) and bool((values[:-1] <= values[1:]).all())


def test_what_a_caller_does_to_numbers_it_got_stays_with_the_caller(bank: svdbank.Bank) -> None:
    name = bank.names[0]
    kept = bank[name].sigma(18).clone()
    for read in (lambda: bank.rows("sigma", [name])[name], lambda: bank[name].sigma(18)):
        read().zero_()
        assert torch.equal(bank[name].sigma(18), kept)


def test_left_vectors_have_canonical_signs(bank: svdbank.Bank) -> None:
    for name in bank:
        left = bank[name].left(18)
        largest = left.gather(0, left.abs().argmax(0, keepdim=True))
        assert bool((largest > 0).all())


def test_a_rank_that_is_not_stored_is_refused_with_the_numbers(bank: svdbank.Bank) -> None:
    with pytest.raises(svdbank.OptionError, match=r"rank 19 .* outside 1\.\.18") as caught:
        bank[bank.names[0]].left(19)
    assert "--rank 19" in str(caught.value.hint)
    with pytest.raises(svdbank.OptionError, match="rank 0"):
        bank[bank.names[0]].left(0)
    with pytest.raises(svdbank.OptionError, match="rank 25") as caught:
        bank.left(bank.names, 25)
    assert "no more than 24" in str(caught.value.hint)


def test_a_name_that_is_not_there_is_answered_with_the_closest_one(bank: svdbank.Bank) -> None:
    with pytest.raises(svdbank.BankError) as caught:
        bank["encoder.layer.0.attention.self.quer.weight"]
    assert "encoder.layer.0.attention.self.query.weight" in str(caught.value.hint)


def test_a_bank_of_left_vectors_has_no_right_ones(minilm: Path, tmp_path: Path) -> None:
    model = write_small_checkpoint(tmp_path / "model", minilm)
    bank = svdbank.build(model, tmp_path / "bank", rank=4, side="left")
    with pytest.raises(svdbank.OptionError, match="left vectors only"):
        bank.right(bank.names, 2)
    assert not list(tmp_path.glob("bank/*/right"))


def test_a_rank_16_lookup_reads_no_bytes_of_higher_ranks(minilm: Path, tmp_path: Path) -> None:
    """Damage in the second rank chunk: the first sixteen ranks still read, the seventeenth is an error."""
    model = write_small_checkpoint(tmp_path / "model", minilm)
    bank = svdbank.build(model, tmp_path / "bank", rank=18)
    file = next(iter(sorted(bank.path.glob("*/left/c/0/0/0"))))
    data = bytearray(file.read_bytes())
    data[16 * 24 * 4 + 4 + 10] ^= 1  # just behind the first chunk and its crc
    file.write_bytes(data)
    bank = svdbank.open(tmp_path / "bank")
    bank[bank.names[0]].left(16)
    with pytest.raises(svdbank.DamageError):
        bank[bank.names[0]].left(17)


def test_principal_triplets_are_kept_on_request(minilm: Path, tmp_path: Path) -> None:
    import zarr

    model = write_small_checkpoint(tmp_path / "model", minilm)
    bank = svdbank.build(model, tmp_path / "bank", rank=4, principal=3)
    (family,) = bank.index.families
    group = zarr.open_group(tmp_path / "bank" / family.spec.name, mode="r")
    assert group["principal_left"].shape == (2, 3, 24)
    assert group["principal_right"].shape == (2, 3, 40)
    sigma = group["principal_sigma"][:]
    for row, weight in enumerate(family.weights):
        assert sigma[row][0] == weight.certificate.sigma_max
    assert (sigma[:, :-1] >= sigma[:, 1:]).all()


def test_many_weights_share_files_and_read_back_the_same(minilm: Path, tmp_path: Path) -> None:
    """A family beyond the size of a file a weight: shards of several weights, the last one partly filled."""
    from svdbank.bank import layout

    count = layout.SINGLE_SHARD_WEIGHTS + 5
    model = write_small_checkpoint(tmp_path / "model", minilm, layers=count, out=6, width=8)
    bank = svdbank.build(model, tmp_path / "bank", rank=3)
    (family,) = bank.index.families
    assert family.spec.weights_per_shard > 1
    assert len(list(bank.path.glob("*/left/c/*/0/0"))) == -(-count // family.spec.weights_per_shard)
    alone = write_small_checkpoint(tmp_path / "alone", minilm, layers=6, out=6, width=8)
    single = svdbank.build(alone, tmp_path / "single", rank=3)
    for name in single:
        assert torch.equal(bank[name].left(3), single[name].left(3))
    assert svdbank.verify(bank.path, data=True).sound


def test_the_base_digest_of_a_subset_does_not_depend_on_what_else_the_bank_holds(minilm: Path, tmp_path: Path) -> None:
    model = write_small_checkpoint(tmp_path / "model", minilm)
    one = svdbank.build(model, tmp_path / "one", rank=2, targets=(r".*layer\.0\..*",))
    digest = one.base_digest()
    both = svdbank.build(model, tmp_path / "one", rank=2)
    assert both.base_digest() != digest
    assert both.base_digest(one.names) == digest


def test_a_moved_bank_is_the_same_bank(bank: svdbank.Bank, tmp_path: Path) -> None:
    shutil.copytree(bank.path, tmp_path / "moved")
    moved = svdbank.open(tmp_path / "moved")
    assert torch.equal(moved[bank.names[1]].left(9), bank[bank.names[1]].left(9))
