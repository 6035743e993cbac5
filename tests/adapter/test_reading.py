"""Any LoRA folder becomes an adapter; what lies in the bank is found there, whoever saved it; tensors win over what is written beside."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import svdbank
from svdbank.adapter.bands import recover
from svdbank.adapter.components import Free, InBank
from svdbank.adapter.experts import join, split
from svdbank.adapter.reading import read_adapter
from svdbank.adapter.settings import CACHE, COMPONENTS, CONFIG, WEIGHTS
from svdbank.adapter.writing import write_adapter
from svdbank.bank.reading import Bank
from svdbank.core.errors import CheckpointError, DamageError, OptionError, WrongBaseError
from tests.peft.models import quiet, without_svd

QUERY = "encoder.layer.0.attention.self.query"

#: One rounding to float32 of products of float32 numbers.
ROUNDING = 1e-6


def bert(minilm: Path) -> torch.nn.Module:
    from transformers import AutoModel

    with quiet():
        return AutoModel.from_pretrained(minilm)


def dense(folder: Path, module: str = QUERY, scale: float = 1.0) -> torch.Tensor:
    tensors = load_file(folder / WEIGHTS)
    A, B = (tensors[f"base_model.model.{module}.lora_{side}.weight"].double() for side in "AB")
    return scale * B @ A


def near(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return float((found.double() - expected).norm()) <= ROUNDING * float(expected.norm())


def test_an_adapter_is_read_in_its_band_and_means_what_its_files_say(trained: Callable[..., Path], pair_bank: Bank) -> None:
    folder = trained("law", alpha=6, band="8:12", rank=None)
    for bank in (None, pair_bank):
        adapter = read_adapter(folder, bank=bank)
        component = adapter.weights[QUERY].components["law"]
        assert isinstance(component, InBank) and component.bands == ((8, 12),) and component.orthonormal
        assert near(adapter.delta(QUERY), dense(folder, scale=6 / 4))
        assert adapter.notes == (f"law: its bytes are unchecked: {WEIGHTS} was written anew since, by another program",)
    assert adapter.method == "mica" and len(adapter.weights) == 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_that_peft_saved_again_is_found_in_the_bank(
    dtype: torch.dtype, trained: Callable[..., Path], pair_bank: Bank, minilm: Path, tmp_path: Path
) -> None:
    folder = trained("law", rslora=True, alpha=8)
    model = peft.PeftModel.from_pretrained(bert(minilm), folder, low_cpu_mem_usage=True)
    model.to(dtype).save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again" / CACHE).exists()
    adapter = read_adapter(tmp_path / "again", bank=pair_bank)
    for key, weight in adapter.weights.items():
        (component,) = weight.components.values()
        assert isinstance(component, InBank) and component.bands == ((0, 4),), key
        # bfloat16 moved the directions; they are kept as the file has them.
        assert component.orthonormal == (dtype == torch.float32)
        assert near(adapter.delta(key), dense(tmp_path / "again", key, scale=8 / 2))


def test_signs_order_and_lengths_of_columns_are_folded_into_the_coefficients(pair_bank: Bank) -> None:
    left = pair_bank.left([f"{QUERY}.weight"], 40)[f"{QUERY}.weight"].mT.flip(0)
    rows, lengths = [30, 2, 17], torch.tensor([-2.0, 0.3, 1.0])
    B = left[rows].mT * lengths
    A = torch.randn(3, 384, generator=torch.Generator().manual_seed(0))
    component = recover(A, B, 0.5, left)
    assert isinstance(component, InBank) and component.indices == (2, 17, 30)
    assert near(component.left @ component.C, 0.5 * B.double() @ A.double())
    turned, _ = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(1)))
    rotated = recover(A, left[rows].mT @ turned, 1.0, left)
    assert isinstance(rotated, InBank) and rotated.indices == (2, 17, 30) and rotated.max_rank == 3
    outside = recover(A, torch.linalg.qr(torch.randn(384, 3, generator=torch.Generator().manual_seed(2)))[0], 1.0, left)
    assert isinstance(outside, Free)


def test_a_foreign_lora_is_never_projected(pair_bank: Bank, minilm: Path, tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["query", "value"], rank_pattern={"value": 2}, init_lora_weights=False
    )
    peft.get_peft_model(bert(minilm), config).save_pretrained(tmp_path / "foreign")
    adapter = read_adapter(tmp_path / "foreign", bank=pair_bank)
    assert all(isinstance(c, Free) for weight in adapter.weights.values() for c in weight.components.values())
    assert near(adapter.delta(QUERY), dense(tmp_path / "foreign", scale=6 / 4))
    value = QUERY.replace("query", "value")
    assert near(adapter.delta(value), dense(tmp_path / "foreign", value, scale=6 / 2))
    share = adapter.share_in(pair_bank)[QUERY]
    assert 0.02 < share < 0.3  # 40 of 384 directions hold about a tenth of a random matrix
    with pytest.raises(OptionError, match="of what it does to"):
        adapter.rebase(pair_bank)
    forced = adapter.rebase(pair_bank, force=True)
    assert forced.norm() ** 2 == pytest.approx(
        sum(s * float(adapter.delta(k).double().square().sum()) for k, s in adapter.share_in(pair_bank).items()), rel=1e-5
    )


def test_a_cache_that_contradicts_the_tensors_is_not_believed(trained: Callable[..., Path], pair_bank: Bank) -> None:
    folder = trained("law")
    cache = json.loads((folder / CACHE).read_text())
    cache["components"]["law"] = {key: [[4, 8]] for key in cache["components"]["law"]}
    (folder / CACHE).write_text(json.dumps(cache | {"digest": ""}))
    adapter = read_adapter(folder, bank=pair_bank)
    assert adapter.bands(QUERY) == ((0, 4),)
    assert any("contradicts the tensors" in note for note in adapter.notes)


def test_parts_beside_a_sum_are_kept_and_dropped_when_the_sum_has_changed(
    trained: Callable[..., Path], pair_bank: Bank, tmp_path: Path
) -> None:
    law, med = trained("law", 1), trained("med", 2, beside=[tmp_path / "law"])
    stack = read_adapter(law, bank=pair_bank) + read_adapter(med, bank=pair_bank)
    assert stack.bands(QUERY) == ((0, 8),)
    write_adapter(stack, tmp_path / "stack")
    for bank in (None, pair_bank):
        again = read_adapter(tmp_path / "stack", bank=bank)
        assert again.names == ("law", "med")
        assert torch.equal(again.drop("med").delta(QUERY), read_adapter(law).delta(QUERY))
    tensors = load_file(tmp_path / "stack" / WEIGHTS)
    key = f"base_model.model.{QUERY}.lora_A.weight"
    save_file({**tensors, key: tensors[key] + 1e-3}, tmp_path / "stack" / WEIGHTS)
    changed = read_adapter(tmp_path / "stack", bank=pair_bank)
    assert changed.names == ("stack",) and any("do not add up" in note for note in changed.notes)
    assert near(changed.delta(QUERY), dense(tmp_path / "stack"))


def test_peft_loads_what_was_written_without_an_svd_and_applies_the_sum(
    trained: Callable[..., Path], pair_bank: Bank, minilm: Path, tmp_path: Path
) -> None:
    mixed = read_adapter(trained("law", 1, alpha=3), bank=pair_bank) + 0.5 * read_adapter(
        trained("wide", 2, rank=6, targets=("query",)), bank=pair_bank
    )
    write_adapter(mixed.truncate(5), tmp_path / "out")
    with without_svd():
        model = peft.PeftModel.from_pretrained(bert(minilm), tmp_path / "out")
    base = bert(minilm).get_submodule(QUERY).weight
    merged = model.merge_and_unload().get_submodule(QUERY).weight
    assert torch.allclose(merged - base, mixed.truncate(5).delta(QUERY), atol=1e-6)  # the sum's rounding at |W| < 1
    assert read_adapter(tmp_path / "out", bank=pair_bank).names == mixed.truncate(5).names


def test_the_bank_of_another_base_is_refused(
    trained: Callable[..., Path], pair_bank: Bank, minilm: Path, tmp_path: Path
) -> None:
    model = bert(minilm)
    with torch.no_grad():
        model.get_submodule(QUERY).weight[0, 0] += 1
    model.save_pretrained(tmp_path / "other")
    other = svdbank.build(tmp_path / "other", tmp_path / "other-bank", rank=40, targets=("query", "value"))
    folder = trained("law")
    with pytest.raises(WrongBaseError) as caught:
        read_adapter(folder, bank=other)
    assert caught.value.exit_code == 12
    moved = read_adapter(folder).rebase(other, minimum_share=0.9, force=True)
    assert moved.weights[QUERY].source != read_adapter(folder).weights[QUERY].source and "share kept" in moved.notes[-1]
    with pytest.raises(WrongBaseError):
        moved + read_adapter(folder)


def test_what_is_no_sum_of_low_rank_is_refused(trained: Callable[..., Path]) -> None:
    folder = trained("law")
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "use_dora": True}))
    with pytest.raises(CheckpointError, match="DoRA"):
        read_adapter(folder)


@pytest.mark.parametrize("kind", ["olora", "corda", "loftq", "lora_ga", "pissa_niter_4"])
def test_what_belongs_to_a_changed_base_is_refused(kind: str, trained: Callable[..., Path]) -> None:
    """PEFT subtracted from the base what these started from: their B·A alone is no change of the base that the folder names."""
    folder = trained("law")
    (folder / CACHE).unlink()
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "init_lora_weights": kind}))
    with pytest.raises(CheckpointError, match="changed the base") as caught:
        read_adapter(folder)
    assert "path_initial_model_for_weight_conversion" in (caught.value.hint or "")


def test_damaged_parts_are_damage_and_lost_ones_too(trained: Callable[..., Path], tmp_path: Path) -> None:
    write_adapter(read_adapter(trained("law", 1)) + read_adapter(trained("med", 2)), tmp_path / "stack")
    (tmp_path / "stack" / COMPONENTS).write_bytes(b"nothing")
    with pytest.raises(DamageError, match=COMPONENTS):
        read_adapter(tmp_path / "stack")
    (tmp_path / "stack" / COMPONENTS).unlink()
    with pytest.raises(DamageError, match="missing"):
        svdbank.compare([tmp_path / "stack"])


def test_stacked_experts_come_apart_as_peft_puts_them_together() -> None:
    generator = torch.Generator().manual_seed(0)
    experts, rank = 3, 2
    A, B = torch.randn(experts * rank, 7, generator=generator), torch.randn(5, rank * experts, generator=generator)
    # PEFT's own formula (ParamWrapper.get_delta_weight).
    theirs = torch.einsum("o r e, e r i -> e o i", B.reshape(5, -1, experts), A.reshape(experts, -1, 7))
    pairs = split(A, B, rank, "here")
    assert all(torch.allclose(b @ a, theirs[e], atol=1e-6) for e, (a, b) in enumerate(pairs))
    again = join(pairs)
    assert torch.equal(again[0], A) and torch.equal(again[1], B)


def test_a_matrix_stands_on_no_direction_of_a_basis_of_the_whole_space() -> None:
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(24, 24, generator=generator))[0]
    A, B = torch.randn(4, 30, generator=generator), torch.randn(24, 4, generator=generator)
    assert isinstance(recover(A, B, 1.0, left), Free)
    on_some = recover(A, left[3:9].mT @ torch.randn(6, 4, generator=generator), 1.0, left)
    assert isinstance(on_some, InBank) and on_some.bands == ((3, 9),)
