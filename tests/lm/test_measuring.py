"""``eval`` measures what a plain loop over documents measures, and says how sure that is."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import torch

import svdbank
from svdbank.adapter.folder import read_folder
from svdbank.bank.reading import Bank
from svdbank.core.errors import CheckpointError, MissingExtraError, OptionError
from svdbank.core.specs import Progress
from svdbank.lm.scores import Moments
from svdbank.verbs.eval import EvalReport
from svdbank_cli.main import run
from tests.peft.models import quiet


@pytest.fixture(scope="module")
def adapter(small: Path, small_bank: Bank, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MiCA adapter that does something: A is drawn at random."""
    folder = tmp_path_factory.mktemp("adapter") / "law"
    svdbank.init(small, rank=4, output=folder, base_model=str(small), task_type="CAUSAL_LM")
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for key, value in tensors.items():
        if ".lora_A." in key:
            value.copy_(torch.randn(value.shape, generator=generator) / 20)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    assert read_folder(folder).factors
    return folder


@pytest.fixture(scope="module")
def report(small: Path, adapter: Path, legal: Path, device: str) -> EvalReport:
    torch.set_num_threads(1)
    # A GPU would choose bfloat16.
    options: dict[str, Any] = {"length": 48, "batch_size": 3, "dtype": "float32"}
    return svdbank.eval(small, data={"law": legal}, adapters={"law": adapter, "twice": [adapter]}, **options)


