"""``train`` lowers the loss it says it lowers, by the method it says, and leaves a folder that PEFT loads."""

from __future__ import annotations

import json
import math
import resource
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import svdbank
from svdbank.adapter.folder import read_folder
from svdbank.bank.reading import Bank
from svdbank.core.errors import BankNotFoundError, CheckpointError, OptionError, SvdbankError
from svdbank.core.specs import Progress
from svdbank.lm.blocks import pack
from svdbank.lm.held_out import hold_out
from svdbank.lm.memory import OutOfMemoryError
from svdbank.lm.texts import read_documents
from svdbank.lm.windows import Window, sample
from svdbank.training.options import read_config, resolve, to_toml
from svdbank.training.report import TrainReport
from tests.lm.models import write_jsonl
from tests.peft.models import mica, quiet, trainable

RECIPE: dict[str, Any] = {
    "rank": 4,
    "length": 32,
    "batch_size": 2,
    "steps": 10,
    "log_steps": 1,
    "held_out": 0.2,
    "held_out_blocks": 12,
    "seed": 1,
    "learning_rate": 5e-3,
    "dtype": "float32",  # a GPU would choose bfloat16, and what is measured here is compared with float32 on the CPU
}


def train(model: Path, output: Path, data: Path, **options: Any) -> TrainReport:
    return svdbank.train(model, output=output, data=str(data), **{**RECIPE, **options})


def load(model: Path, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import AutoModelForCausalLM

    with quiet():
        return AutoModelForCausalLM.from_pretrained(model, dtype=dtype)


def blocks(model: Path, data: Path) -> Tensor:
    """The blocks that a run with :data:`RECIPE` trains on."""
    from transformers import AutoTokenizer

    documents = hold_out(read_documents([str(data)]), share=RECIPE["held_out"], seed=RECIPE["seed"])[0]
    return torch.tensor(list(pack(documents, AutoTokenizer.from_pretrained(model), RECIPE["length"])["input_ids"]))


def held_out(model: Path, data: Path, **options: Any) -> list[Window]:
    """The windows that a run measures."""
    from transformers import AutoTokenizer

    chosen = {**RECIPE, **options}
    documents = hold_out(read_documents([str(data)]), share=chosen["held_out"], seed=chosen["seed"])[1]
    tokenizer = AutoTokenizer.from_pretrained(model)
    return sample(documents, tokenizer, chosen["length"], blocks=chosen["held_out_blocks"], seed=chosen["seed"])


def loss(model: nn.Module, windows: list[Window]) -> float:
    """Nats a token over the windows, one by one, as Transformers computes it."""
    model.eval()
    total = 0.0
    for window in windows:
        tokens = torch.tensor([window.tokens])
        labels = tokens.clone()
        labels[:, : window.context] = -100
        with torch.inference_mode():
            total += float(model(input_ids=tokens, labels=labels).loss) * window.predicted
    return total / sum(window.predicted for window in windows)


@pytest.fixture(scope="module")
def trained(small: Path, small_bank: Bank, legal: Path, device: str, tmp_path_factory: pytest.TempPathFactory) -> TrainReport:
    torch.set_num_threads(1)
    return train(small, tmp_path_factory.mktemp("trained") / "adapter", legal)


def test_mica_lowers_the_held_out_loss_beyond_its_error(trained: TrainReport) -> None:
    assert trained.held_out is not None
    assert trained.held_out.change < -3 * trained.held_out.change_error < 0
    assert trained.held_out.tokens <= 12 * 32 < trained.held_out.tokens + 32
    assert trained.steps == 10 and trained.tokens == 10 * 2 * 32
    assert len(trained.curve) == 10 and trained.resumed_from is None


def test_the_folder_is_peft_s_with_the_bank_s_directions(trained: TrainReport, small: Path, small_bank: Bank) -> None:
    saved = read_folder(trained.adapter)
    assert saved.cache is not None and saved.cache.band == (0, 4) and saved.cache.method == "mica"
    assert len(saved.factors) == len(small_bank) == 14
    for module, pair in saved.factors.items():
        assert torch.equal(pair.B, small_bank[f"{module}.weight"].left(4))
        assert pair.A.any()
    assert saved.cache.components == {"adapter": dict.fromkeys(saved.factors, ((0, 4),))}
    assert saved.cache.base_digest == small_bank.base_digest(saved.cache.weights)
    assert all(saved.cache.sources[m] == (f"{m}.weight", small_bank[f"{m}.weight"].source_sha256) for m in saved.factors)
    assert trained.trainable_parameters == sum(pair.A.numel() for pair in saved.factors.values())
    assert saved.settings.base_model_name_or_path == str(small) and saved.settings.lora_dropout == 0.05
    names = {path.name for path in Path(trained.adapter).iterdir()}
    assert names == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "svdbank.json",
        "training.json",
        "training.toml",
    }
    assert not list(Path(trained.adapter).parent.glob("*.checkpoints"))


