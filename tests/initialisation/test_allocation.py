"""Bands that leave others alone, ranks under a budget, and what else ``init`` is asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import svdbank
from svdbank.adapter.methods import count_floored, initial_factors, residual
from svdbank.adapter.settings import CONFIG
from svdbank.bank.reading import Bank
from svdbank.core.errors import BankError, OptionError, WrongBaseError
from svdbank.initialisation.allocation import first_free, next_bands, ranks_within
from svdbank_cli.main import run


def test_the_lowest_gap_that_is_wide_enough_is_taken() -> None:
    assert first_free([], 4) == 0
    assert first_free([(0, 4)], 4) == 4
    assert first_free([(2, 4), (8, 9)], 3) == 4
    assert first_free([(4, 8)], 4) == 0


def test_adapters_beside_each_other_have_orthogonal_outputs(
    trained: Callable[..., Path], pair_bank: Bank, tmp_path: Path
) -> None:
    law = trained("law", 1)
    med = trained("med", 2, beside=[law])
    code = trained("code", 3, beside=[law, med], band="auto", rank_pattern={"value": 2})
    read = [svdbank.read_adapter(folder, bank=pair_bank) for folder in (law, med, code)]
    key = "encoder.layer.2.attention.self.value"
    assert [adapter.bands(key) for adapter in read] == [((0, 4),), ((4, 8),), ((8, 10),)]
    outputs = torch.cat([adapter.factors(key)[1].double() for adapter in read], dim=1)
    assert float((outputs.mT @ outputs - torch.eye(10)).abs().max()) < 1e-6  # orthonormal to float32 rounding
    with pytest.raises(BankError, match="no free band of rank 38"):
        next_bands(pair_bank, {f"{key}.weight": 38}, read[:1])


def test_a_budget_is_one_level_of_relative_sigma(pair_bank: Bank) -> None:
    ranks = ranks_within(pair_bank, pair_bank.names, 60_000, "mica")
    spent = sum(rank * pair_bank[name].in_features for name, rank in ranks.items())
    assert 60_000 - 384 < spent <= 60_000 and len(set(ranks.values())) > 1
    relative = {n: pair_bank.sigma([n], 40)[n].flip(0) / pair_bank[n].certificate.sigma_max for n in ranks}
    highest_taken = max(float(relative[n][rank - 1]) for n, rank in ranks.items() if rank > 1)
    lowest_left = min(float(relative[n][rank]) for n, rank in ranks.items() if rank < 40)
    assert highest_taken <= lowest_left
    assert ranks_within(pair_bank, pair_bank.names, 10**9, "mica") == dict.fromkeys(pair_bank.names, 40)
    both = ranks_within(pair_bank, pair_bank.names, 60_000, "milora")
    assert sum(both.values()) == sum(ranks.values()) // 2  # both factors train, and the weights are square
    with pytest.raises(OptionError, match="takes 4608"):
        ranks_within(pair_bank, pair_bank.names, 4607, "mica")


def test_a_budget_on_the_command_line_is_shown(pair_bank: Bank, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["init", str(pair_bank.path), "--params", "60k", "-o", str(tmp_path / "a")]) == 0
    shown = capsys.readouterr().out
    assert "median" in shown and "query" in shown and "parameters train" in shown
    assert run(["init", str(pair_bank.path), "--params", "60k", "-o", str(tmp_path / "b"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["trainable_parameters"] <= 60_000 and len(report["ranks"]) == 12


def test_patterns_layers_and_exclusions_choose_as_peft_does(pair_bank: Bank, tmp_path: Path) -> None:
    report = svdbank.init(
        pair_bank,
        output=tmp_path / "a",
        rank=6,
        layers=(1, 2),
        exclude=["layer.2.attention.self.value"],
        rank_pattern={"value": 3},
        alpha_pattern={"query": 12},
    )
    assert sorted(report.ranks.values()) == [3, 6, 6]
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    assert config["r"] == 6 and config["lora_alpha"] == 12 and list(config["rank_pattern"].values()) == [3]
    assert list(config["alpha_pattern"].values()) == [3]


@pytest.mark.parametrize(
    "options, said",
    [
        ({"params": 60_000, "rank": 4}, "chooses the ranks"),
        ({"band": "4"}, "is no band"),
        ({"band": "4:4"}, "is empty"),
        ({"band": "0:4", "rank": 8}, "contradict"),
        ({"band": "0:4", "method": "milora"}, "bands are MiCA's"),
        ({"layers": (7,)}, "layers 0 to 5"),
        ({"exclude": "key"}, "leaves nothing out"),
        ({"rank_pattern": {"key": 4}}, "matches none"),
        ({"residual_out": "x"}, "no residual"),
        ({"residual_out": "x", "method": "milora"}, "does not say where"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(
    options: dict[str, object], said: str, pair_bank: Bank, tmp_path: Path
) -> None:
    with pytest.raises(OptionError) as caught:
        svdbank.init(pair_bank, output=tmp_path / "a", **options)  # type: ignore[arg-type]
    assert said in f"{caught.value} {caught.value.hint}"
    assert not (tmp_path / "a").exists()


def test_a_residual_of_another_base_never_appears(pair_bank: Bank, minilm: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_bytes((minilm / "config.json").read_bytes())
    tensors = load_file(minilm / "model.safetensors")
    tensors["encoder.layer.3.attention.self.value.weight"][5, 5] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WrongBaseError, match=r"layer\.3\.attention\.self\.value"):
        svdbank.init(
            pair_bank, output=tmp_path / "a", method="milora", rank=4, residual_out=tmp_path / "r", base_model=str(other)
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other"]


@pytest.mark.parametrize("scale", [0.25, 1.0, 3.0])
def test_the_residual_does_not_depend_on_the_scale_and_zeros_are_floored(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(30, 18, generator=generator) @ torch.diag(torch.cat([torch.ones(15), torch.zeros(3)]))
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    left, sigma, right = U[:, -6:], S[-6:], Vh[-6:].mT
    A, B = initial_factors("milora", left, sigma, right, scale, sigma_max=float(S[0]))
    assert count_floored(sigma, float(S[0])) == 3
    assert bool((A.norm(dim=1) > 0).all()) and bool((B.norm(dim=0) > 0).all())
    expected = W.double() - (left * sigma) @ right.mT
    # The floor leaves 1e-6 σ_max in three directions; float32 rounds the rest.
    assert float((residual(W, A, B, scale).double() - expected).norm()) < 3e-6 * float(S[0])
    assert torch.allclose(residual(W, A, B, scale) + scale * B @ A, W, atol=1e-6)
