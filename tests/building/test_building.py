"""Building, resuming, extending and refusing.

Builds leave their device at ``auto``, which is what the test's ``device`` says (tests/conftest.py).
"""

from __future__ import annotations

import errno
import json
import os
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import svdbank
from svdbank.bank.layout import MANIFEST
from svdbank.core import disk
from svdbank.core.specs import Progress
from svdbank.verbs.build import BuildReport
from tests.building.small import tree, write_small_checkpoint


@pytest.fixture
def model(minilm: Path, device: str, tmp_path: Path) -> Path:
    return write_small_checkpoint(tmp_path / "model", minilm)


def _build(model: Path, bank: Path, **options: object) -> BuildReport:
    reports: list[BuildReport] = []
    svdbank.build(model, bank, on_report=reports.append, **{"rank": 8, **options})  # type: ignore[arg-type]
    return reports[0]


@pytest.mark.usefixtures("device")
def test_the_same_plan_gives_the_same_bytes_whatever_the_number_of_jobs(minilm: Path, tmp_path: Path) -> None:
    _build(minilm, tmp_path / "one", jobs=1, rank=16)
    _build(minilm, tmp_path / "four", jobs=4, rank=16)
    assert tree(tmp_path / "one") == tree(tmp_path / "four")


def test_a_build_computes_where_the_test_says(model: Path, device: str, tmp_path: Path) -> None:
    for choice in ("auto", device):
        bank = svdbank.build(model, tmp_path / choice, rank=8, device=choice)
        assert {bank[name].certificate.device for name in bank} == {device}


def test_a_finished_bank_is_not_built_again(model: Path, tmp_path: Path) -> None:
    assert _build(model, tmp_path / "bank").solved == 2
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "bank").rglob("*") if path.is_file()}
    report = _build(model, tmp_path / "bank")
    assert (report.solved, report.reused) == (0, 2)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "bank").rglob("*") if path.is_file()} == before


@pytest.mark.usefixtures("device")
def test_ctrl_c_keeps_what_is_finished(minilm: Path, tmp_path: Path) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.stage == "decompose" and progress.done >= 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        svdbank.build(minilm, tmp_path / "bank", rank=8, jobs=1, progress=interrupt)
    report = _build(minilm, tmp_path / "bank")
    assert report.reused >= 10
    assert report.reused + report.solved == 37
    _build(minilm, tmp_path / "undisturbed")
    assert tree(tmp_path / "bank") == tree(tmp_path / "undisturbed")


@pytest.mark.usefixtures("device")
def test_more_targets_extend_a_bank_and_leave_what_is_there(minilm: Path, tmp_path: Path) -> None:
    bank = tmp_path / "bank"
    _build(minilm, bank, targets=("query", "value"))
    before = {name: data for name, data in tree(bank).items() if "/" in name}
    report = _build(minilm, bank)
    assert (report.reused, report.solved) == (12, 25)
    assert before.items() <= tree(bank).items()
    report = _build(minilm, bank, targets=("word_embeddings",))
    assert (report.reused, report.solved) == (37, 1)
    opened = svdbank.open(bank)
    assert opened["embeddings.word_embeddings.weight"].left(8).shape == (384, 8)
    assert svdbank.verify(bank, data=True, model=minilm).sound
    whole = svdbank.build(minilm, tmp_path / "whole", rank=8, targets=("all-linear", "word_embeddings"))
    assert opened.base_digest() == whole.base_digest()
    for name in whole:
        assert torch.equal(opened[name].left(8), whole[name].left(8))


@pytest.mark.usefixtures("device")
def test_an_extension_that_was_stopped_goes_on_where_it_was(minilm: Path, tmp_path: Path) -> None:
    bank = tmp_path / "bank"
    _build(minilm, bank, targets=("query",))

    def interrupt(progress: Progress) -> None:
        if progress.stage == "decompose" and progress.done >= 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        svdbank.build(minilm, bank, rank=8, jobs=1, targets=("key", "value"), progress=interrupt)
    assert len(svdbank.open(bank)) == 6 and svdbank.verify(bank, data=True).sound
    # Other targets would mix two plans: said, with what the unfinished one is about.
    with pytest.raises(svdbank.OptionError, match="unfinished") as caught:
        _build(minilm, bank, targets=("dense",))
    assert "key, value" in str(caught.value.hint)
    report = _build(minilm, bank, targets=("key", "value"))
    assert report.reused >= 6 + 5
    assert report.reused + report.solved == 18
    assert not (bank / "records").exists()