def test_every_file_has_the_permissions_that_the_umask_gives(trained: TrainReport) -> None:
    folder = Path(trained.adapter)
    (folder.parent / "plain").touch()
    plain = (folder.parent / "plain").stat().st_mode
    assert {path.name: path.stat().st_mode for path in folder.iterdir()} == {path.name: plain for path in folder.iterdir()}


def test_a_fresh_adapter_finds_its_base_and_its_task_by_itself(small: Path, small_bank: Bank, tmp_path: Path) -> None:
    """What ``init`` records is what ``train`` records: the full path, and CAUSAL_LM."""
    svdbank.init(small, rank=4, output=tmp_path / "fresh")
    model = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "fresh", low_cpu_mem_usage=True)
    config = model.peft_config["default"]
    assert config.base_model_name_or_path == str(small) and config.task_type == "CAUSAL_LM"


def test_what_is_recorded_is_what_was_done(trained: TrainReport, small: Path, legal: Path, device: str, tmp_path: Path) -> None:
    figures = json.loads((Path(trained.adapter) / "training.json").read_bytes())
    assert figures["held_out"]["after"] == trained.held_out.after and figures["curve"] == [
        list(point) for point in trained.curve
    ]
    config = read_config(Path(trained.adapter) / "training.toml")
    assert config["alpha"] == 4 and config["clip"] == 0.3 and config["data"] == [str(legal)] and config["dtype"] == "float32"
    again = svdbank.train(config=Path(trained.adapter) / "training.toml", output=tmp_path / "again")
    if device != "cpu":  # sums of a GPU may come in any order, which Adam's first steps enlarge
        assert again.held_out is not None and trained.held_out is not None
        assert again.held_out.after == pytest.approx(trained.held_out.after, abs=2e-2)
        return
    assert (tmp_path / "again/adapter_model.safetensors").read_bytes() == (
        Path(trained.adapter) / "adapter_model.safetensors"
    ).read_bytes()
    assert again.held_out == trained.held_out


def test_the_curve_is_that_of_peft_alone(trained: TrainReport, small: Path, legal: Path, device: str, tmp_path: Path) -> None:
    """Transformers' Trainer and PEFT's own MiCA, written out by hand: the recipe of the paper, no svdbank in it."""
    import transformers

    rows = blocks(small, legal)
    model = peft.get_peft_model(load(small), mica(4, lora_dropout=0.05, task_type="CAUSAL_LM"))
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=10,
        per_device_train_batch_size=2,
        learning_rate=5e-3,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        weight_decay=0.01,
        max_grad_norm=0.3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=1,
        data_seed=1,
        use_cpu=device == "cpu",
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in rows])
    trainer.remove_callback(transformers.PrinterCallback)
    transformers.set_seed(1)
    trainer.train()
    theirs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    # The tolerance and its reason are those of tests/peft/test_curve.py; measured is 1e-5.
    assert max(abs(a - b) for (_, a), b in zip(trained.curve, theirs, strict=True)) < 3e-4
    assert abs(theirs[0] - theirs[-1]) > 0.1


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("method", ["mica", "milora", "pissa", "lora"])
def test_every_method_leaves_an_adapter_of_the_unchanged_base(
    method: str, small: Path, small_bank: Bank, legal: Path, tmp_path: Path
) -> None:
    report = train(small, tmp_path / "adapter", legal, method=method, learning_rate=1e-3, steps=6, save_steps=3)
    assert report.held_out is not None and report.held_out.after < report.held_out.before
    rows = held_out(small, legal)
    base = load(small)
    # 1e-4: the residual base is rounded once to float32 and sums run in another order. Training moved the loss by a hundred times that.
    assert loss(base, rows) == pytest.approx(report.held_out.before, abs=1e-4)
    plain = peft.PeftModel.from_pretrained(base, report.adapter, low_cpu_mem_usage=True)
    assert loss(plain, rows) == pytest.approx(report.held_out.after, abs=1e-4)
    assert abs(report.held_out.change) > 1e-2


