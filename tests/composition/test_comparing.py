"""Norms, angles and interference from coefficients are those of the dense matrices."""

from __future__ import annotations

import itertools
import json
import math
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import svdbank
from svdbank.adapter.settings import WEIGHTS
from svdbank.bank.reading import Bank
from svdbank.composition.relations import Relation, verdict
from svdbank.core.errors import MissingExtraError, OptionError
from svdbank_cli.main import run
from tests.composition.conftest import dense

NAMES = ["law", "code", "med", "chat", "plain"]


def test_norms_and_cosines_are_those_of_the_dense_matrices(trained: dict[str, Path]) -> None:
    report = svdbank.compare([trained[name] for name in NAMES])
    deltas = {name: dense(trained[name]) for name in NAMES}
    for size in report.adapters:
        norm = math.sqrt(sum(float(delta.square().sum()) for delta in deltas[size.name].values()))
        assert size.norm == pytest.approx(norm, rel=1e-6)
    pairs = {(pair.one, pair.other): pair for pair in report.pairs}
    assert set(pairs) == set(itertools.combinations(NAMES, 2))
    for (one, other), pair in pairs.items():
        a, b = deltas[one], deltas[other]
        for relation in pair.weights:
            x, y = a[relation.where], b[relation.where]
            # Bank vectors are orthonormal to 1e-7, and B of the file is the bank's.
            assert relation.cosine == pytest.approx(float((x * y).sum() / (x.norm() * y.norm())), abs=1e-6)
            assert relation.norms == pytest.approx((float(x.norm()), float(y.norm())), rel=1e-6)
            assert relation.agreement - relation.conflict == pytest.approx(relation.cosine, abs=1e-12)
        inner = sum(float((a[key] * b[key]).sum()) for key in a)
        sizes = [math.sqrt(sum(float(delta.square().sum()) for delta in side.values())) for side in (a, b)]
        assert pair.all.cosine == pytest.approx(inner / (sizes[0] * sizes[1]), abs=1e-6)
        assert [layer.where for layer in pair.layers] == ["0", "1"]
        assert sum(layer.weights for layer in pair.layers) == len(pair.weights) == 14


def test_overlap_is_the_share_in_the_other_s_outputs(trained: dict[str, Path]) -> None:
    report = svdbank.compare([trained["chat"], trained["law"], trained["med"], trained["plain"]])
    pairs = {(pair.one, pair.other): pair for pair in report.pairs}
    deltas = {name: dense(trained[name]) for name in ("chat", "law", "plain")}
    for one, other in (("chat", "law"), ("chat", "plain")):
        for relation in pairs[one, other].weights:
            if "self_attn" not in relation.where:
                continue  # the same arithmetic, and slow SVDs here
            x, y = deltas[one][relation.where], deltas[other][relation.where]
            shares = []
            for own, theirs in ((x, y), (y, x)):
                basis, sigma, _ = torch.linalg.svd(theirs, full_matrices=False)
                basis = basis[:, sigma > 1e-7 * sigma[0]]
                shares.append(float((basis.T @ own).square().sum() / own.square().sum()))
            assert relation.overlap == pytest.approx(math.sqrt(shares[0] * shares[1]), abs=1e-5)
    apart = pairs["law", "med"]
    assert apart.all.cosine == apart.all.conflict == apart.all.overlap == 0.0
    assert not any(math.copysign(1, relation.conflict) < 0 for relation in apart.weights)
    assert "do not meet" in apart.verdict


