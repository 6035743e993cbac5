"""Patterns of a strange config never reach PEFT where its engine would not end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest

from svdbank.core.errors import OptionError
from svdbank.peft import load_adapter
from tests.adapter.settings import small_llama
from tests.peft.models import lora_layers

#: Quick on the modules that are adapted; on the others a backtracking engine tries every way to part the name.
ENDLESS = r".*q_proj|([a-z._0-9]+)+X"


@pytest.mark.parametrize("fields", [{"target_modules": ENDLESS}, {"rank_pattern": {r"q_proj|([a-z._0-9]+)+X": 4}}])
def test_an_expression_that_would_not_end_is_refused_and_the_model_is_as_it_was(fields: dict[str, Any], tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"])
    peft.get_peft_model(small_llama(), config).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    before = json.loads(path.read_bytes())
    path.write_text(json.dumps(before | fields))
    model = small_llama()
    with pytest.raises(OptionError, match="too long"):
        load_adapter(model, tmp_path / "adapter")
    assert not lora_layers(model)
    path.write_text(json.dumps(before | {"target_modules": r".*\.q_proj"}))
    assert lora_layers(load_adapter(model, tmp_path / "adapter"))