@pytest.mark.usefixtures("device")
def test_a_4_bit_base_trains_and_the_adapter_works_on_the_bf16_base(
    small: Path, small_bank: Bank, legal: Path, tmp_path: Path
) -> None:
    report = train(small, tmp_path / "adapter", legal, load_in="4bit", steps=6, batch_size=4)
    assert report.held_out is not None and report.held_out.change < -2 * report.held_out.change_error < 0
    for module, pair in read_folder(report.adapter).factors.items():
        assert torch.equal(pair.B, small_bank[f"{module}.weight"].left(4)), module
    rows = held_out(small, legal)
    base = load(small, torch.bfloat16)
    before = loss(base, rows)
    assert loss(peft.PeftModel.from_pretrained(base, report.adapter, low_cpu_mem_usage=True), rows) < before - 0.1


def test_a_new_domain_stands_on_the_next_free_band(
    trained: TrainReport, small: Path, small_bank: Bank, legal: Path, device: str, tmp_path: Path
) -> None:
    code = write_jsonl(
        tmp_path / "code.jsonl", [Path(module.__file__).read_text()[:600] for module in (json, peft, svdbank, torch) * 3]
    )
    options = {"on_top_of": trained.adapter, "held_out": 0.4, "held_out_blocks": 6, "steps": 6, "save_steps": 2}
    report = train(small, tmp_path / "code", code, **options)
    assert report.held_out is not None and report.held_out.after < report.held_out.before
    new = read_folder(report.adapter)
    assert new.cache is not None and new.cache.band == (4, 8)
    for module, pair in new.factors.items():
        assert torch.equal(pair.B, small_bank[f"{module}.weight"].left(8)[:, :4])
    beneath = read_folder(trained.adapter)
    crossed = [new.factors[m].B.double().T @ pair.B.double() for m, pair in beneath.factors.items()]
    assert max(float(product.abs().max()) for product in crossed) < 1e-6  # float32 columns of one orthonormal matrix

    # Beneath it the first adapter acted: together on the base they have the loss of the report's "before" and "after".
    chosen = [
        {"adapter": [trained.adapter], "loss": report.held_out.before},
        {"adapter": [trained.adapter, report.adapter], "loss": report.held_out.after},
    ]
    windows = held_out(small, code, held_out=0.4, held_out_blocks=6)
    for case in chosen:
        model = load(small)
        for i, folder in enumerate(case["adapter"]):
            model = svdbank.peft.load_adapter(model, folder, adapter_name=f"a{i}", is_trainable=False)
        model.base_model.set_adapter([f"a{i}" for i in range(len(case["adapter"]))], inference_mode=True)
        assert loss(model, windows) == pytest.approx(case["loss"], abs=1e-4)  # sums in another order

    # It goes on like any other: only the new adapter is in a checkpoint, and only it trains.
    class StoppedError(Exception):
        pass

    def stop(progress: Progress) -> None:
        if progress.stage == "training" and progress.done == 5:
            raise StoppedError

    with pytest.raises(StoppedError):
        svdbank.train(small, output=tmp_path / "again", data=str(code), progress=stop, **{**RECIPE, **options})
    again = train(small, tmp_path / "again", code, **options)
    assert again.resumed_from == 4
    if device == "cpu":  # where it is promised
        assert (tmp_path / "again/adapter_model.safetensors").read_bytes() == (
            tmp_path / "code/adapter_model.safetensors"
        ).read_bytes()
    with pytest.raises(OptionError, match="stand on the same directions"):
        train(small, tmp_path / "third", code, on_top_of=(trained.adapter, trained.adapter))
    with pytest.raises(SvdbankError, match=r"the next free band is 8:40.*holds 32"):
        train(small, tmp_path / "third", code, on_top_of=(trained.adapter, report.adapter), rank=32)


@pytest.mark.usefixtures("device")
def test_forgetting_is_measured_on_other_text(small: Path, small_bank: Bank, legal: Path, tmp_path: Path) -> None:
    other = write_jsonl(tmp_path / "other.jsonl", ["To be, or not to be, that is the question: " * 20])
    report = train(
        small, tmp_path / "adapter", legal, retain=other, steps=3, accumulation=2, gradient_checkpointing=True, dtype="bfloat16"
    )
    assert [change.text for change in report.retained] == [str(other)]
    assert report.retained[0].before != report.retained[0].after and report.dtype == "bfloat16"
    assert report.tokens == 3 * 2 * 2 * 32