@pytest.mark.parametrize(
    "field, value", [("rank", 9), ("side", "left"), ("dtype", "float16"), ("principal", 2), ("solver", "svd")]
)
def test_another_option_is_refused_with_its_name_for_a_finished_and_for_an_unfinished_bank(
    field: str, value: object, model: Path, tmp_path: Path
) -> None:
    bank = tmp_path / "bank"
    _build(model, bank)
    before = tree(bank)
    with pytest.raises(svdbank.OptionError, match=f"{field} .*; {value} was asked for"):
        _build(model, bank, **{field: value})
    assert tree(bank) == before
    (bank / MANIFEST).unlink()
    with pytest.raises(svdbank.OptionError, match=f"{field} .*; {value} was asked for"):
        _build(model, bank, **{field: value})


def test_a_base_with_one_changed_byte_is_refused_and_named(model: Path, tmp_path: Path) -> None:
    bank, stopped = tmp_path / "bank", tmp_path / "stopped"
    _build(model, bank)

    def stop(progress: Progress) -> None:
        if progress.stage == "decompose" and progress.done >= 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _build(model, stopped, progress=stop)
    tensors = load_file(model / "model.safetensors")
    name = "encoder.layer.1.attention.self.query.weight"
    tensors[name].view(torch.uint8).view(-1)[5] ^= 1
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(svdbank.WrongBaseError, match=name):
        _build(model, bank)
    with pytest.raises(svdbank.WrongBaseError, match=name):
        svdbank.verify(bank, model=model)
    # The same for a build that was stopped: its plan says of which bytes it is.
    with pytest.raises(svdbank.WrongBaseError):
        _build(model, stopped)