def test_adapters_that_pull_against_each_other_are_found_and_placed(trained: dict[str, Path], tmp_path: Path) -> None:
    against = tmp_path / "against"
    svdbank.merge([trained["law"], trained["code"]], output=against, weights=[-1.0, 0.1])
    whole = svdbank.compare([trained["law"], against]).pairs[0]
    assert whole.all.cosine < -0.5 and "fight" in whole.verdict and "as a whole" in whole.verdict
    # Now in one weight alone: the rest of it is the adapter itself.
    svdbank.merge([trained["law"], trained["code"]], output=tmp_path / "one", weights=[1.0, 0.0])
    tensors = load_file(tmp_path / "one" / WEIGHTS)
    key = next(key for key in tensors if "layers.1.self_attn.o_proj.lora_A" in key)
    tensors[key] = -tensors[key]
    save_file(tensors, tmp_path / "one" / WEIGHTS, metadata={"format": "pt"})
    pair = svdbank.compare([trained["law"], tmp_path / "one"]).pairs[0]
    assert "fight in 1 of 14 weights, most in model.layers.1.self_attn.o_proj (cosine -1.00)" in pair.verdict


def test_adapters_that_share_directions_and_agree_are_not_said_to_be_apart(
    trained: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    svdbank.merge([trained["law"], trained["med"]], output=tmp_path / "both", weights=[1, 1])
    svdbank.stack([trained["law"]], output=tmp_path / "half", scale={"law": 0.5})
    for other, cosine in (("both", None), ("half", "+1.00")):
        assert run(["compare", str(trained["law"]), f"x={tmp_path / other}", "--json"]) == 0
        pair = json.loads(capsys.readouterr().out)["pairs"][0]
        assert pair["all"]["conflict"] < 1e-6 and pair["all"]["overlap"] > 0.1
        share = f"law and x share directions ({pair['all']['overlap']:.0%} of their size) and agree there"
        assert pair["verdict"] == f"{share} (cosine {cosine or format(pair['all']['cosine'], '+.2f')}); nothing cancels"


def _relation(cosine: float, conflict: float, overlap: float, where: str = "model.layers.0.q") -> Relation:
    return Relation(where, (1.0, 1.0), cosine, cosine + conflict, conflict, overlap, 1)


@pytest.mark.parametrize(
    ("whole", "weights", "says", "keeps_silent"),
    [
        ((0.0, 0.0, 0.0), [(0.0, 0.0, 0.0)], "do not meet", "share"),
        (
            (0.7, 0.0, 0.7),
            [(0.7, 0.0, 0.7)],
            "share directions (70% of their size) and agree there (cosine +0.70); nothing",
            "not meet",
        ),
        (
            (0.7, 0.1, 0.9),
            [(0.7, 0.1, 0.9)],
            "and agree there (cosine +0.70); coefficients of opposite sign cancel 10%",
            "fight",
        ),
        ((0.0, 0.3, 0.9), [(0.0, 0.3, 0.9)], "without pulling together or against each other (cosine +0.00); coeff", "agree"),
        ((0.0, 0.0, 0.9), [(0.0, 0.0, 0.9)], "share directions (90% of their size) without pulling", "not meet"),
        ((-0.7, 0.7, 0.7), [(-0.7, 0.7, 0.7)], "fight: they pull against each other as a whole", "agree"),
        ((-0.03, 0.3, 0.7), [(-0.03, 0.3, 0.7)] * 9, "fight: they pull against each other as a whole (cosine -0.03)", "agree"),
        ((0.9, 0.1, 1.0), [(-0.8, 0.8, 1.0), (1.0, 0.0, 1.0)], "fight in 1 of 2 weights", "share"),
        ((0.9, 0.1, 1.0), [(-0.8, 0.8, 1.0), (1.0, 0.0, 1.0)], "; as a whole they agree (cosine +0.90)", "share"),
    ],
)
def test_the_verdict_follows_from_overlap_cosine_and_conflict(
    whole: tuple[float, float, float], weights: list[tuple[float, float, float]], says: str, keeps_silent: str
) -> None:
    parts = tuple(_relation(*figures) for figures in weights)
    said = verdict("a", "b", _relation(*whole, where=""), (_relation(*whole, where="0"),), parts)
    assert said.startswith("a and b ") and says in said and keeps_silent not in said


def test_shares_in_the_minor_subspace(trained: dict[str, Path], small_bank: Bank) -> None:
    report = svdbank.compare([trained["law"], trained["plain"]], bank=small_bank)
    shares = {size.name: size.share for size in report.adapters}
    assert shares["law"] == pytest.approx(1.0, abs=1e-6)
    inside = whole = 0.0
    for module, delta in dense(trained["plain"]).items():
        basis = small_bank[f"{module}.weight"]
        inside += float((basis.left(basis.rank).double().T @ delta).square().sum())
        whole += float(delta.square().sum())
    assert shares["plain"] == pytest.approx(inside / whole, rel=1e-5)
    assert shares["plain"] is not None and shares["plain"] < 0.5
    alone = svdbank.compare([trained["plain"]], bank=small_bank)
    assert not alone.pairs and alone.adapters[0].share == shares["plain"]


def test_a_stack_is_compared_domain_by_domain(trained: dict[str, Path], tmp_path: Path) -> None:
    svdbank.stack([trained["law"], trained["code"]], output=tmp_path / "stack")
    one = svdbank.compare([tmp_path / "stack"])
    two = svdbank.compare([trained["law"], trained["code"]])
    assert one.pairs[0].all.cosine == pytest.approx(two.pairs[0].all.cosine, abs=1e-7)


def test_two_domains_of_one_name_are_refused(trained: dict[str, Path], tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    svdbank.stack([trained["law"], trained["code"]], output=one)
    svdbank.stack([trained["med"], f"law={trained['chat']}"], output=two)
    for folders in ([trained["law"], one], [one, trained["law"]], [one, two]):
        with pytest.raises(OptionError, match="two domains are called 'law'") as caught:
            svdbank.compare(folders)
        assert "NAME=PLACE" in str(caught.value.hint)
    assert len(svdbank.compare([f"other={trained['law']}", one]).adapters) == 3
    assert len(svdbank.compare([one]).adapters) == 2


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_the_heat_map_is_drawn_and_the_same_each_time(kind: str, trained: dict[str, Path], tmp_path: Path) -> None:
    images = [tmp_path / f"one.{kind}", tmp_path / f"two.{kind}"]
    for image in images:
        svdbank.compare([f"a-b-.c={trained['law']}", trained["code"], trained["med"]], image=image)
    data = images[0].read_bytes()
    assert data == images[1].read_bytes()
    if kind == "svg":
        text = "".join(ElementTree.fromstring(data).itertext())
        assert "code · med" in text and "layer" in text
    else:
        assert data.startswith(b"\x89PNG")


def test_images_that_cannot_be_drawn_are_refused_first(
    trained: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = [trained["law"], trained["code"]]
    with pytest.raises(OptionError, match=r"\.svg or \.png"):
        svdbank.compare(two, image=tmp_path / "map.jpg")
    with pytest.raises(OptionError, match="folder does not exist"):
        svdbank.compare(two, image=tmp_path / "none" / "map.svg")
    with pytest.raises(OptionError, match="two adapters or more"):
        svdbank.compare(two[:1])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match="matplotlib") as caught:
        svdbank.compare(two, image=tmp_path / "map.svg")
    assert "svdbank[report]" in str(caught.value.hint)


def test_the_command_s_tables(trained: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [str(trained["law"]), str(trained["code"])]
    for by, lines in (("all", 1), ("layer", 2), ("weight", 14)):
        assert run(["compare", *folders, "--by", by]) == 0
        assert sum(line.startswith("law · code") for line in capsys.readouterr().out.splitlines()) == lines
    assert run(["compare", *folders, "--json", "--image", str(tmp_path / "map.svg")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["pairs"][0]["weights"]) == 14 and report["image"] == str(tmp_path / "map.svg")


def test_an_adapter_of_zeros_is_called_that(trained: dict[str, Path], tmp_path: Path) -> None:
    svdbank.merge([trained["law"], trained["code"]], output=tmp_path / "one", weights=[1, 0])
    file = tmp_path / "one" / "adapter_model.safetensors"
    save_file({name: tensor * ("lora_B" in name) for name, tensor in load_file(file).items()}, file)
    report = svdbank.compare([trained["law"], tmp_path / "one"])
    assert report.pairs[0].verdict == "one: ΔW is zero there"
