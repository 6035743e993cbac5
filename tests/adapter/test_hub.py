"""Adapters by their Hub ids, in every verb that reads adapters: what they do is what they do with the folders."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import svdbank
import svdbank.peft
from tests.adapter.every import TOKENS, write_base
from tests.adapter.settings import Case, logits, save, small_llama, wrapped
from tests.checkpoint.hub_server import LocalHub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """What the real client asks in this process, with a cache of its own."""
    with LocalHub() as running:
        running.point(monkeypatch, tmp_path / "home")
        yield running


def every_verb(base: Path, folder: Path, one: str, two: str) -> list[object]:
    """What every verb says of two adapters; what they write is in ``folder``."""
    import transformers

    svdbank.merge([one, two], output=folder / "merge", weights=[0.5, 0.25])
    svdbank.stack([one, f"other={two}"], output=folder / "stack")
    svdbank.export(one, to="lora", output=folder / "export")
    svdbank.fuse(base, one, folder / "fuse")
    compared = svdbank.compare({"one": one, "other": two})
    stacks = {"one": one, "both": [one, two]}
    evaluated = svdbank.eval(base, data={"text": base / "text.txt"}, adapters=stacks, dtype="float32")
    loaded = svdbank.peft.load_adapter(transformers.AutoModelForCausalLM.from_pretrained(base), one, is_trainable=False)
    return [
        compared.pairs[0].all.cosine,
        [score.loss for score in evaluated.scores],
        logits(loaded.eval(), TOKENS).tolist(),
        svdbank.read_adapter(folder / "stack").names,
    ]


@pytest.fixture
def two_adapters(tmp_path: Path) -> tuple[str, str]:
    for seed, name in enumerate(("one", "two")):
        save(Case(), wrapped(Case(), small_llama(), seed + 1, {}), tmp_path / name)
    return str(tmp_path / "one"), str(tmp_path / "two")


def pushed(hub: LocalHub, folder: str) -> str:
    return hub.commit(f"user/{Path(folder).name}", {path.name: path.read_bytes() for path in Path(folder).iterdir()})


def test_every_verb_takes_adapters_by_their_hub_ids(
    hub: LocalHub, two_adapters: tuple[str, str], tmp_path: Path, single_thread: None
) -> None:
    base = write_base("untied", tmp_path / "base")
    commit = [pushed(hub, folder) for folder in two_adapters][1]
    by_path = every_verb(base, tmp_path / "by-path", *two_adapters)
    by_id = every_verb(base, tmp_path / "by-id", "user/one", f"user/two@{commit}")
    assert by_id == by_path
    assert by_id[-1] == ("one", "other")
    for place in ("merge", "stack", "export", "fuse"):
        name = "model.safetensors" if place == "fuse" else "adapter_model.safetensors"
        files = [tmp_path / way / place / name for way in ("by-id", "by-path")]
        assert files[0].read_bytes() == files[1].read_bytes(), place


def test_training_on_top_of_an_adapter_on_the_hub_records_the_commit_it_stands_on(
    hub: LocalHub, two_adapters: tuple[str, str], small: Path, small_bank: svdbank.Bank, legal: Path, tmp_path: Path
) -> None:
    import peft
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "beneath")
    commit = pushed(hub, str(tmp_path / "beneath"))
    options = {"data": legal, "steps": 1, "length": 32, "batch_size": 1, "rank": 2, "targets": "q_proj", "keep": "last"}
    losses = []
    for number, place in enumerate([str(tmp_path / "beneath"), "user/beneath"]):
        report = svdbank.train(small, output=tmp_path / str(number), on_top_of=place, **options)
        assert report.held_out is not None
        losses.append(report.held_out.after)
    assert losses[0] == losses[1]
    assert f"user/beneath@{commit}" in (tmp_path / "1" / "training.toml").read_text()


@pytest.mark.parametrize("verb", [svdbank.merge, svdbank.stack])
def test_a_repository_that_is_not_there_is_said_before_any_work(verb, hub: LocalHub, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(svdbank.SvdbankError, match="user/nothing"):
        verb(["user/nothing", "user/neither"], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
