"""docs/scale.md shows what the simulation says: worked out again for its smallest model, the others by `docs/generate_scale.py --check`."""

from __future__ import annotations

import importlib.util

import pytest

from tests.structure.source import ROOT


def test_the_rows_of_a_model_are_what_is_simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("generate_scale", ROOT / "docs" / "generate_scale.py")
    assert spec is not None and spec.loader is not None
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    monkeypatch.setattr(page, "MODELS", ("Llama-3.1-8B",))
    shown = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    rows = [line for line in page.section().splitlines() if line.startswith("| Llama-3.1-8B |")]
    assert len(rows) >= 2 and all(row in shown for row in rows)
