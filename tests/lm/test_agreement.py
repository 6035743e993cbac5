"""The figures of ``train``, ``eval``, a plain forward and lm-eval are the same, on a model that needs BOS and on one that has none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import svdbank
from svdbank.lm.held_out import hold_out
from svdbank.lm.texts import read_documents
from svdbank.lm.windows import windows
from svdbank_cli.main import run
from tests.lm.models import write_jsonl
from tests.peft.models import quiet

LENGTH = 64
#: Figures are printed with three digits after the point.
AGREE = 1e-3

TWO_STEPS = ["-r", "2", "--steps", "2", "--batch-size", "1", "--length", "64", "--lr", "1e-3", "--dtype", "float32"]

MODELS = ["gemma", "small", pytest.param("smollm2", marks=pytest.mark.soak)]


def opened(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model and three texts: documents that fit a window, longer ones, and one to train on whose held-out part is known."""
    from svdbank.lm.packaged import licence_texts

    folder = request.getfixturevalue(request.param)
    model, tokenizer = opened(folder)
    place = tmp_path_factory.mktemp("texts")
    licences = licence_texts()
    fits = [text[:90] for text in licences[:8]]
    assert all(len(tokenizer(text)["input_ids"]) <= LENGTH for text in fits)
    texts = {"fits": fits, "long": [text[:700] for text in licences[8:11]]}
    files = {name: write_jsonl(place / f"{name}.jsonl", own) for name, own in texts.items()}
    data = write_jsonl(place / "data.jsonl", [text[:400] for text in licences[20:32]])
    texts["held out"] = list(hold_out(read_documents([str(data)]), share=0.2, seed=0)[1]["text"])
    files["held out"] = write_jsonl(place / "held-out.jsonl", texts["held out"])
    return SimpleNamespace(folder=folder, model=model, tokenizer=tokenizer, texts=texts, files=files, data=data)


@pytest.fixture(scope="module")
def figures(case: Any) -> dict[str, float]:
    return {
        score.text: score.loss for score in svdbank.eval(case.folder, data=case.files, length=LENGTH, dtype="float32").scores
    }


def surprise(model: Any, tokens: Sequence[int]) -> torch.Tensor:
    """Nats of every token but the first, by a plain forward."""
    ids = torch.tensor([tokens])
    with torch.inference_mode():
        logits = model(input_ids=ids).logits[0]
    return torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")


def plain_loss(model: Any, tokenizer: Any, texts: Sequence[str]) -> float:
    """What a plain loop gives: BOS first where the tokenizer adds it, then windows that share one token."""
    total, count = 0.0, 0
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        bos = tokenizer(text)["input_ids"][: -len(ids)]
        start = 0 if bos else 1
        while start < len(ids):
            context = [*bos, *ids[max(0, start - 1) : start]]
            ahead = ids[start : start + LENGTH - len(context)]
            total += float(surprise(model, [*context, *ahead])[len(context) - 1 :].sum())
            count += len(ahead)
            start += len(ahead)
    return total / count


@pytest.mark.parametrize("name", ["fits", "long", "held out"])
def test_eval_is_a_plain_forward(case: Any, figures: dict[str, float], name: str) -> None:
    # float32 sums over windows padded to another length: some units in the sixth digit.
    assert figures[name] == pytest.approx(plain_loss(case.model, case.tokenizer, case.texts[name]), rel=1e-5)


def test_train_measures_what_eval_measures(case: Any, figures: dict[str, float], tmp_path: Path) -> None:
    report = svdbank.train(
        case.folder,
        output=tmp_path / "adapter",
        data=case.data,
        retain=[case.files["fits"], case.files["long"]],
        method="lora",
        rank=2,
        steps=2,
        batch_size=1,
        length=LENGTH,
        held_out=0.2,
        learning_rate=1e-3,
        dtype="float32",
    )
    assert report.held_out is not None
    before = {"held out": report.held_out.before} | {Path(change.text).stem: change.before for change in report.retained}
    assert before == pytest.approx(figures, abs=AGREE)
    adapted = svdbank.eval(case.folder, data=case.files, adapters={"it": report.adapter}, length=LENGTH, dtype="float32")
    after = {score.text: score.loss for score in adapted.scores if score.adapter == "it"}
    assert after["held out"] == pytest.approx(report.held_out.after, abs=AGREE)
    assert {name: after[name] for name in ("fits", "long")} == pytest.approx(
        {Path(change.text).stem: change.after for change in report.retained}, abs=AGREE
    )