def test_another_model_is_refused_for_the_same_bank(minilm: Path, model: Path, tmp_path: Path) -> None:
    _build(model, tmp_path / "bank")
    with pytest.raises(svdbank.WrongBaseError, match="another model"):
        _build(minilm, tmp_path / "bank")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_refused_by_name_and_the_rest_is_kept(value: float, model: Path, tmp_path: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    name = "encoder.layer.1.attention.self.query.weight"
    good = tensors[name].clone()
    tensors[name][3, 4] = value
    save_file(tensors, model / "model.safetensors")
    with pytest.raises(svdbank.NotFiniteError, match=name):
        _build(model, tmp_path / "bank", jobs=1)
    save_file({**tensors, name: good}, model / "model.safetensors")
    report = _build(model, tmp_path / "bank", jobs=1)
    assert (report.reused, report.solved) == (1, 1)


def test_a_folder_that_is_no_bank_is_left_alone(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter-1.tex").write_text("years of work")
    with pytest.raises(svdbank.OptionError, match=r"chapter-1\.tex"):
        _build(model, folder)
    assert [path.name for path in folder.iterdir()] == ["chapter-1.tex"]
    # Names of files prove nothing: other tools write a manifest.json and a plan.json too.
    (folder / "manifest.json").write_text('{"name": "my web app"}')
    (folder / "plan.json").write_text("{}")
    with pytest.raises(svdbank.BankNotFoundError):
        svdbank.rm(folder)
    assert (folder / "chapter-1.tex").exists()


def test_rm_does_not_follow_a_link_and_takes_a_damaged_bank(model: Path, tmp_path: Path) -> None:
    _build(model, tmp_path / "bank")
    (tmp_path / "link").symlink_to(tmp_path / "bank")
    with pytest.raises(svdbank.BankNotFoundError, match="link"):
        svdbank.rm(tmp_path / "link")
    assert svdbank.verify(tmp_path / "bank", data=True).sound
    (tmp_path / "bank" / MANIFEST).write_text("garbage")
    assert svdbank.rm(tmp_path / "bank") > 0
    assert not (tmp_path / "bank").exists()


@pytest.mark.usefixtures("device")
def test_a_damaged_bank_is_neither_reused_nor_extended(minilm: Path, tmp_path: Path) -> None:
    bank = tmp_path / "bank"
    _build(minilm, bank, targets=("query",))
    plan = bank / "plan.json"
    original = plan.read_bytes()
    plan.write_bytes(original.replace(b'"principal": 0', b'"principal": 1'))
    with pytest.raises(svdbank.DamageError, match=r"plan\.json"):
        _build(minilm, bank, targets=("query", "key"))
    plan.write_bytes(original)
    next(bank.glob("*/left/c/0/0/0")).unlink()
    with pytest.raises(svdbank.DamageError, match="missing"):
        _build(minilm, bank, targets=("query",))


def test_temporary_files_of_others_are_left_alone(model: Path, tmp_path: Path) -> None:
    (tmp_path / "bank" / ".git").mkdir(parents=True)
    (tmp_path / "bank" / ".git" / "work.tmp").write_text("keep")
    _build(model, tmp_path / "bank")
    assert (tmp_path / "bank" / ".git" / "work.tmp").read_text() == "keep"


def test_a_rank_beyond_a_weight_is_clamped_and_all_means_all(model: Path, tmp_path: Path) -> None:
    report = svdbank.plan(model, tmp_path / "bank", rank=1000)
    assert [(family.rank, family.clamped) for family in report.families] == [(24, True)]
    _build(model, tmp_path / "bank", rank="all")
    basis = next(iter(svdbank.open(tmp_path / "bank").index.families))
    assert basis.spec.rank == 24


@pytest.mark.usefixtures("device")
def test_a_plan_says_what_the_build_then_does(minilm: Path, tmp_path: Path) -> None:
    before = set(tmp_path.iterdir())
    report = svdbank.plan(minilm, tmp_path / "bank", rank=20)
    assert set(tmp_path.iterdir()) == before, "a plan writes nothing"
    _build(minilm, tmp_path / "bank", rank=20)
    written = tree(tmp_path / "bank")
    assert len(written) == report.files
    vectors = sum(len(data) for name, data in written.items() if "/left/c/" in name or "/right/c/" in name)
    # Checksums and shard indexes are not counted in the plan: under a hundred bytes a chunk.
    assert report.write_bytes <= vectors <= report.write_bytes * 1.01
    assert report.fetch_bytes == sum(
        source.end - source.begin for source in _sources(minilm) if source.name in svdbank.open(tmp_path / "bank")
    )


def _sources(model: Path) -> list:  # type: ignore[type-arg]
    from svdbank.checkpoint import open_checkpoint

    with open_checkpoint(model) as checkpoint:
        return list(checkpoint.tensors.values())


def test_a_plan_for_the_cpu_loads_neither_torch_nor_zarr(minilm: Path, model: Path, tmp_path: Path) -> None:
    """Of an empty place, of a bank that is extended, and of one that is complete."""
    _build(model, tmp_path / "bank", targets=(r".*layer\.0\..*",))
    program = (
        "import sys, svdbank; model, bank, *targets = sys.argv[1:]\n"
        "report = svdbank.plan(model, bank, rank=8, targets=targets)\n"
        "loaded = [name for name in ('torch', 'zarr', 'transformers', 'huggingface_hub') if name in sys.modules]\n"
        "print(report.device, report.seconds >= 0, report.present, loaded)"
    )
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    for arguments, present in (((minilm, tmp_path / "nowhere"), 0), ((model, tmp_path / "bank"), 1)):
        command = [sys.executable, "-c", program, *map(str, arguments), "all-linear"]
        done = subprocess.run(command, env=hidden, capture_output=True, text=True, check=True)
        assert done.stdout == f"cpu True {present} []\n"


def test_a_disk_without_room_is_refused_before_the_work(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "free_bytes", lambda path: 1000)
    with pytest.raises(svdbank.OptionError, match="MB are free") as caught:
        _build(model, tmp_path / "bank")
    assert "--rank" in str(caught.value.hint)
    assert not list((tmp_path / "bank").glob("*/left"))


def test_two_builds_at_once_one_is_told_who_the_other_is(model: Path, tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, pathlib\nfrom svdbank.core.locks import locked\n"
            "with locked(pathlib.Path(sys.argv[1])):\n    print('held', flush=True); sys.stdin.read()",
            str(tmp_path / "bank"),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with pytest.raises(svdbank.LockedError, match=f"process {holder.pid} on {os.uname().nodename}"):
            _build(model, tmp_path / "bank")
    finally:
        holder.kill()
        holder.wait()
    # The lock of a dead process binds nobody.
    assert _build(model, tmp_path / "bank").solved == 2
    assert not list((tmp_path / "bank").glob(".lock*"))


def test_open_finds_the_cached_bank_of_a_model_and_takes_the_richest(
    model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SVDBANK_HOME", str(tmp_path / "home"))
    with pytest.raises(svdbank.BankNotFoundError, match="no bank of") as caught:
        svdbank.open(model)
    assert f"svdbank build {model}" in str(caught.value.hint)
    svdbank.build(model, rank=4)
    svdbank.build(model, rank=8, side="left")
    assert svdbank.open(model).rank == 8
    assert {(bank.rank, bank.side, bank.complete) for bank in svdbank.ls()} == {(4, "both", True), (8, "left", True)}
    freed = svdbank.rm(svdbank.open(model).path)
    assert freed > 0
    assert svdbank.open(model).rank == 4


@pytest.mark.usefixtures("device")
def test_progress_counts_every_weight_once_and_ends_complete(minilm: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    svdbank.build(minilm, tmp_path / "bank", rank=4, progress=seen.append)
    decompose = [progress for progress in seen if progress.stage == "decompose"]
    counts = [progress.done for progress in decompose]  # again where a worker begins to wait for bytes
    assert counts == sorted(counts) and set(counts) == set(range(38))
    items = [progress.item for progress in decompose if progress.item]
    assert len(items) == len(set(items)) == 37
    assert {progress.total for progress in decompose} == {37}
    assert seen[-1].stage == "publish" and seen[-1].done == seen[-1].total


# VmHWM and not ru_maxrss: the latter counts what the parent held when it forked.
_MEASURE = """
import re, sys
import svdbank
svdbank.build(sys.argv[1], sys.argv[2], rank=16, jobs=1)
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024)
"""


def test_peak_memory_does_not_grow_with_the_number_of_layers(tmp_path: Path) -> None:
    """2 and 24 layers of the same width, a weight of 16 MiB each: 22 weights held would be 350 MiB more.

    With two layers the reader has nothing to read ahead while a solve runs; with 24 up to three more weights are in flight (read,
    waiting, solving), and the allocator keeps about one.
    """
    width, layers = 2048, (2, 24)
    peaks = []
    for count in layers:
        model = tmp_path / f"layers-{count}"
        model.mkdir()
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(width // 4, width * 4, generator=generator)
        save_file({f"model.layers.{i}.mlp.up_proj.weight": weight + i for i in range(count)}, model / "model.safetensors")
        (model / "config.json").write_text(json.dumps({"model_type": "llama"}))
        done = subprocess.run(
            [sys.executable, "-c", _MEASURE, str(model), str(tmp_path / f"bank-{count}")],
            capture_output=True,
            text=True,
            check=True,
        )
        peaks.append(int(done.stdout))
    weight_bytes = weight.numel() * 4
    assert peaks[1] - peaks[0] < 4 * weight_bytes, f"peaks {[peak >> 20 for peak in peaks]} MiB"
    # And the plan's bound holds.
    bound = svdbank.plan(tmp_path / "layers-24", tmp_path / "nowhere", rank=16, jobs=1).peak_bytes
    assert peaks[1] <= bound, f"{peaks[1] >> 20} MiB where the plan said {bound >> 20}"


@pytest.mark.parametrize("empty", ["", "  "])
def test_an_empty_name_is_no_folder(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty: str) -> None:
    """``-o "$UNSET"`` would mean the working folder, and ``rm`` would take the bank that stands there."""
    _build(model, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    before = tree(tmp_path / "here")
    refused = (svdbank.open, svdbank.info, svdbank.rm, svdbank.verify, svdbank.plan, svdbank.build)
    calls = [lambda f=f: f(empty) for f in refused] + [lambda f=f: f(model, empty) for f in (svdbank.plan, svdbank.build)]
    for call in calls:
        with pytest.raises(svdbank.OptionError, match="name is empty") as caught:
            call()
        assert caught.value.hint
    assert tree(tmp_path / "here") == before
    assert svdbank.open(".").names


def test_a_refused_build_leaves_no_folder(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "free_bytes", lambda path: 1000)
    with pytest.raises(svdbank.OptionError, match="are free"):
        svdbank.build(model, tmp_path / "new" / "bank")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_tilde_means_home_for_building_as_for_opening(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert svdbank.build("~/model", "~/bank", rank=8).path == tmp_path / "bank"
    assert svdbank.open("~/bank").names
    with pytest.raises(svdbank.CheckpointError, match="no such file"):
        svdbank.plan("~nobody-of-this-name/model")


def test_a_model_whose_name_is_as_long_as_a_name_may_be_has_its_place_in_the_cache(minilm: Path, tmp_path: Path) -> None:
    model = write_small_checkpoint(tmp_path / ("m" * 255), minilm)
    svdbank.build(model, rank=8)
    assert len(svdbank.open(model)) == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 10**20}, "rank is a positive number up to"),
        ({"rank": True}, "rank is a positive number"),
        ({"rank": 1.5}, "rank is a positive number"),
        ({"principal": 10**20}, "principal is a number of triplets"),
        ({"principal": -1}, "principal is a number of triplets"),
        ({"jobs": 0}, "jobs is a number from 1 to"),
        ({"jobs": 10**6}, "jobs is a number from 1 to"),
    ],
)
def test_numbers_that_cannot_be_meant_are_refused_by_plan_and_build_alike(
    model: Path, tmp_path: Path, options: dict[str, object], said: str
) -> None:
    for verb in (svdbank.plan, svdbank.build):
        with pytest.raises(svdbank.OptionError, match=said) as caught:
            verb(model, tmp_path / "bank", **options)  # type: ignore[operator]
        assert caught.value.hint
    assert not (tmp_path / "bank").exists()


def test_a_place_where_no_bank_can_be_is_refused_by_plan_as_by_build(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    places = {
        "file": "is a file, not a folder",
        "file/below": "is a file, not a folder",
        "link": "is a link to nowhere, which is not there",
        "full": "is not empty and no bank",
    }
    before = sorted(path.name for path in tmp_path.rglob("*"))
    for place, said in places.items():
        for verb in (svdbank.plan, svdbank.build):
            with pytest.raises(svdbank.OptionError, match=said) as caught:
                verb(model, tmp_path / place)  # type: ignore[operator]
            assert caught.value.hint
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_a_damaged_plan_of_an_unfinished_build_is_said_with_what_to_do(model: Path, tmp_path: Path) -> None:
    bank = tmp_path / "bank"
    _build(model, bank)
    (bank / MANIFEST).unlink()
    (bank / "plan.json").write_bytes(b"{}")
    for verb in (svdbank.plan, svdbank.build):
        with pytest.raises(svdbank.BankError, match=r"plan\.json") as caught:
            verb(model, bank, rank=8)  # type: ignore[operator]
        assert caught.value.hint and "delete this bank" in caught.value.hint


def test_advice_can_be_pasted_into_a_shell_whatever_the_name(minilm: Path, tmp_path: Path) -> None:
    model = write_small_checkpoint(tmp_path / "it's a model; rm x", minilm)
    with pytest.raises(svdbank.BankNotFoundError) as caught:
        svdbank.open(model)
    assert caught.value.hint is not None and shlex.split(caught.value.hint) == ["svdbank", "build", str(model)]


def test_a_disk_that_takes_no_more_is_an_error_that_names_the_file_and_the_next_build_finishes(
    minilm: Path, tmp_path: Path
) -> None:
    """A limit on the size of files stands in for a full disk: the system refuses the write in the middle, as it does there."""
    model = write_small_checkpoint(tmp_path / "model", minilm, layers=4, out=300, width=300)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            svdbank.build(model, tmp_path / "bank", rank=32)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG and str(caught.value.filename).startswith(str(tmp_path / "bank"))
    with pytest.raises(svdbank.BankNotFoundError, match="has not finished"):
        svdbank.open(tmp_path / "bank")
    assert _build(model, tmp_path / "bank", rank=32).weights == 4
    assert svdbank.verify(tmp_path / "bank", data=True).sound