def test_it_is_the_loss_of_a_plain_loop_over_documents(report: EvalReport, small: Path, legal: Path, adapter: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet():
        model = AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(small)
    texts = [json.loads(line)["text"] for line in legal.read_text().splitlines()]

    def measured(model: Any) -> list[tuple[float, int]]:
        """(summed loss, predicted tokens) of each document, every token but its first predicted once, from at most 47 before it."""
        found = []
        for text in texts:
            ids = tokenizer(text, return_tensors="pt")["input_ids"][0]
            total, count = 0.0, 0
            for start in range(0, len(ids) - 1, 47):
                window = ids[start : start + 48][None]
                with torch.inference_mode():
                    total += float(model(input_ids=window, labels=window).loss) * (window.shape[1] - 1)
                count += window.shape[1] - 1
            assert count == len(ids) - 1
            found.append((total, count))
        return found

    base = measured(model)
    tuned = measured(PeftModel.from_pretrained(model, adapter, low_cpu_mem_usage=True))
    scores = {score.adapter: score for score in report.scores}
    tokens = sum(count for _, count in base)
    for name, sums in (("base", base), ("law", tuned), ("twice", tuned)):
        score = scores[name]
        mean = sum(total for total, _ in sums) / tokens
        # float32 sums over windows that are padded to another length: a few units in the sixth digit.
        assert score.loss == pytest.approx(mean, rel=1e-5)
        assert score.perplexity == pytest.approx(math.exp(mean), rel=1e-3)
        assert (score.tokens, score.draws, score.over) == (tokens, len(texts), "documents")
        difference = [(a - b, n) for (a, n), (b, _) in zip(sums, base, strict=True)]
        for value, error, pairs in ((score.loss, score.error, sums), (score.change, score.change_error, difference)):
            # The standard error of a ratio with documents as clusters, from its residuals.
            ratio = sum(s for s, _ in pairs) / tokens
            squares = sum((s - ratio * n) ** 2 for s, n in pairs)
            assert value == pytest.approx(ratio, rel=1e-4, abs=1e-5)
            assert error == pytest.approx(math.sqrt(squares * len(pairs) / (len(pairs) - 1)) / tokens, rel=1e-3, abs=1e-6)
    assert scores["base"].change == 0 and scores["law"].change_error > 0


def test_the_error_of_equal_draws_is_the_textbook_s() -> None:
    moments = Moments()
    values = [3.0, 5.0, 4.0, 8.0]
    for value in values:
        moments.add(value * 10, 10)
    assert moments.mean() == fmean(values)
    assert moments.error() == pytest.approx(stdev(values) / 2)
    single = Moments()
    single.add(1.0, 1)
    assert math.isnan(single.error())


@pytest.mark.usefixtures("device")
def test_one_document_is_measured_over_windows(small: Path, legal: Path, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text(json.loads(legal.read_text().splitlines()[0])["text"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # what Transformers says to its callers is not for ours
        report = svdbank.eval(small, data=[tmp_path / "book.txt"], length=16, tokens=50)
    [score] = report.scores
    assert (score.text, score.over, score.tokens, score.draws) == ("book.txt", "windows", 50, 4)
    assert score.error > 0


def test_the_command_prints_the_table_and_json(
    small: Path, adapter: Path, legal: Path, report: EvalReport, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "eval",
        str(small),
        "--adapter",
        f"law={adapter}",
        "--data",
        f"law={legal}",
        "--length",
        "48",
        "--tokens",
        "400",
        "-q",
    ]
    assert run(arguments) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["text", "adapter", "loss", "perplexity", "change", "tokens", "errors", "over"]
    assert [line.split()[:2] for line in table[1:]] == [["law", "base"], ["law", "law"]]
    assert run([*arguments, "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    assert [score["adapter"] for score in scores] == ["base", "law"] and scores[0]["tokens"] == 400


def test_memory_is_bounded_by_a_batch_not_by_the_text(small: Path, tmp_path: Path) -> None:
    """Only a stretch of a long file is in memory when the first tokens are measured, and reading stops where it is told."""
    path = tmp_path / "long.txt"
    with path.open("w") as file:
        for i in range(200_000):
            file.write(f"{i} licences may be granted in writing only.\n")
    from svdbank.lm.texts import STRETCH, documents_of

    first = next(documents_of(str(path)))
    assert len(first) <= 2 * STRETCH < path.stat().st_size / 50
    assert svdbank.eval(small, data=[path], length=32, tokens=64).scores[0].tokens == 64


def refuse_loading(progress: Progress) -> None:
    assert progress.stage != "loading the model"


def test_what_cannot_be_meant_is_said_before_any_weight_is_read(
    small: Path, legal: Path, adapter: Path, tmp_path: Path
) -> None:
    (tmp_path / "blank.txt").write_text(" \n\n")
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({}, OptionError, "nothing to measure"),
        ({"data": ["nowhere.txt"]}, OptionError, "no such file"),
        ({"data": [tmp_path / "blank.txt"]}, OptionError, "holds no text"),
        ({"data": [legal], "adapters": {"a": tmp_path}}, CheckpointError, "no adapter here"),
        ({"data": [legal], "adapters": {"base": adapter}}, OptionError, "'base' is the model without"),
        ({"data": [legal], "length": 9999}, OptionError, "longer than the 8192 positions"),
        ({"data": [legal, legal]}, OptionError, "two texts are called"),
    ]
    for options, kind, says in cases:
        with pytest.raises(kind, match=says):
            svdbank.eval(small, progress=refuse_loading, **options)


def test_tasks_without_lm_eval_name_the_extra(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval", None)  # what an import finds where a package is not installed
    with pytest.raises(MissingExtraError) as caught:
        svdbank.eval(small, tasks=["hellaswag"], progress=refuse_loading)
    assert caught.value.hint == "pip install 'svdbank[eval]'"


TASK = """
task: clauses
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{start}}}}"
doc_to_choice: "{{{{ends}}}}"
doc_to_target: "{{{{right}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.mark.soak
def test_a_task_of_lm_eval_is_scored_for_base_and_adapter(small: Path, adapter: Path, tmp_path: Path) -> None:
    """A real task of lm-eval's own format over a file of ours: which of two words ends the clause."""
    rows = [{"start": "Permission is hereby granted, free of", "ends": ["charge", "zebra"], "right": 0} for _ in range(6)]
    (tmp_path / "clauses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "clauses.yaml").write_text(TASK.format(data=tmp_path / "clauses.jsonl"))
    report = svdbank.eval(small, tasks=["clauses"], task_folder=tmp_path, adapters={"law": adapter})
    found = {(score.adapter, score.metric): score.value for score in report.tasks}
    assert set(found) == {("base", "acc"), ("law", "acc")}
    assert all(value in (0.0, 1.0) for value in found.values()), "six equal questions: all right or all wrong"
    with pytest.raises(OptionError, match="knows no task 'no_such_task'"):
        svdbank.eval(small, tasks=["no_such_task"])
