"""Adapter folders that somebody made to hang, fill the memory or fool: refused by name, in little time and memory."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import svdbank
from svdbank.adapter.settings import CACHE, CONFIG, WEIGHTS
from svdbank.bank.reading import Bank
from svdbank.core.errors import CheckpointError, LockedError, OptionError, SvdbankError
from svdbank.core.folders import appearing
from svdbank.core.locks import locked

#: On a name that does not match, ``re`` would be at it for ever.
CATASTROPHIC = "(.|..|encoder|layer|[a-z]+)+x{3}!"


def changed(folder: Path, name: str, change: dict[str, object]) -> None:
    """A document with other values; the record's digest would give it away, so a forger leaves that out."""
    path = folder / name
    document = json.loads(path.read_bytes()) | change
    path.write_text(json.dumps(document))


def forged(folder: Path) -> Path:
    """Without what svdbank recorded of its bytes."""
    changed(folder, CACHE, {"files": {}, "settings": "", "digest": ""})
    return folder


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_catastrophic_pattern_in_a_config_ends(
    field: str, trained: Callable[..., Path], minilm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("svdbank.core.expressions._ONE", 0.2)
    folder = forged(trained("law"))
    changed(folder, CONFIG, {field: {CATASTROPHIC: 4, "(": 4} if field == "rank_pattern" else {CATASTROPHIC: 4.0}})
    begun = time.process_time()
    for use in (
        lambda: svdbank.merge([folder, f"b={folder}"], output=tmp_path / "merged"),
        lambda: svdbank.stack([folder], output=tmp_path / "stack", scale={"law": 2}),
        lambda: svdbank.compare([folder, f"b={folder}"]),
        lambda: svdbank.fuse(minilm, folder, tmp_path / "fused"),
        lambda: svdbank.export(folder, to="lora", output=tmp_path / "lora"),
    ):
        try:
            use()
        except SvdbankError as error:
            assert "regular expression" in str(error)
    assert time.process_time() - begun < 20


def test_a_catastrophic_pattern_of_the_command_line_ends(pair_bank: Bank, tmp_path: Path) -> None:
    for option in ({"rank_pattern": {CATASTROPHIC: 2}}, {"alpha_pattern": {CATASTROPHIC: 2.0}}, {"targets": CATASTROPHIC}):
        with pytest.raises(OptionError):
            svdbank.init(pair_bank, output=tmp_path / "x", rank=2, **option)  # type: ignore[arg-type]


@pytest.mark.parametrize("bands", [[[0, 10**9]], [[-5, -1]], [[10**8, 10**8 + 4]], [[0, 1]] * 100_000])
def test_bands_that_a_weight_does_not_have_are_refused(bands: list[list[int]], trained: Callable[..., Path]) -> None:
    folder = trained("law")
    components = json.loads((folder / CACHE).read_bytes())["components"]
    changed(folder, CACHE, {"components": {"law": dict.fromkeys(components["law"], bands)}, "digest": ""})
    begun = time.process_time()
    if len(bands) == 1:
        with pytest.raises(CheckpointError, match="does not have"):
            svdbank.read_adapter(folder)
    else:
        assert any("contradicts" in note for note in svdbank.read_adapter(folder).notes)
    assert time.process_time() - begun < 3


#: Shapes of A and B whose bytes are few, because one length is 0 or because the file has holes.
CLAIMS = [((10**9, 0), (0, 10**9)), ((4, 10**8), (10**8, 4)), ((1, 10**9), (10**9, 1))]


@pytest.mark.parametrize("shapes", CLAIMS, ids=str)
def test_factors_that_claim_to_be_huge_cost_nothing(shapes: tuple[tuple[int, int], ...], tmp_path: Path) -> None:
    folder = tmp_path / "huge"
    folder.mkdir()
    (folder / CONFIG).write_text(
        json.dumps({"peft_type": "LORA", "r": shapes[0][0], "lora_alpha": 4, "target_modules": ["query"]})
    )
    header, begin = {}, 0
    for factor, shape in zip("AB", shapes, strict=True):
        size = 4 * shape[0] * shape[1]
        key = f"base_model.model.encoder.layer.0.attention.self.query.lora_{factor}.weight"
        header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, begin + size]}
        begin += size
    data = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(len(data).to_bytes(8, "little") + data)
    os.truncate(folder / WEIGHTS, 8 + len(data) + begin)
    command = [sys.executable, "-m", "svdbank_cli.main", "compare", str(folder), f"b={folder}"]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (3 << 30, 3 << 30))

    begun = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, timeout=200)
    assert done.returncode == 1 and ("claims" in done.stderr or "not rank" in done.stderr), done.stderr
    assert "unexpected" not in done.stderr
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - begun < 20


