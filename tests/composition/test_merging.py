"""A merge is the weighted sum of what the files hold, whatever ranks, scales, bands and programs they come from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft.utils import merge_utils
from safetensors.torch import load_file, save_file

import svdbank
from svdbank.adapter.model import Adapter
from svdbank.adapter.reading import read_adapter
from svdbank.adapter.settings import WEIGHTS
from svdbank.bank.reading import Bank
from svdbank.composition.inputs import read_inputs
from svdbank.composition.merging import MergeMethod, merged
from svdbank.composition.sparsification import dropped, elected, trimmed
from svdbank.core.errors import BankError, OptionError, WrongBaseError
from svdbank.core.places import named_place
from svdbank_cli.main import run
from tests.composition.conftest import dense, dense_sum, relative_error

#: What the sum of float32 factors in float64 loses when it is rounded to float32 once or twice: 6e-8 each, so 1e-6 is generous.
EXACT = 1e-6

GROUPS = [
    ["law", "code"],
    ["law", "med"],
    ["law", "plain"],
    ["law", "code", "med"],
    ["law", "code", "med", "news", "chat", "verse", "plain"],
]


@pytest.mark.parametrize("names", GROUPS, ids="+".join)
def test_a_merge_is_the_dense_sum(names: list[str], trained: dict[str, Path], tmp_path: Path) -> None:
    weights = [0.7, -0.4, 0.2, 1.3, 0.1, 0.5, 0.9][: len(names)]
    folders = [trained[name] for name in names]
    report = svdbank.merge(folders, output=tmp_path / "merged", weights=weights)
    assert relative_error(dense(tmp_path / "merged"), dense_sum(folders, weights)) < EXACT
    assert report.weights == dict(zip(names, weights, strict=True)) and report.error == 0.0


def test_eight_adapters_merge_a_milora_among_them(trained: dict[str, Path], small_bank: Bank, tmp_path: Path) -> None:
    names = list(trained)
    report = svdbank.merge(list(trained.values()), output=tmp_path / "merged", weights=[0.5] * 8, bank=small_bank)
    others = [name for name in names if name != "milo"]
    wanted = dense_sum([trained[name] for name in others], [0.5] * 7)
    # MiLoRA on the unchanged base is s (B A − B₀ A₀), with the start from the bank.
    for module, delta in dense(trained["milo"]).items():
        basis = small_bank[f"{module}.weight"]
        left, right, sigma = (basis.left(4).double(), basis.right(4).double(), basis.sigma(4))
        wanted[module] = wanted[module] + 0.5 * (delta - left @ torch.diag(sigma) @ right.T)
    assert relative_error(dense(tmp_path / "merged"), wanted) < EXACT
    assert not report.in_bank


def test_adapters_in_one_band_keep_their_rank(trained: dict[str, Path], tmp_path: Path) -> None:
    report = svdbank.merge([trained["law"], trained["code"]], output=tmp_path / "one")
    assert (report.rank, report.in_bank) == (8, True)
    assert report.weights == {"law": 0.5, "code": 0.5}
    assert svdbank.merge([trained["law"], trained["med"]], output=tmp_path / "two").rank == 16
    free = svdbank.merge([trained["law"], trained["plain"]], output=tmp_path / "free")
    assert (free.rank, free.in_bank) == (12, False)


@pytest.mark.parametrize("names", [["law", "chat"], ["law", "plain"]], ids="+".join)
def test_a_cut_merge_is_the_best_of_its_rank(names: list[str], trained: dict[str, Path], tmp_path: Path) -> None:
    folders = [trained[name] for name in names]
    report = svdbank.merge(folders, output=tmp_path / "cut", weights=[1, 1], rank=3)
    found, whole = dense(tmp_path / "cut"), dense_sum(folders, [1, 1])
    lost = size = 0.0
    for module, delta in whole.items():
        left, sigma, right = torch.linalg.svd(delta, full_matrices=False)
        best = left[:, :3] * sigma[:3] @ right[:3]
        assert (found[module] - best).norm() < EXACT * best.norm()
        lost, size = lost + float((sigma[3:] ** 2).sum()), size + float((sigma**2).sum())
    assert report.rank == 3
    assert report.error == pytest.approx((lost / size) ** 0.5, rel=1e-5)
    assert report.norm == pytest.approx((size - lost) ** 0.5, rel=1e-5)


@pytest.mark.parametrize("names", [["law", "med"], ["law", "verse"], ["chat", "code"]], ids="+".join)
def test_a_cut_merge_is_read_back_as_what_it_is(
    names: list[str], trained: dict[str, Path], small_bank: Bank, tmp_path: Path
) -> None:
    folders = [trained[name] for name in names]
    svdbank.merge(folders, output=tmp_path / "cut", rank=3)
    wanted = dense(tmp_path / "cut")
    known = merged(read_inputs(folders), [0.5, 0.5]).truncate(3)
    for bank in (None, small_bank):
        again = read_adapter(tmp_path / "cut", bank=bank)
        assert again.notes == () and again.rank == 3
        assert relative_error({key: again.delta(key).double() for key in again.weights}, wanted) < EXACT
        for key, weight in again.weights.items():
            # Columns of B that are combinations of directions are no directions: only the bank can tell where they lie.
            assert weight.in_bank == (bank is not None)
            assert not bank or again.bands(key) == known.bands(key)
    reports = [svdbank.compare([trained[names[0]], tmp_path / "cut"], bank=bank) for bank in (None, small_bank)]
    assert all("unchecked" in note for report in reports for note in report.notes)  # the test's own training wrote one of them
    # What it reaches is the same wherever its columns are written; both figures come from float32 factors.
    assert reports[0].pairs[0].all.overlap == pytest.approx(reports[1].pairs[0].all.overlap, abs=1e-6)


def test_a_cut_merge_whose_factors_were_changed_contradicts_its_record(trained: dict[str, Path], tmp_path: Path) -> None:
    svdbank.merge([trained["law"], trained["med"]], output=tmp_path / "cut", rank=3)
    tensors = load_file(tmp_path / "cut" / WEIGHTS)
    save_file({name: t + 0.1 * ("lora_B" in name) for name, t in tensors.items()}, tmp_path / "cut" / WEIGHTS)
    assert any("contradicts the tensors of 14 weights" in note for note in read_adapter(tmp_path / "cut").notes)


def test_many_free_factors_take_no_more_rank_than_a_matrix_has(trained: dict[str, Path], tmp_path: Path) -> None:
    """Concatenation alone would write 60 copies of rank 4 for a weight with 192 outputs as rank 240."""
    plain = read_adapter(trained["plain"], name="plain")
    many = {f"p{number}": plain for number in range(60)}
    total = merged(many, [1 / 60] * 60)
    weight = next(weight for key, weight in total.weights.items() if key.endswith("k_proj"))
    assert weight.total().max_rank == min(weight.out_features, weight.in_features) == 192
    wanted = dense(trained["plain"])
    key = next(key for key in total.weights if key.endswith("k_proj"))
    assert (total.delta(key).double() - wanted[key]).norm() < EXACT * wanted[key].norm()


def test_a_name_is_told_from_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r=16").mkdir()
    assert named_place("law=runs/r=8") == ("law", "runs/r=8")
    assert named_place("runs/r=8") == (None, "runs/r=8")
    assert named_place("r=16") == (None, "r=16")
    assert named_place("r=8") == ("r", "8")


def _coefficients() -> torch.Tensor:
    return torch.randn(3, 8, 40, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_ties_and_pruning_are_peft_s_on_the_same_numbers(density: float) -> None:
    C, weights = _coefficients(), torch.tensor([0.5, 1.0, 2.0])
    kept = trimmed(C, [8] * 3, density)
    if density < 1:
        for part, own in zip(C, kept, strict=True):
            assert torch.equal(own, merge_utils.magnitude_based_pruning(part, density))
    # PEFT elects before it weights; with equal weights there is no difference.
    wanted = merge_utils.disjoint_merge(kept, merge_utils.calculate_majority_sign_mask(kept))
    assert torch.allclose(elected(kept, [1, 1, 1]), wanted, rtol=1e-5, atol=0)
    by_hand = kept * weights.view(-1, 1, 1)
    sign = by_hand.sum(0).sign()
    agreeing = by_hand * (by_hand.sign() == sign)
    assert torch.allclose(elected(kept, weights.tolist()), agreeing.sum(0) / (agreeing != 0).sum(0).clamp(min=1), rtol=1e-5)


def test_dare_keeps_the_mean_and_the_share() -> None:
    C = torch.ones(1, 200, 500)
    kept = dropped(C, 0.2, np.random.default_rng(1))
    # 100,000 draws: five standard errors of a share of 0.2 are 0.0063.
    assert float((kept != 0).double().mean()) == pytest.approx(0.2, abs=0.0063)
    assert set(kept.unique().tolist()) == {0.0, 5.0}


@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_sparsifying_everything_nothing_is_the_plain_merge(method: MergeMethod, trained: dict[str, Path]) -> None:
    """In bands of their own no element has two adapters, so with density 1 all methods are the weighted sum."""
    read = read_inputs([trained["law"], trained["med"], trained["verse"]])
    weights = [0.5, 0.25, 2.0]
    linear = merged(read, weights)
    other = merged(read, weights, method=method, density=1.0)
    assert (other - linear).norm() < EXACT * linear.norm()


def test_draws_depend_on_the_seed_and_the_weight_only(trained: dict[str, Path]) -> None:
    read = read_inputs([trained["law"], trained["code"], trained["verse"]])
    two = {name: read[name] for name in ("law", "code")}
    one = merged(two, [1, 0], method="dare_linear", seed=3)
    again = merged({name: read[name] for name in ("law", "code", "verse")}, [1, 0, 0], method="dare_linear", seed=3)
    assert _same(one, again)
    assert not _same(one, merged(two, [1, 0], method="dare_linear", seed=4))


def _same(one: Adapter, other: Adapter) -> bool:
    return all(torch.equal(one.delta(key), other.delta(key)) for key in one.weights)


@pytest.mark.parametrize("method", ["ties", "dare_linear", "magnitude_prune"])
def test_methods_work_on_free_factors_too(method: MergeMethod, trained: dict[str, Path], tmp_path: Path) -> None:
    folders = [trained["law"], trained["plain"]]
    report = svdbank.merge(folders, output=tmp_path / "merged", method=method, density=1.0, weights=[1, 1])
    whole = dense_sum(folders, [1, 1])
    if method != "ties":
        # Nothing is left out, so whatever the coordinates are, it is the sum.
        assert relative_error(dense(tmp_path / "merged"), whole) < EXACT
    assert report.rank <= 12 and not report.in_bank


def test_what_cannot_be_meant_is_refused_before_any_work(trained: dict[str, Path], tmp_path: Path) -> None:
    two, out = [trained["law"], trained["code"]], tmp_path / "out"
    for folders, options, said in [
        ([trained["law"]], {}, "two adapters or more"),
        ([], {}, "no adapter"),
        (two, {"weights": [1.0]}, "1 weights for 2 adapters"),
        (two, {"weights": [1.0, float("nan")]}, "not a finite number"),
        (two, {"density": 0.5}, "no density"),
        (two, {"method": "ties", "density": 0.0}, "density 0"),
        (two, {"method": "tires"}, "not a method"),
        (two, {"rank": 0}, "not positive"),
        ([trained["law"], f"law={trained['code']}"], {}, "two adapters are called 'law'"),
        ([f"a b={trained['code']}", trained["law"]], {}, "cannot name an adapter"),
    ]:
        with pytest.raises(OptionError, match=said):
            svdbank.merge(folders, output=out, **options)
        assert not out.exists()
    out.mkdir()
    (out / "diary.txt").write_text("mine")
    with pytest.raises(OptionError, match="not empty"):
        svdbank.merge(two, output=out, force=True)
    with pytest.raises(BankError, match="needs the bank"):
        svdbank.merge([trained["law"], trained["milo"]], output=tmp_path / "new")


def test_adapters_without_a_common_weight_are_refused(trained: dict[str, Path], small_bank: Bank, tmp_path: Path) -> None:
    svdbank.init(small_bank, output=tmp_path / "other", rank=2, targets=["o_proj"])
    with pytest.raises(OptionError, match="touches no weight that another") as caught:
        svdbank.merge([trained["verse"], tmp_path / "other"], output=tmp_path / "out")
    assert "stack" in str(caught.value.hint)


@pytest.mark.parametrize("recorded", ["by weight", "as a digest"])
def test_adapters_of_different_bases_are_refused_unless_carried_over(
    recorded: str, trained: dict[str, Path], small_bank: Bank, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stranger = tmp_path / "stranger"
    svdbank.merge([trained["code"], trained["news"]], output=stranger)
    cache = json.loads((stranger / "svdbank.json").read_text())
    if recorded == "by weight":
        cache["sources"] = {key: [name, "0" * 64] for key, (name, _) in cache["sources"].items()}
    else:
        cache |= {"sources": {}, "base_digest": "0" * 64}
    (stranger / "svdbank.json").write_text(json.dumps(cache | {"digest": ""}))
    with pytest.raises(WrongBaseError) as caught:
        svdbank.merge([trained["law"], stranger], output=tmp_path / "out")
    assert "--rebase" in str(caught.value.hint)
    assert run(["merge", str(trained["law"]), str(stranger), "-o", str(tmp_path / "out")]) == 12
    capsys.readouterr()
    assert not (tmp_path / "out").exists()
    report = svdbank.merge([trained["law"], stranger], output=tmp_path / "out", weights=[1, 1], rebase=small_bank)
    # The directions are this bank's after all, so nothing is lost; and that is said.
    assert any("stranger" in note and "share kept is 1.000000" in note for note in report.notes)
    wanted = dense_sum([trained["law"], stranger], [1, 1])
    assert relative_error(dense(tmp_path / "out"), wanted) < EXACT


def test_the_command_says_what_it_did(trained: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [str(trained["law"]), f"c={trained['chat']}"]
    assert run(["merge", *folders, "-o", str(tmp_path / "m"), "--weights", "0.5,0.3", "--rank", "2"]) == 0
    shown = capsys.readouterr().out
    assert "rank 2, on the bank's directions" in shown and "cutting the rank lost" in shown and str(tmp_path / "m") in shown
    assert run(["merge", *folders, "-o", str(tmp_path / "d"), "--method", "dare_ties", "--seed", "7", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["seed"], report["density"], report["weights"]) == (7, 0.5, {"law": 1.0, "c": 1.0})
    assert run(["merge", *folders, "-o", str(tmp_path / "e"), "--weights", "a,b"]) == 2
    assert run(["merge", *folders, "-o", str(tmp_path / "e"), "--fit", "text.txt"]) == 2


@pytest.mark.parametrize("verb", [svdbank.merge, svdbank.stack])
def test_an_output_inside_an_input_is_refused(verb: Callable[..., object], tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    with pytest.raises(OptionError, match=r"lies inside .*one"):
        verb([tmp_path / "one", f"two={tmp_path / 'other'}"], output=tmp_path / "one" / "within")
    assert not any((tmp_path / "one").iterdir())


@pytest.mark.parametrize(
    ("verb", "zero"), [(svdbank.merge, {"weights": [0, 0]}), (svdbank.stack, {"scale": {"law": 0, "code": 0}})]
)
def test_a_sum_of_nothing_is_refused(
    verb: Callable[..., object], zero: dict[str, object], trained: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match="is 0: the result would change nothing"):
        verb([f"{name}={trained[name]}" for name in ("law", "code")], output=tmp_path / "zero", **zero)
    assert not (tmp_path / "zero").exists()
