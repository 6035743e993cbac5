"""What a card shows runs, and what comes from outside is inert in it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import svdbank
from tests.adapter.every import write_base
from tests.checkpoint.hub_server import LocalHub


def test_the_cards_snippet_runs(hub: LocalHub, tmp_path: Path, single_thread: None) -> None:
    base = write_base("untied", tmp_path / "llama")
    hub.commit("org/llama", {path.name: path.read_bytes() for path in base.iterdir()})
    bank = svdbank.build("org/llama", tmp_path / "bank", rank=4, device="cpu")
    svdbank.push(bank, "me/llama-bank")
    text = hub.repositories["me/llama-bank"].head()["README.md"].data.decode()
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, object] = {}
    exec(code[0], names)
    layer = names["model"].base_model.model.model.layers[0].self_attn.q_proj  # type: ignore[attr-defined]
    assert torch.equal(layer.lora_B["default"].weight, bank["model.layers.0.self_attn.q_proj.weight"].left(4))


def test_what_a_bases_card_says_is_inert(hub: LocalHub, banks: dict[str, Path], base_files: dict[str, bytes]) -> None:
    hostile = b"---\nlicense: other\nlicense_name: '[x](http://evil) <script>'\nlicense_link: \"a\\n# b\"\n---\n"
    head = hub.repositories["org/base"].branches["main"]
    hub.repositories["org/base"].commits[head]["README.md"].__dict__["data"] = hostile
    svdbank.push(banks["hub"], "me/bank")
    body = hub.repositories["me/bank"].head()["README.md"].data.decode().split("\n---\n", 1)[1]
    assert "<script>" not in body and "](http://evil)" not in body and "\n# b" not in body


@pytest.mark.parametrize("licence", [b"", b"---\nlicense: mit\n---\n", b"---\nlicense: [mit, apache-2.0]\n---\n", b"no card"])
def test_any_licence_is_carried_over(hub: LocalHub, banks: dict[str, Path], licence: bytes) -> None:
    head = hub.repositories["org/base"].branches["main"]
    hub.repositories["org/base"].commits[head]["README.md"].__dict__["data"] = licence
    svdbank.push(banks["hub"], "me/bank")
    text = hub.repositories["me/bank"].head()["README.md"].data.decode()
    assert "## Licence" in text and (b"mit" not in licence or "mit" in text.split("## Licence")[1])
