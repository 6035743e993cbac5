"""``init`` writes a PEFT folder that PEFT loads as its own, whole or not at all."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file

import svdbank
from svdbank.adapter.base import facts_of, task_of
from svdbank.adapter.folder import read_folder
from svdbank.adapter.settings import CACHE, CONFIG, WEIGHTS
from svdbank.bank.reading import Bank
from svdbank.core import disk
from svdbank.core.errors import BankError, OptionError
from tests.peft.models import factors, lora_layers, only_a_trains, quiet, without_svd


@pytest.fixture(scope="module")
def bank(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Bank:
    return svdbank.build(
        minilm, tmp_path_factory.mktemp("bank") / "bank", rank=16, side="left", targets=("query", "value", "word_embeddings")
    )


def fresh(minilm: Path) -> torch.nn.Module:
    from transformers import AutoModel

    with quiet():
        return AutoModel.from_pretrained(minilm)


def test_peft_loads_the_folder_without_an_svd_and_trains_only_a(minilm: Path, bank: Bank, tmp_path: Path) -> None:
    report = svdbank.init(bank, rank=8, output=tmp_path / "a", targets=("query", "word_embeddings"))
    assert report.weights == 7 and report.rank == 8 and str(report) == str(tmp_path / "a")
    with without_svd(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # an unknown field or a missing key would warn
        warnings.filterwarnings("ignore", category=FutureWarning)
        model = peft.PeftModel.from_pretrained(fresh(minilm), tmp_path / "a", is_trainable=True, low_cpu_mem_usage=True)
    assert only_a_trains(model)
    layers = lora_layers(model)
    assert len(layers) == 7 and "embeddings.word_embeddings" in layers
    for module, layer in layers.items():
        A, B = factors(layer)
        assert torch.equal(B, bank[f"{module}.weight"].left(8)) and not A.any()
        assert layer.scaling["default"] == 1.0
    assert report.trainable_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_what_is_written_is_what_peft_s_config_reads_back(bank: Bank, tmp_path: Path) -> None:
    svdbank.init(
        bank,
        rank=4,
        output=tmp_path / "a",
        alpha=8,
        dropout=0.05,
        rslora=True,
        task_type="FEATURE_EXTRACTION",
        base_model="org/base",
    )
    written = json.loads((tmp_path / "a" / CONFIG).read_text())
    config = peft.LoraConfig.from_pretrained(str(tmp_path / "a"))
    read = config.to_dict()
    assert read["target_modules"] == set(written.pop("target_modules"))
    assert {key: read[key] for key in written if key not in ("inference_mode", "peft_type")} == {
        key: value for key, value in written.items() if key not in ("inference_mode", "peft_type")
    }
    assert config.init_lora_weights == "mica" and config.r == 4 and config.lora_alpha == 8 and config.use_rslora
    assert config.base_model_name_or_path == "org/base" and config.task_type == "FEATURE_EXTRACTION"


def test_the_folder_holds_factors_only_and_never_the_base(bank: Bank, tmp_path: Path) -> None:
    svdbank.init(bank, rank=4, output=tmp_path / "a", targets=("query", "word_embeddings"))
    keys = load_file(tmp_path / "a" / WEIGHTS).keys()
    assert len(keys) == 14 and not any("base_layer" in key for key in keys)
    assert "base_model.model.embeddings.word_embeddings.lora_embedding_B" in keys
    assert "base_model.model.encoder.layer.0.attention.self.query.lora_A.weight" in keys
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == sorted(["README.md", CONFIG, WEIGHTS, CACHE])


def test_the_cache_file_records_the_base_of_its_own_weights(minilm: Path, bank: Bank, tmp_path: Path) -> None:
    svdbank.init(bank, rank=4, output=tmp_path / "a", targets=("query",))
    cache = read_folder(tmp_path / "a").cache
    assert cache is not None and cache.method == "mica" and cache.band == (0, 4) and cache.rank == 4
    assert len(cache.weights) == 6 and cache.bank_format == 1
    smaller = svdbank.build(minilm, tmp_path / "smaller", rank=2, side="left", targets=("query",))
    assert cache.base_digest == smaller.base_digest()


def test_the_card_names_the_base_and_the_way_without_an_svd(bank: Bank, tmp_path: Path) -> None:
    svdbank.init(bank, rank=4, output=tmp_path / "a", base_model='evil"\n- x: <b>`')
    text = (tmp_path / "a" / "README.md").read_text()
    front, _, body = text.removeprefix("---\n").partition("---\n")
    assert 'base_model: "evil\\"\\n- x: <b>`"' in front and "library_name: peft" in front
    assert "low_cpu_mem_usage=True" in body and "<b>" not in body


def test_the_default_targets_are_the_linear_weights(bank: Bank, tmp_path: Path) -> None:
    assert svdbank.init(bank, rank=2, output=tmp_path / "a").weights == 12


@pytest.mark.parametrize("targets", ["nothing_like_it", ["query", "nothing_like_it"], r"encoder\.none\..*"])
def test_a_target_that_matches_nothing_is_an_error_that_lists_what_there_is(
    targets: str | list[str], bank: Bank, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match="query, value, word_embeddings"):
        svdbank.init(bank, rank=2, output=tmp_path / "a", targets=targets)


def test_ranks_that_cannot_be_had_are_errors_with_the_numbers(bank: Bank, tmp_path: Path) -> None:
    with pytest.raises(BankError, match="rank 17 was asked for, but the bank stores 16 of the 384"):
        svdbank.init(bank, rank=17, output=tmp_path / "a")
    for rank in (385, 0, -1):
        with pytest.raises(OptionError, match=rf"rank {rank} is outside 1\.\.384") as caught:
            svdbank.init(bank, rank=rank, output=tmp_path / "a")
        assert "rank 16 or less" in str(caught.value.hint) and "svdbank build MODEL --rank 384" in str(caught.value.hint)
    assert not (tmp_path / "a").exists()


def test_an_unknown_method_is_refused(bank: Bank, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="mica"):
        svdbank.init(bank, output=tmp_path / "a", method="magic")


def test_an_output_in_use_is_refused_and_force_replaces_only_an_adapter(bank: Bank, tmp_path: Path) -> None:
    adapter, notes, file, empty = (tmp_path / name for name in ("adapter", "notes", "file", "empty"))
    svdbank.init(bank, rank=2, output=adapter)
    with pytest.raises(OptionError, match="not empty") as caught:
        svdbank.init(bank, rank=4, output=adapter)
    assert "--force" in str(caught.value.hint) and read_folder(adapter).settings.r == 2
    svdbank.init(bank, rank=4, output=adapter, force=True)
    assert read_folder(adapter).settings.r == 4
    notes.mkdir()
    (notes / "mine.txt").write_text("keep")
    with pytest.raises(OptionError, match="holds no adapter"):
        svdbank.init(bank, rank=2, output=notes, force=True)
    assert (notes / "mine.txt").read_text() == "keep"
    file.write_text("")
    with pytest.raises(OptionError, match="not a folder"):
        svdbank.init(bank, rank=2, output=file, force=True)
    empty.mkdir()
    svdbank.init(bank, rank=2, output=empty)
    assert read_folder(empty).settings.r == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "empty", "file", "notes"]


class Stop(Exception):  # noqa: N818 - not an error, a power cut
    """The machine stops here."""


def test_stopped_at_any_file_operation_the_adapter_is_whole_or_absent(bank: Bank, tmp_path: Path) -> None:
    """Every operation in turn; what stands at the output afterwards is nothing, or all of it."""
    operations: list[str] = []
    with disk.observe(lambda operation, path: operations.append(operation)):
        svdbank.init(bank, rank=2, output=tmp_path / "counted" / "a", targets=("query",))
    assert {"create", "write", "fsync", "rename", "fsync-dir"} <= set(operations)
    for stop in range(len(operations)):
        output, seen = tmp_path / f"run{stop}" / "a", 0

        def halt(operation: str, path: Path, stop: int = stop) -> None:
            nonlocal seen
            seen += 1
            if seen > stop:
                raise Stop

        with disk.observe(halt), pytest.raises(Stop):
            svdbank.init(bank, rank=2, output=output, targets=("query",))
        if output.exists():
            assert len(read_folder(output).factors) == 6
        svdbank.init(bank, rank=2, output=output, targets=("query",), force=True)
        assert len(read_folder(output).factors) == 6


def test_an_adapter_that_cannot_be_replaced_stays(bank: Bank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "exchange", lambda one, other: False)  # the way of systems that cannot
    svdbank.init(bank, rank=2, output=tmp_path / "a", targets=("query",))
    renames = 0

    def fail(operation: str, path: Path) -> None:
        nonlocal renames
        renames += operation == "rename"
        if operation == "rename" and renames == 2:  # the first moves the old one aside
            raise OSError(5, "Input/output error", str(path))

    with disk.observe(fail), pytest.raises(OSError, match="Input/output"):
        svdbank.init(bank, rank=4, output=tmp_path / "a", force=True)
    assert read_folder(tmp_path / "a").settings.r == 2
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_model_s_folder_is_recorded_by_its_full_path_unless_a_base_is_named(
    minilm: Path, bank: Bank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bank knows it as ``model`` alone, with which nothing finds it; this one is an encoder, and no task of PEFT's."""
    svdbank.build(minilm, rank=2, side="left", targets=("query",))
    monkeypatch.chdir(minilm.parent)
    assert svdbank.init("model", rank=2, output=tmp_path / "a", targets=("query",)).base == str(minilm)
    settings = read_folder(tmp_path / "a").settings
    assert settings.base_model_name_or_path == str(minilm) and settings.revision is None and settings.task_type is None
    svdbank.init("model", rank=2, output=tmp_path / "b", targets=("query",), base_model="org/base", task_type="SEQ_CLS")
    settings = read_folder(tmp_path / "b").settings
    assert settings.base_model_name_or_path == "org/base" and settings.task_type == "SEQ_CLS"
    assert svdbank.init(bank, rank=2, output=tmp_path / "c", targets=("query",)).base == "model"  # a bank knows no more


@pytest.mark.parametrize(
    ("architecture", "kind", "task"),
    [
        ("LlamaForCausalLM", "llama", "CAUSAL_LM"),
        ("GPT2LMHeadModel", "gpt2", "CAUSAL_LM"),
        ("T5ForConditionalGeneration", "t5", "SEQ_2_SEQ_LM"),
        ("T5WithLMHeadModel", "t5", None),
        ("BartForConditionalGeneration", "bart", "SEQ_2_SEQ_LM"),
        ("LlavaForConditionalGeneration", "llava", None),
        ("MistralModel", "mistral", None),
    ],
)
def test_the_task_is_what_the_configuration_plainly_says(
    architecture: str, kind: str, task: str | None, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture], "model_type": kind}))
    assert task_of(facts_of([("org/unknown", None), (str(tmp_path), None)])) == task
    assert task_of(facts_of([("org/unknown", None)])) is None


def test_a_model_s_name_finds_its_cached_bank(minilm: Path, tmp_path: Path) -> None:
    svdbank.build(minilm, rank=2, side="left", targets=("query",))
    assert svdbank.init(minilm, rank=2, output=tmp_path / "a", targets=("query",)).weights == 6
