"""The page on checkpoints does what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest


def test_every_python_block_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = Path(__file__).parents[2] / "docs" / "checkpoints.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        exec(block, {})
    assert blocks and "('model.layers.0.self_attn.q_proj.weight', 8, 6)" in capsys.readouterr().out
