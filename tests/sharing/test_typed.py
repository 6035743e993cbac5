"""``svdbank push`` and ``svdbank pull`` as they are typed: what stands on stdout, what the exit code is, and that hints lead on."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

import svdbank
from svdbank_cli.main import run
from tests.building.small import tree
from tests.checkpoint.hub_server import LocalHub
from tests.sharing.conftest import BASE

Captured = pytest.CaptureFixture[str]


def typed(line: str, capsys: Captured, code: int = 0) -> tuple[str, str]:
    """stdout and stderr of a command that has to end with ``code``."""
    capsys.readouterr()
    found = run(shlex.split(line))
    seen = capsys.readouterr()
    assert found == code, seen.err
    assert code == 0 or (not seen.out and "Error: " in seen.err), "an error says nothing on stdout"
    return seen.out, seen.err


def as_json(line: str, capsys: Captured) -> dict[str, Any]:
    """The one document that a command with ``--json`` puts on stdout."""
    out = typed(f"{line} --json", capsys)[0]
    assert out.count("\n") == 1
    document: dict[str, Any] = json.loads(out)
    return document


def test_a_bank_is_pushed_and_its_first_ranks_pulled(
    hub: LocalHub, banks: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    out, err = typed(f"push {banks['hub']} me/bank", capsys)
    commit = hub.repositories["me/bank"].branches["main"]
    assert out.startswith(f"hf://me/bank@{commit}\nnew, private: ") and f"{hub.url}/me/bank" in out and "verify" in err
    count = len(tree(banks["hub"]))
    assert f": {count} files, " in out and f"; {count} new or changed, " in out and "; 3 beside them (card, " in out
    again = as_json(f"push {banks['hub']} me/bank", capsys)
    assert again["place"] == f"hf://me/bank@{commit}" and again["private"] and not again["committed"]
    assert "nothing to do" in typed(f"push -q {banks['hub']} me/bank", capsys)[0]
    public = as_json(f"push {banks['hub']} me/public --public", capsys)
    assert public["created"] and not public["private"] and not hub.repositories["me/public"].private

    monkeypatch.setenv("SVDBANK_HOME", str(tmp_path / "another"))
    out, _ = typed("pull me/bank --rank 4 --side left", capsys)
    assert f"describes   {BASE}" in out and "rank 4, side left" in out and "ranks 5 to 18, right vectors" in out
    part = as_json("pull me/bank --rank 4 --side left", capsys)
    assert part["rank"] == 4 and part["lacks"] and part["digest"] == again["digest"]
    whole = as_json(f"pull hf://me/bank --into {tmp_path / 'whole'}", capsys)
    assert whole["lacks"] is None and tree(tmp_path / "whole").items() >= tree(banks["hub"]).items()
    assert typed(f"verify {tmp_path / 'whole'} --data", capsys)[0].startswith("sound")
    typed(f"init hf://me/bank -r 4 -o {tmp_path / 'adapter'}", capsys)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_what_is_typed_wrong_ends_with_its_code_and_makes_nothing(
    hub: LocalHub, banks: dict[str, Path], small_base: Path, tmp_path: Path, capsys: Captured
) -> None:
    bank, folder = banks["hub"], banks["folder"]
    for place in ("bank", "a/b/c", "me/x--y", "me/x.git", "me/x@", f"me/x@{'0' * 40}", "https://h/x", "''"):
        typed(f"push {bank} {place}", capsys, 2)
    assert "--base" in typed(f"push {bank} me/new --source {small_base}", capsys, 2)[1]
    changed = tmp_path / "changed"
    files = {path.name: path.read_bytes() for path in small_base.iterdir()}
    changed.mkdir()
    for name, data in files.items():
        (changed / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]) if name == "model.safetensors" else data)
    # A folder that is named is compared, also where the bank says itself what it is of.
    assert "model.safetensors" in typed(f"push {bank} me/new --base {BASE} --source {changed}", capsys, 12)[1]
    assert "--base" in typed(f"push {folder} me/new", capsys, 2)[1]
    typed(f"push {tmp_path / 'nowhere'} me/new", capsys, 10)
    typed(f"push {small_base} me/new", capsys, 10)
    typed(f"push {bank} another/new", capsys, 1)
    assert set(hub.repositories) == {BASE}
    said = typed(f"pull {BASE}", capsys, 10)[1]
    assert f"hf://{BASE}: a model, and no bank there" in said and f"→ svdbank build {BASE}" in said
    hub.commit("me/notes", {"README.md": b"no model and no bank"})
    assert "check the spelling" in typed("pull me/notes", capsys, 10)[1]
    svdbank.push(bank, "me/bank")
    svdbank.push(bank, "me/public", public=True)
    said = typed(f"pull {BASE}", capsys, 10)[1]
    assert "svdbank pull me/bank brings it" in said or "svdbank pull me/public brings it" in said
    assert "hf://me/bank" in typed(f"report me/bank -o {tmp_path / 'r.html'}", capsys, 1)[1]
    typed("pull me/bank --rank 1", capsys)
    assert "named hf://me/bank" in typed("info me/bank", capsys, 10)[1]
    for into in (changed, changed / "config.json"):
        assert "--into" in typed(f"pull me/bank --into {into}", capsys, 2)[1]
    typed("pull me/nowhere", capsys, 10)


def test_the_hint_beside_a_banks_name_given_for_a_model_works_as_it_stands(
    hub: LocalHub, banks: dict[str, Path], capsys: Captured
) -> None:
    svdbank.push(banks["hub"], "me/bank")
    hint = typed("plan me/bank", capsys, 1)[1].partition("→ svdbank ")[2].strip()
    assert hint == "info hf://me/bank" and BASE in typed(hint, capsys)[0]
