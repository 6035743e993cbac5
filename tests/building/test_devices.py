"""Builds that change the device, share it, or run out of it; on weights made here, so that they need no data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import svdbank
import svdbank.building.solving as solving
from svdbank.core.specs import Progress
from svdbank.solver import batch_size, choose_path
from svdbank.solver.devices import kind_of
from tests.building.small import tree

#: Queries of an encoder: more of them than a batch needs, and large enough for the filter there.
LAYERS, SIDE, LENGTH, RANK = 6, 288, 480, 16


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of LAYERS query and value weights, (SIDE, LENGTH), bfloat16."""
    folder = tmp_path_factory.mktemp("encoder")
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"encoder.layer.{layer}.attention.self.{role}.weight": torch.randn(SIDE, LENGTH, generator=generator).to(torch.bfloat16)
        for layer in range(LAYERS)
        for role in ("query", "value")
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}))
    return folder


def stop_after(weights: int) -> object:
    def interrupt(progress: Progress) -> None:
        if progress.stage == "decompose" and progress.done >= weights:
            raise KeyboardInterrupt

    return interrupt


def sines(one: svdbank.Bank, other: svdbank.Bank) -> list[float]:
    """Sine of the largest angle between the left subspaces of each weight."""
    found = []
    for name in one:
        u, v = one[name].left(RANK).double(), other[name].left(RANK).double()
        found.append(float(torch.linalg.matrix_norm(u - v @ (v.mT @ u), ord=2)))
    return found


@pytest.mark.parametrize("first_here", [True, False], ids=["begun on the CPU", "begun on the device"])
def test_a_bank_begun_on_one_device_goes_on_on_another(first_here: bool, encoder: Path, device: str, tmp_path: Path) -> None:
    places = ("cpu", device) if first_here else (device, "cpu")
    with pytest.raises(KeyboardInterrupt):
        svdbank.build(encoder, tmp_path / "bank", rank=RANK, jobs=1, device=places[0], progress=stop_after(1))  # type: ignore[arg-type]
    for record in sorted((tmp_path / "bank" / "records").rglob("*.json"))[1:]:
        record.unlink()  # a batch may have been all of them
    reports: list[svdbank.BuildReport] = []
    bank = svdbank.build(encoder, tmp_path / "bank", rank=RANK, device=places[1], on_report=reports.append)
    assert reports[0].reused and reports[0].solved
    assert {bank[name].certificate.device for name in bank} == {*places}
    assert svdbank.verify(bank.path, model=encoder, data=True).sound
    whole = svdbank.build(encoder, tmp_path / "whole", rank=RANK, device="cpu")
    # Both are within 1e-6 of the truth where the rank is resolved, which a certificate's bound says; float32 storage adds as little.
    assert all(bank[name].certificate.angle_bound is not None for name in bank)
    assert max(sines(bank, whole)) <= 1e-6


def test_bytes_do_not_depend_on_how_many_solves_share_the_device(
    encoder: Path, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trees = []
    for shared in (1, 3):
        monkeypatch.setattr(solving, "IN_FLIGHT", shared)
        bank = svdbank.build(encoder, tmp_path / str(shared), rank=RANK, jobs=shared, device=device)
        trees.append(tree(Path(bank.path)))
    assert trees[0] == trees[1]


def test_bytes_do_not_depend_on_where_a_build_was_stopped(encoder: Path, device: str, tmp_path: Path) -> None:
    """A batch that goes on with fewer weights than it began with gives the same bytes."""
    whole = svdbank.build(encoder, tmp_path / "whole", rank=RANK, device=device)
    with pytest.raises(KeyboardInterrupt):
        svdbank.build(encoder, tmp_path / "stopped", rank=RANK, jobs=1, device=device, progress=stop_after(2))  # type: ignore[arg-type]
    stopped = tmp_path / "stopped"
    for record in sorted((stopped / "records").rglob("*.json"))[::2]:
        record.unlink()
    bank = svdbank.build(encoder, stopped, rank=RANK, device=device)
    assert tree(Path(bank.path)) == tree(Path(whole.path))


def test_the_plan_says_for_each_kind_of_device_what_it_solves_how(encoder: Path, device: str, tmp_path: Path) -> None:
    report = svdbank.plan(encoder, tmp_path / "bank", rank=RANK, device=device)
    kind = kind_of(torch.device(device))
    assert report.device == kind
    assert (report.device_bytes is None) == (kind == "cpu")
    for family in report.families:
        batch = 1 if kind == "cpu" else batch_size(family.out_features, family.in_features, family.count, kind)
        assert (family.path, family.batch) == (choose_path(SIDE, LENGTH, RANK, kind, batch), batch)
    assert {(how.path, how.batch) for how in report.plan.devices["cuda"].values()} == {("filter", LAYERS)}
    assert {(how.path, how.batch) for how in report.plan.devices["cuda-low-float64"].values()} == {("dense", 1)}
    bank = svdbank.build(encoder, tmp_path / "bank", rank=RANK, device=device)
    assert {bank[name].certificate.path for name in bank} == {family.path for family in report.families}


def test_a_plan_for_a_device_that_is_not_here_says_so_and_claims_no_time(encoder: Path, tmp_path: Path) -> None:
    report = svdbank.plan(encoder, tmp_path / "bank", rank=RANK, device="cuda")
    assert report.device == "cuda" and report.seconds is None
    assert report.device_bytes is not None and report.device_bytes > SIDE * LENGTH * 8
    with pytest.raises(svdbank.OptionError, match="no device is called"):
        svdbank.plan(encoder, tmp_path / "bank", device="gpu")


def test_a_device_that_does_not_compute_is_refused_before_the_work(
    encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import svdbank.building.devices as devices

    monkeypatch.setattr(devices, "named_device", lambda name: torch.device("cuda"))
    with pytest.raises(svdbank.core.errors.DeviceError, match="does not solve a small weight: asking for its name") as caught:
        svdbank.build(encoder, tmp_path / "bank", device="cuda")
    assert "env --check" in str(caught.value.hint)
    assert not (tmp_path / "bank").exists()


def test_every_device_here_passes_its_check(device: str) -> None:
    found = {check.device: check for check in svdbank.env(check=True).checks}
    check = found["cpu" if device == "cpu" else "cuda:0"]
    assert check.problem is None and check.kind == kind_of(torch.device(device))
    # The gates let 1e-10 through; a small random weight leaves a hundred times ε.
    assert check.residuals and max(check.residuals.values()) <= 1e-12
