"""With ``--packing`` a document in a block is to the model what it is alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import svdbank
from svdbank.core.errors import OptionError
from svdbank.core.specs import Progress
from svdbank.lm import head
from svdbank.lm.blocks import Collator
from svdbank.lm.packing import check_packing, refuse_stateful
from tests.lm.models import write_jsonl
from tests.peft.models import quiet


@pytest.fixture(params=["small", "gemma"])
def model(request: pytest.FixtureRequest) -> Any:
    """A Llama, and a Gemma-3 whose sliding window of 64 tokens is shorter than the documents."""
    from transformers import AutoModelForCausalLM

    with quiet():
        loaded = AutoModelForCausalLM.from_pretrained(request.getfixturevalue(request.param), dtype=torch.float32).eval()
    loaded.config.use_cache = False  # as in training: Transformers looks for documents in the positions where nothing is kept
    return loaded


def test_a_packed_block_is_its_documents_one_by_one(model: Any) -> None:
    check_packing(model, "it")
    generator = torch.Generator().manual_seed(0)
    lengths = [100, 3, 90, 30]
    tokens = torch.randint(3, 2000, (sum(lengths),), generator=generator)
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    block = {"input_ids": tokens.tolist(), "starts": starts, "context": 1}
    with torch.inference_mode():
        alone = torch.cat([model(input_ids=part[None]).logits[0] for part in tokens.split(lengths)])
        packed, plain = (
            model(**{name: value for name, value in Collator(0, packing=way)([block]).items() if name != "labels"}).logits[0]
            for way in (True, False)
        )
    largest = float(alone.abs().max())
    assert float((packed - alone).abs().max()) < 1e-5 * largest  # float32 sums in another order
    assert float((plain - alone).abs().max()) > 1e-2 * largest


def test_the_loss_of_a_packed_block_is_that_of_its_documents(model: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    parts = [torch.cat([torch.tensor([2]), torch.randint(3, 2000, (n,), generator=generator)]) for n in (70, 9, 80)]
    block = {"input_ids": torch.cat(parts).tolist(), "starts": [0, 71, 81], "context": 1}
    with torch.inference_mode():
        loss = float(model(**Collator(1, packing=True)([block])).loss)
        sums = [float(model(input_ids=part[None], labels=part[None]).loss) * (len(part) - 1) for part in parts]
    assert loss == pytest.approx(sum(sums) / sum(len(part) - 1 for part in parts), rel=1e-5)


def test_a_model_with_a_state_is_refused_by_name() -> None:
    import transformers

    tiny: dict[str, Any] = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1}
    mamba = transformers.MambaForCausalLM(transformers.MambaConfig(**tiny, state_size=4))
    with pytest.raises(OptionError, match="tiny: a mamba model carries what it has read") as caught:
        refuse_stateful(mamba, "tiny")
    assert caught.value.hint == "leave --packing out"
    # Transformers does not call this one stateful: its convolution reads across.
    lfm = transformers.Lfm2ForCausalLM(
        transformers.Lfm2Config(
            **tiny, num_attention_heads=2, num_key_value_heads=1, intermediate_size=16, layer_types=["conv"]
        )
    )
    with pytest.raises(OptionError, match="a lfm2 model"):
        check_packing(lfm, "tiny")


RECIPE: dict[str, Any] = {
    "method": "lora",
    "rank": 2,
    "steps": 3,
    "batch_size": 2,
    "length": 48,
    "held_out": 0.2,
    "learning_rate": 1e-3,
    "dtype": "float32",
    "log_steps": 1,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from svdbank.lm.packaged import licence_texts

    return write_jsonl(tmp_path_factory.mktemp("texts") / "data.jsonl", [text[:150] for text in licence_texts()[:30]])


def test_train_packs_where_it_is_told_to(gemma: Path, data: Path, tmp_path: Path) -> None:
    plain, packed = (
        svdbank.train(gemma, output=tmp_path / str(way), data=data, packing=way, **RECIPE) for way in (False, True)
    )
    assert plain.held_out is not None and packed.held_out is not None
    assert plain.held_out.before == packed.held_out.before, "what is measured are documents, not blocks"
    # The first step's loss is that of the untouched model: what came before a document in its block no longer tells it anything.
    assert abs(plain.curve[0][1] - packed.curve[0][1]) > 1e-2
    assert "packing = true" in (tmp_path / "True" / "training.toml").read_text()


def test_a_state_space_model_is_refused_before_its_weights_are_read(small: Path, data: Path, tmp_path: Path) -> None:
    import shutil

    import transformers

    folder = tmp_path / "mamba"
    shutil.copytree(small, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    transformers.MambaConfig(vocab_size=4096, hidden_size=16, num_hidden_layers=1, state_size=4).save_pretrained(folder)

    def refuse_loading(progress: Progress) -> None:
        assert progress.stage != "loading the model"

    with pytest.raises(OptionError, match="a mamba model carries"):
        svdbank.train(folder, output=tmp_path / "a", data=data, packing=True, progress=refuse_loading, **RECIPE)


def test_train_by_pieces_of_the_vocabulary_is_train(
    gemma: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = {name: value for name, value in RECIPE.items() if name != "learning_rate"}
    whole = svdbank.train(gemma, output=tmp_path / "whole", data=data, **recipe)
    monkeypatch.setattr(head, "free_bytes", lambda device: 0)
    monkeypatch.setattr(head, "PIECE", 10 * 2048)
    pieces = svdbank.train(gemma, output=tmp_path / "pieces", data=data, **recipe)
    assert whole.calibration is not None and pieces.calibration is not None
    # float32 sums in another order: differences of losses of about 1e-6 for a rise of 0.05.
    assert pieces.calibration.rate == pytest.approx(whole.calibration.rate, rel=1e-2)
    assert pieces.calibration.curve[0][1:] == pytest.approx(whole.calibration.curve[0][1:], abs=1e-3)
    assert whole.held_out is not None and pieces.held_out is not None
    assert pieces.held_out.before == pytest.approx(whole.held_out.before, rel=1e-5)
    assert pieces.held_out.after == pytest.approx(whole.held_out.after, abs=1e-3)  # Adam's first steps go by signs
    assert [loss for _, loss in pieces.curve] == pytest.approx([loss for _, loss in whole.curve], abs=1e-3)