@pytest.mark.parametrize("name", [CONFIG, CACHE])
def test_a_document_that_is_a_pipe_or_a_sparse_giant_is_refused(name: str, trained: Callable[..., Path]) -> None:
    folder = trained("law")
    os.truncate(folder / name, 1 << 40)
    with pytest.raises(CheckpointError, match="more than such a file has"):
        svdbank.read_adapter(folder)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    if name == CONFIG:
        with pytest.raises(CheckpointError):
            svdbank.read_adapter(folder)
    else:  # no record, then: the tensors are read without one
        assert any("no sha256" in note for note in svdbank.read_adapter(folder).notes)


STRANGE = [{"r": 0}, {"r": -4}, {"lora_alpha": 1e308}, {"alpha_pattern": {"query": -1e300}}, {"rank_pattern": {"query": 0}}]


@pytest.mark.parametrize("change", STRANGE, ids=str)
def test_a_config_with_numbers_that_nothing_has_is_refused(change: dict[str, object], trained: Callable[..., Path]) -> None:
    folder = forged(trained("law"))
    changed(folder, CONFIG, change)
    with pytest.raises(CheckpointError):
        svdbank.read_adapter(folder)


def test_what_overflows_is_not_written(trained: Callable[..., Path], pair_bank: Bank, tmp_path: Path) -> None:
    law, med = trained("law", 1), trained("med", 2)
    for use in (
        lambda: svdbank.stack([law, med], output=tmp_path / "out", scale={"law": 1e41}),
        lambda: svdbank.merge([law, med], output=tmp_path / "out", weights=[1e41, 1.0]),
        lambda: svdbank.init(pair_bank, output=tmp_path / "out", rank=4, alpha=1e308),
        lambda: svdbank.init(pair_bank, output=tmp_path / "out", rank=4, alpha_pattern={"query": 1e200}),
    ):
        with pytest.raises(OptionError, match=r"overflow|does not hold"):
            use()
        assert not (tmp_path / "out").exists()


def test_what_a_run_left_after_its_last_step_goes_with_the_next(trained: Callable[..., Path], tmp_path: Path) -> None:
    """Killed between the rename and the end: the output is there, and beside it an empty folder with a lock."""
    law = trained("law")
    svdbank.stack([law], output=tmp_path / "out", scale={"law": 0.5})
    left = tmp_path / ".out.tmp"
    left.mkdir()
    for name in (".lock", ".lock.owner"):
        (left / name).write_text("")
    with pytest.raises(OptionError, match="not empty"):
        svdbank.stack([law], output=tmp_path / "out", scale={"law": 0.5})
    assert not left.exists()


@pytest.mark.parametrize("name", [".lock", ".lock.owner"])
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_lock_that_is_a_link_or_a_pipe_is_not_followed(name: str, kind: str, tmp_path: Path) -> None:
    victim, work = tmp_path / "victim", tmp_path / ".out.tmp"
    victim.write_text("precious")
    work.mkdir()
    (work / name).symlink_to(victim) if kind == "link" else os.mkfifo(work / name)
    if name == ".lock":
        with pytest.raises(OptionError, match="where a lock belongs"), appearing(tmp_path / "out"):
            pass
    else:
        with appearing(tmp_path / "out") as folder:
            (folder / "x").write_text("")
        (tmp_path / "out" / "x").unlink()
        (tmp_path / "out").rmdir()
        work.mkdir()
        os.mkfifo(work / name)
        lock = locked(work)
        lock.__enter__()
        (work / name).unlink()
        os.mkfifo(work / name)
        with pytest.raises(LockedError), locked(work):
            pass
        lock.__exit__(None, None, None)
    assert victim.read_text() == "precious"