@pytest.mark.usefixtures("device")
def test_streamed_text_trains(small: Path, small_bank: Bank, legal: Path, tmp_path: Path) -> None:
    report = train(small, tmp_path / "adapter", legal, streaming=True, steps=4)
    assert report.steps == 4 and report.held_out is not None and report.held_out.after < report.held_out.before
    with pytest.raises(OptionError, match="the number of steps has to be said"):
        train(small, tmp_path / "other", legal, streaming=True, steps=None)


@pytest.mark.usefixtures("device")
def test_a_run_of_one_step_makes_one_and_counts_the_tokens_that_it_saw(
    small: Path, small_bank: Bank, legal: Path, tmp_path: Path
) -> None:
    """Its warm-up would have been that step, at a rate of 0; and a step asked to be larger than the text sees all of it once."""
    report = train(small, tmp_path / "adapter", legal, steps=None, epochs=1e-9, accumulation=1000, keep="last", held_out=0.9)
    assert report.steps == 1 and 0 < report.blocks < 2000 and report.tokens == report.blocks * 32
    assert report.held_out is not None and report.held_out.change != 0


@pytest.mark.usefixtures("device")
def test_an_epoch_is_every_block_once(small: Path, small_bank: Bank, legal: Path, tmp_path: Path) -> None:
    report = train(small, tmp_path / "adapter", legal, steps=None, epochs=0.5, held_out=0, batch_size=8)
    assert report.held_out is None
    # Half of the batches that an epoch has, the last of which may be smaller, rounded up as the Trainer does.
    assert report.steps == math.ceil(math.ceil(report.blocks / 8) / 2)


def refuse_loading(progress: Progress) -> None:
    assert progress.stage != "loading the model", "an error that could have been said before any weight is read"


