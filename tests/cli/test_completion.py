"""What the shell offers after TAB: names of banks, models and adapters, where one is to be given."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete
from msgspec.structs import replace

import svdbank
from svdbank.bank.files import Folder
from svdbank.bank.index import read_manifest
from svdbank.bank.layout import manifest_digest
from svdbank.core.specs import to_json
from svdbank_cli.main import cli


def offered(line: str) -> list[str]:
    """Of a command line whose last word is being typed. ``(files)`` where that is left to the shell."""
    *before, typed = line.split(" ")
    found = ShellComplete(cli, {}, "svdbank", "_SVDBANK_COMPLETE").get_completions(before[1:], typed)
    return [item.value if item.type == "plain" else f"({item.type}s)" for item in found]


@pytest.fixture(scope="module")
def home(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the bank of a folder, and the same bank as if its model had come from the Hub."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SVDBANK_HOME", str(folder))
        bank = Path(svdbank.build(minilm, rank=4, targets=["query"]).path)
        copy = folder / "banks" / "from-the-hub" / bank.name
        shutil.copytree(bank, copy)
        manifest = read_manifest(Folder(copy))
        named = replace(manifest, base=replace(manifest.base, name="org/mini", revision="0" * 40))
        named = replace(named, digest=manifest_digest(to_json(named, indent=2), named.digest))
        (copy / "manifest.json").write_bytes(to_json(named, indent=2))
    return folder


def test_names_are_offered_where_one_is_to_be_given(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVDBANK_HOME", str(home))
    monkeypatch.chdir(tmp_path)
    for folder, mark in (("my.bank", "manifest.json"), ("law", "adapter_config.json"), ("runs/med", "adapter_config.json")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / mark).touch()
    assert "org/mini" in offered("svdbank info ") and "my.bank" in offered("svdbank info ")
    assert any(Path(name).is_absolute() for name in offered("svdbank verify "))  # of a folder: only its path finds it
    assert offered("svdbank info org/") == ["org/mini"]
    assert offered("svdbank train org") == ["org/mini"]
    assert offered("svdbank compare ") == ["law"] and offered("svdbank stack law runs/") == ["runs/med"]
    assert offered("svdbank compare run") == ["(files)"]
    assert offered("svdbank fuse org/mini l") == ["law"]
    assert offered("svdbank merge law --bank my") == ["my.bank"]
    assert offered("svdbank report l") == ["law"] and "org/mini" in offered("svdbank report law o")


def test_a_real_bash_completes_commands_options_choices_and_banks(home: Path, tmp_path: Path) -> None:
    (tmp_path / "svdbank").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m svdbank "$@"\n')
    (tmp_path / "svdbank").chmod(0o755)
    script = """
    eval "$(_SVDBANK_COMPLETE=bash_source svdbank)"
    for line in "svdbank verif" "svdbank build --dt" "svdbank build x --dtype bf" "svdbank info org/"; do
        COMP_WORDS=($line); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); COMPREPLY=()
        _svdbank_completion svdbank; echo "${COMPREPLY[@]}"
    done
    """
    environment = os.environ | {"SVDBANK_HOME": str(home), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["verify", "--dtype", "bfloat16", "org/mini"], done.stderr
