"""``verify --source``: a bank of other triplets than the smallest does not pass, though its own writer wrote it and every hash fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

import svdbank
import svdbank.building.solving as solving
from svdbank.building.sampling import draw
from svdbank.core.basis import Basis, Triplets
from svdbank.core.errors import OptionError
from svdbank.solver import minor_basis
from svdbank_cli.main import run
from tests.building.small import write_small_checkpoint

RANK = 6


def largest(matrix: Tensor, rank: int, **options: Any) -> Basis:
    """Exact triplets, orthonormal, in their order: the largest ones, under the certificate of the smallest."""
    honest = minor_basis(matrix, rank, **options)
    left, sigma, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    chosen = slice(None, rank)
    wrong = Triplets(left.mT[chosen].flip(0).contiguous(), right[chosen].flip(0).contiguous(), sigma[chosen].flip(0))
    if honest.minor.right is None:
        wrong = Triplets(wrong.left, None, wrong.sigma)
    return Basis(wrong, honest.certificate, honest.principal)


def one_left_out(matrix: Tensor, rank: int, **options: Any) -> Basis:
    """The smallest but one, and the next one up in its place."""
    honest = minor_basis(matrix, rank + 1, **options)
    chosen = [0, *range(2, rank + 1)]
    minor = honest.minor
    right = None if minor.right is None else minor.right[chosen].contiguous()
    return Basis(Triplets(minor.left[chosen].contiguous(), right, minor.sigma[chosen]), honest.certificate, honest.principal)


def one_twice(matrix: Tensor, rank: int, **options: Any) -> Basis:
    """Each a triplet, one of them there twice."""
    minor = (honest := minor_basis(matrix, rank, **options)).minor
    chosen = [0, 0, *range(2, rank)]
    right = None if minor.right is None else minor.right[chosen].contiguous()
    return Basis(Triplets(minor.left[chosen].contiguous(), right, minor.sigma[chosen]), honest.certificate, honest.principal)


@pytest.fixture(scope="module")
def queries(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> svdbank.Bank:
    """Two families of six weights each."""
    return svdbank.build(minilm, tmp_path_factory.mktemp("queries") / "bank", rank=2, targets=("query", "value"))


SABOTEURS = {"largest": largest, "one left out": one_left_out, "one twice": one_twice}


@pytest.mark.parametrize("side", ["both", "left"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("how", SABOTEURS)
def test_a_bank_of_other_triplets_passes_every_hash_and_not_its_source(
    how: str, dtype: Any, side: Any, minilm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_small_checkpoint(tmp_path / "model", minilm)
    with monkeypatch.context() as patch:
        patch.setattr(solving, "minor_basis", SABOTEURS[how])
        bank = svdbank.build(model, tmp_path / "bank", rank=RANK, dtype=dtype, side=side)
    assert svdbank.verify(bank.path, data=True).sound
    report = svdbank.verify(bank.path, model=model)
    assert {damage.file for damage in report.damage} == {*bank} and report.proven == len(bank)
    assert run(["verify", str(bank.path), "--source", str(model)]) == 4
    honest = svdbank.build(model, tmp_path / "honest", rank=RANK, dtype=dtype, side=side)
    assert svdbank.verify(honest.path, model=model).sound


def test_a_bank_of_trained_weights_is_proven(minilm: Path, tmp_path: Path) -> None:
    """κ up to 2.5e6, biases, an embedding whose head is tied to nothing, every dtype that a bank has."""
    for dtype in ("float32", "float16", "bfloat16"):
        bank = svdbank.build(
            minilm,
            tmp_path / dtype,
            rank=20,
            principal=4,
            targets=r".*layer\.[05]\.(attention\.output|intermediate)\.dense",
            dtype=dtype,
        )  # type: ignore[arg-type]
        report = svdbank.verify(bank.path, model=minilm)
        assert report.sound and report.proven == len(bank) == 4, report.damage


def test_a_sample_is_drawn_anew_from_every_family_and_says_what_it_shows(
    queries: svdbank.Bank, minilm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bank = queries
    draws = [draw(bank, 0.2) for _ in range(8)]
    assert len({sample.names for sample in draws}) > 1
    families = {bank[name].family.name for name in bank}
    for sample in draws:
        assert {bank[name].family.name for name in sample.names} == families and len(set(sample.names)) == len(sample.names)
    # MiniLM has six of each: two of six are the least that is at least a fifth.
    assert draws[0].share == pytest.approx(1 / 3)
    # 1 − (2/3)^k reaches 95 % at k = 8 and 99 % at k = 12.
    assert draws[0].needed == {"0.95": 8, "0.99": 12}
    assert draw(bank, 1.0).needed == {"0.95": 1, "0.99": 1} and set(draw(bank, 1.0).names) == {*bank}
    assert run(["verify", str(bank.path), "--source", str(minilm), "--sample", "20%"]) == 0
    shown = capsys.readouterr().out
    assert "some of each family" in shown and "one bad weight is seen with 33.3%" in shown and "8 with 95%" in shown
    for share in (0.0, 1.5, -1.0, float("nan")):
        with pytest.raises(OptionError, match="more than 0 and at most 1"):
            draw(bank, share)
    with pytest.raises(OptionError, match="against their model"):
        svdbank.verify(bank.path, sample=0.5)
    assert run(["verify", str(bank.path), "--source", str(minilm), "--sample", "5"]) == 2


def test_the_stated_chance_is_no_larger_than_the_true_one(queries: svdbank.Bank) -> None:
    """k bad weights put where they are hardest to see, drawn many times over: the bound holds to three standard deviations."""
    bank = queries
    largest_family = max((family.spec.weights for family in bank.index.families), key=len)
    bad, draws = set(largest_family[:3]), 400
    seen = sum(bool(bad & set(draw(bank, 0.2).names)) for _ in range(draws))
    share = draw(bank, 0.2).share
    claimed = 1 - (1 - share) ** 3
    assert seen / draws >= claimed - 3 * (claimed * (1 - claimed) / draws) ** 0.5


def test_a_harmed_chunk_is_in_the_report_of_source_too(minilm: Path, tmp_path: Path) -> None:
    model = write_small_checkpoint(tmp_path / "model", minilm)
    bank = svdbank.build(model, tmp_path / "bank", rank=RANK)
    (shard,) = bank.path.glob("*/left/c/1/0/0")
    data = bytearray(shard.read_bytes())
    data[40] ^= 1
    shard.write_bytes(data)
    report = svdbank.verify(bank.path, model=model)
    assert not report.sound and [damage.file for damage in report.damage] == [bank.names[1]]
    assert msgspec.json.decode(msgspec.json.encode(report))["proven"] == 2