@pytest.mark.parametrize(
    ("options", "says", "hint"),
    [
        ({"length": 9000}, "longer than the 8192 positions", "--length 8192"),
        ({"length": 4096}, "too little text for one block of 4096 tokens", "--length"),
        ({"rank": 33}, "33", "--rank"),
        ({"rank": 200}, "200", None),
        ({"targets": "no_such_proj"}, "no_such_proj", None),
        ({"method": "lora", "targets": "no_such_proj"}, "no_such_proj", None),
        ({"method": "milora", "targets": "no_such_proj"}, "no_such_proj", "--targets"),
        ({"targets": ["q_proj", "no_such_proj"]}, "'no_such_proj' matches no module", "--targets"),
        ({"targets": r".*\.no_such_proj"}, "matches no module", "--targets"),
        ({"method": "lora", "targets": "self_attn"}, "no module that can have an adapter", "--targets"),
        ({"targets": ["all-linear", "lm_head"]}, "stands beside other targets", "--targets"),
        ({"data": "nowhere.txt"}, "nowhere.txt: no such file", None),
        ({"field": "body"}, "no column 'body'", "--field"),
        ({"schedule": "sinus"}, "no schedule 'sinus'", "cosine"),
        ({"schedule": "reduce_lr_on_plateau"}, "needs settings of its own", "cosine"),
        ({"schedule": "cosine_with_min_lr"}, "needs settings of its own", "cosine"),
        ({"seed": -1}, "seed is at least 0", None),
        ({"seed": 2**32}, "seed is at least 0", None),
        ({"steps": 0}, "steps is 1 or more", None),
        ({"dropout": 1.0}, "dropout is at least 0 and below 1", None),
        ({"rank": "four"}, "rank", None),
        ({"ranks": 4}, "did you mean 'rank'", None),
        ({"method": "adalora"}, "one of mica, milora, pissa, lora", None),
        ({"on_top_of": "nowhere", "method": "milora"}, "band of the bank of its own", "--method mica"),
        ({"on_top_of": "nowhere"}, "nowhere", None),
        ({"bank": "nowhere"}, "nowhere", None),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_said_before_any_work(
    small: Path, small_bank: Bank, legal: Path, tmp_path: Path, options: dict[str, Any], says: str, hint: str | None
) -> None:
    wanted = {**RECIPE, "data": str(legal), **options}
    with pytest.raises(SvdbankError, match=says) as caught:
        svdbank.train(small, output=tmp_path / "adapter", progress=refuse_loading, **wanted)
    assert hint is None or hint in (caught.value.hint or "")
    assert not (tmp_path / "adapter").exists() and not (tmp_path / "adapter.checkpoints").exists()


def test_an_output_in_use_a_missing_bank_and_a_missing_tokenizer_are_said_first(
    small: Path, legal: Path, minilm: Path, tmp_path: Path
) -> None:
    used = tmp_path / "used"
    used.mkdir()
    (used / "thesis.txt").write_text("mine")
    for force in (False, True):
        with pytest.raises(OptionError, match="not empty"):
            train(small, used, legal, force=force)
    strange = tmp_path / "strange"
    strange.mkdir()
    for name in ("config.json", "model.safetensors"):
        (strange / name).write_bytes((small / name).read_bytes())
    with pytest.raises(CheckpointError, match="tokenizer cannot be loaded"):
        train(strange, tmp_path / "adapter", legal)
    for file in small.glob("tokenizer*"):
        (strange / file.name).write_bytes(file.read_bytes())
    with pytest.raises(BankNotFoundError) as caught:
        train(strange, tmp_path / "adapter", legal)
    assert "svdbank build" in caught.value.hint and "--build" in caught.value.hint
    with pytest.raises(OptionError, match="does not predict next tokens"):
        train(minilm, tmp_path / "adapter", legal)


def test_a_run_refused_before_its_first_checkpoint_leaves_nothing(small: Path, legal: Path, tmp_path: Path) -> None:
    torn = Path(shutil.copytree(small, tmp_path / "torn"))
    tensors = load_file(torn / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, torn / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        train(torn, tmp_path / "adapter", legal, method="lora")
    assert list(tmp_path.iterdir()) == [torn]


def test_memory_that_runs_out_says_what_to_lower(small: Path, small_bank: Bank, legal: Path, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)

    def limit(progress: Progress) -> None:
        # From the first measurement on, half a gigabyte more than now; the batch's activations and logits alone take more.
        if progress.stage == "loss before" and progress.done == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 500_000_000, hard))

    try:
        with pytest.raises(OutOfMemoryError, match="out of memory") as caught:
            svdbank.train(
                small,
                output=tmp_path / "a",
                data=str(legal),
                progress=limit,
                **RECIPE | {"batch_size": 64, "length": 512, "epochs": 9},
            )
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert caught.value.hint is not None
    for lower in ("--batch-size", "--length", "--gradient-checkpointing", "--load-in 4bit"):
        assert lower in caught.value.hint


def test_options_survive_a_toml_file(tmp_path: Path) -> None:
    options = resolve(
        {},
        {
            "model": 'a "b" \\ c\n\x7f é',
            "output": "o",
            "data": ["x", "y=z"],
            "learning_rate": 1e-05,
            "streaming": True,
            "steps": 3,
        },
    )
    (tmp_path / "t.toml").write_bytes(to_toml(options))
    assert resolve(read_config(tmp_path / "t.toml"), {}) == options
    assert resolve(read_config(tmp_path / "t.toml"), {"learning_rate": 0.5, "data": "w"}).data == ("w",)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("learning_rat = 1", "did you mean 'learning_rate'"),
        ("[recipe]\nrank = 1", "no option 'recipe'"),
        ("rank = ", "not a TOML file"),
    ],
)
def test_a_config_with_a_mistake_is_refused(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "t.toml").write_text(content)
    with pytest.raises(OptionError, match=says):
        svdbank.train("m", config=tmp_path / "t.toml", output=tmp_path / "o", data="d")


@pytest.mark.parametrize("method", ["mica", "milora", "lora"])
@pytest.mark.parametrize("target", ["q_proj", "self_attn.q_proj", r".*\.q_proj"])
def test_a_single_target_is_a_name_or_an_expression(small: Path, small_bank: Bank, method: str, target: str) -> None:
    from svdbank.training.attaching import attach

    given = {"model": str(small), "output": "o", "data": "d", "rank": 4, "alpha": 4.0, "method": method, "targets": target}
    model = attach(load(small), resolve({}, given), small_bank)
    layers = model.config.num_hidden_layers
    adapted = [name for name, _ in model.named_parameters() if ".lora_A." in name]
    assert len(adapted) == layers and all(".q_proj." in name for name in adapted)


def test_only_a_trains(small: Path, small_bank: Bank) -> None:
    from svdbank.training.attaching import attach, trainable_parameters

    model = attach(
        load(small), resolve({}, {"model": str(small), "output": "o", "data": "d", "rank": 4, "alpha": 4.0}), small_bank
    )
    assert all(".lora_A." in name for name in trainable(model))
    assert trainable_parameters(model) == sum(p.numel() for p in model.parameters() if p.requires_grad)