@pytest.mark.soak
def test_it_is_lm_eval_s_over_the_same_tokens(case: Any, figures: dict[str, float]) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    def windowed(length: int) -> Any:
        return HFLM(pretrained=case.model, tokenizer=case.tokenizer, add_bos_token=False, max_length=length, batch_size=1)

    theirs = windowed(LENGTH)

    def rolling(texts: Sequence[str], theirs: Any = theirs) -> float:
        requests = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(texts)]
        tokens = sum(len(case.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
        return -sum(theirs.loglikelihood_rolling(requests, disable_tqdm=True)) / tokens

    if len(case.tokenizer("a")["input_ids"]) > len(case.tokenizer("a", add_special_tokens=False)["input_ids"]):
        assert figures["fits"] == pytest.approx(rolling(case.texts["fits"]), abs=AGREE)
        # Its later windows begin without BOS, which this model needs.
        assert rolling(case.texts["long"]) > figures["long"] + 0.1
        for length in (LENGTH, 2 * LENGTH, 4 * LENGTH):
            ours = svdbank.eval(case.folder, data=[case.files["long"]], length=length, dtype="float32").scores[0]
            found = rolling(case.texts["long"], windowed(length))
            print(f"windows of {length}, {ours.tokens} tokens: {ours.loss:.4f}, lm-eval {found:.4f}, {found - ours.loss:+.4f}")
        return
    # Without BOS of its own, lm-eval puts a token before the text all the same and scores the first one: both are left out.
    whole = [case.tokenizer(text)["input_ids"] for text in case.texts["fits"]]
    scored = theirs._loglikelihood_tokens([(("", ""), ids[:1], ids[1:]) for ids in whole], disable_tqdm=True)
    assert figures["fits"] == pytest.approx(-sum(value for value, _ in scored) / sum(len(ids) - 1 for ids in whole), abs=AGREE)


@pytest.fixture(scope="module")
def bare(gemma: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that needs BOS with a tokenizer that has it and does not add it."""
    folder = tmp_path_factory.mktemp("models") / "bare"
    shutil.copytree(gemma, folder)
    document = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(document | {"post_processor": None}))
    return folder


def test_a_missing_bos_is_said_with_what_mends_it(
    bare: Path, gemma: Path, small: Path, legal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--data", f"law={legal}", "--length", "64", "--tokens", "500"]
    assert run(["eval", str(bare), *options]) == 0
    said = capsys.readouterr().err
    assert "law: the text costs 0." in said and "after the tokenizer's BOS (<bos>)" in said
    hint = said.partition("In Python: ")[2].strip().splitlines()[0]
    assert run(["train", str(bare), "-o", str(tmp_path / "a"), "--data", str(legal), "--method", "lora", *TWO_STEPS]) in (0, 5)
    assert "after the tokenizer's BOS (<bos>)" in capsys.readouterr().err
    from transformers import AutoTokenizer

    exec(hint, {"tokenizer": AutoTokenizer.from_pretrained(bare), "FOLDER": bare})
    for mended in (bare, gemma, small):
        assert not svdbank.eval(mended, data=[legal], length=64, tokens=500).notes


def test_a_window_that_holds_nothing_but_bos_and_context_is_refused(gemma: Path, legal: Path) -> None:
    from svdbank.core.errors import OptionError

    with pytest.raises(OptionError, match="holds nothing to predict") as caught:
        svdbank.eval(gemma, data=[legal], length=2)
    assert caught.value.hint == "--length 3 or more"
    _, tokenizer = opened(gemma)
    ids = tokenizer("a licence", add_special_tokens=False)["input_ids"]
    assert [window.predicted for window in windows(["a licence"], tokenizer, 3)] == [2] + [1] * (len(ids) - 2)
