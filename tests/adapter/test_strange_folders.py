"""Adapter folders and models as people have them: keys with wrappers' names, folders one too high, files that say nothing."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import svdbank
import svdbank.peft
from svdbank.adapter.settings import LoraSettings
from svdbank.adapter.targeting import untargeted
from svdbank.core.errors import CheckpointError, NotFiniteError, OptionError, SvdbankError, WrongBaseError
from tests.adapter.every import MODELS, TOKENS, off, write_base
from tests.adapter.settings import Case, cases, logits, save, small_llama, wrapped

KEYS: dict[str, Callable[[str], str]] = {
    "torch.compile": lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
    "torch.compile of all": lambda key: f"_orig_mod.{key}",
    "torch.compile of layers": lambda key: key.replace(".self_attn", "._orig_mod.self_attn"),
    "DDP": lambda key: f"module.{key}",
    "FSDP": lambda key: key.replace(".self_attn", "._fsdp_wrapped_module.self_attn"),
    "FSDP of all, checkpointed layers": lambda key: (
        "_fsdp_wrapped_module." + key.replace(".self", "._checkpoint_wrapped_module.self")
    ),
    "DDP around torch.compile": lambda key: f"module._orig_mod.{key}",
    "PEFT inside FSDP": lambda key: key.replace("base_model.model.", "base_model.model._fsdp_wrapped_module."),
    "no prefix": lambda key: key.removeprefix("base_model.model."),
    "an attribute of another module": lambda key: f"model.{key}",
    "Lightning around DeepSpeed": lambda key: f"_forward_module.model.{key}",
    "a value head around it": lambda key: f"pretrained_model.{key}",
    "twice": lambda key: f"base_model.model.{key}",
    "the adapter's name": lambda key: key.replace(".weight", ".default.weight"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base("untied", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def small(base: Path) -> svdbank.Bank:
    return svdbank.build(base, base.with_name("bank"), rank=8)


def rewritten(folder: Path, rename: Callable[[str], str]) -> None:
    """The same tensors under other keys."""
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({rename(key): value for key, value in tensors.items()}, folder / "adapter_model.safetensors")


@pytest.fixture
def plain(tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """A folder, and the logits of its model."""
    model = wrapped(Case(), small_llama(), 1, {})
    return save(Case(), model, tmp_path / "plain"), logits(model, TOKENS)


@pytest.mark.parametrize("wrapper", KEYS)
def test_what_wrappers_add_to_keys_is_taken_off(
    wrapper: str, base: Path, small: svdbank.Bank, plain: tuple[Path, torch.Tensor], tmp_path: Path, single_thread: None
) -> None:
    import peft
    import transformers

    folder, expected = plain
    svdbank.merge([folder, f"again={folder}"], output=tmp_path / "as-peft-writes", weights=[0.5, 0.25])
    rewritten(folder, KEYS[wrapper])
    for bank in (None, small):
        loaded = svdbank.peft.load_adapter(small_llama(), folder, bank=bank, is_trainable=False)
        assert off(logits(loaded.eval(), TOKENS), expected) < 1e-6
    svdbank.fuse(base, folder, tmp_path / "fused")
    svdbank.export(folder, to="lora", output=tmp_path / "lora")
    svdbank.stack([folder], scale={"plain": 1.0}, output=tmp_path / "stack")
    assert off(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "fused"), TOKENS), expected) < 1e-5
    for made in ("lora", "stack"):
        assert off(logits(peft.PeftModel.from_pretrained(small_llama(), tmp_path / made).eval(), TOKENS), expected) < 1e-5
    svdbank.merge([folder, f"again={folder}"], output=tmp_path / "merged", weights=[0.5, 0.25])
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("merged", "as-peft-writes")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert svdbank.compare([folder, tmp_path / "as-peft-writes"]).pairs[0].all.cosine == pytest.approx(1, abs=1e-6)
    report = svdbank.eval(base, data={"text": base / "text.txt"}, adapters={"it": folder}, dtype="float32")
    wanted = torch.nn.functional.cross_entropy(expected[0, :-1], TOKENS[0, 1:])
    assert abs(report.scores[1].loss - float(wanted)) < 1e-5


@pytest.mark.parametrize("what", ["self_attn", "layers.1.self_attn"])
def test_an_adapter_of_other_modules_acts_nowhere(
    what: str, base: Path, small: svdbank.Bank, plain: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    folder, _ = plain
    rewritten(folder, lambda key: key.replace(what, what.replace("self_", "")))
    first = r"layers\.[01]\.attn\.q_proj"
    for bank in (None, small):
        with pytest.raises(CheckpointError, match=first):
            svdbank.peft.load_adapter(small_llama(), folder, bank=bank)
    with pytest.raises(CheckpointError, match=first):
        svdbank.eval(base, data={"text": base / "text.txt"}, adapters={"it": folder})
    with pytest.raises(OptionError, match=first):
        svdbank.fuse(base, folder, tmp_path / "fused")


@pytest.mark.parametrize("key", ["base_model.model.encoder.weight", "unet.down.lora.up.weight", "lora_te_text_model_q.alpha"])
def test_a_file_of_other_keys_names_the_first_and_the_form_expected(
    key: str, base: Path, plain: tuple[Path, torch.Tensor]
) -> None:
    folder, _ = plain
    save_file({key: torch.ones(3, 3)}, folder / "adapter_model.safetensors")
    for read in (svdbank.read_adapter, lambda place: svdbank.peft.load_adapter(small_llama(), place)):
        with pytest.raises(CheckpointError, match=re.escape(key)) as caught:
            read(folder)
        assert "lora_A.weight" in str(caught.value)


CHECKPOINT_KEYS = {
    "torch.compile": lambda key: f"_orig_mod.{key}",
    "DDP": lambda key: f"module.{key}",
    "DDP around torch.compile": lambda key: f"module._orig_mod.{key}",
    "torch.compile of layers": lambda key: re.sub(r"layers\.(\d)", r"layers.\1._orig_mod", key),
    "FSDP, twice": lambda key: "_fsdp_wrapped_module." + key.replace(".self", "._fsdp_wrapped_module.self"),
}


@pytest.mark.parametrize("shards", ["one", "several"])
@pytest.mark.parametrize("wrapper", CHECKPOINT_KEYS)
def test_a_checkpoint_with_names_of_wrappers_is_refused_with_the_command_that_mends_it(
    wrapper: str, shards: str, plain: tuple[Path, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, expected = plain
    base = tmp_path / "base"
    small_llama().save_pretrained(base, max_shard_size="60KB" if shards == "several" else "1GB")
    for file in base.glob("*.safetensors"):
        save_file({CHECKPOINT_KEYS[wrapper](key): value for key, value in load_file(file).items()}, file, {"format": "pt"})
    for index in base.glob("*.index.json"):
        said = json.loads(index.read_text())
        said["weight_map"] = {CHECKPOINT_KEYS[wrapper](key): file for key, file in said["weight_map"].items()}
        index.write_text(json.dumps(said))
    verbs: list[Callable[[], object]] = [
        lambda: svdbank.plan(base),
        lambda: svdbank.build(base, tmp_path / "bank", rank=4),
        lambda: svdbank.fuse(base, folder, tmp_path / "fused"),
        lambda: svdbank.init(str(base), output=tmp_path / "init", rank=4),
    ]
    for verb in verbs:
        with pytest.raises(CheckpointError, match="Transformers does not find it") as caught:
            verb()
    if wrapper == "FSDP, twice":  # Transformers replaces once a name
        assert caught.value.hint is not None and "save_pretrained" in caught.value.hint
        return
    monkeypatch.chdir(tmp_path)
    exec(shlex.split(caught.value.hint or "")[2], {})
    svdbank.fuse("base-unwrapped", folder, tmp_path / "fused")
    import transformers

    assert off(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "fused"), TOKENS), expected) < 1e-5


def test_a_folder_one_too_high_is_told_where_the_adapter_is(plain: tuple[Path, torch.Tensor]) -> None:
    folder, _ = plain
    with pytest.raises(CheckpointError) as caught:
        svdbank.read_adapter(folder.parent)
    assert caught.value.hint == f"there is one in {folder}: name that folder"


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "embed_tokens", "lm_head"]])
def test_a_larger_vocabulary_says_what_to_do_and_that_works(targets: list[str], base: Path, tmp_path: Path) -> None:
    import transformers

    def resized() -> Any:
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_pretrained(base)
        model.resize_token_embeddings(100)
        return model.eval()

    case = Case({"target_modules": targets})
    model = wrapped(case, resized(), 1, {})
    expected = logits(model, TOKENS)
    folder = save(case, model, tmp_path / "adapter")
    with pytest.raises((OptionError, WrongBaseError), match="100") as caught:
        svdbank.fuse(base, folder, tmp_path / "no")
    assert caught.value.hint == "model.resize_token_embeddings(100), model.save_pretrained(FOLDER), and fuse into FOLDER"
    with pytest.raises(CheckpointError, match=r"trained on 100 tokens, .* has 96 rows") as refused:
        svdbank.peft.load_adapter(transformers.AutoModelForCausalLM.from_pretrained(base), folder)
    assert str(refused.value.hint).startswith("model.resize_token_embeddings(100)")
    resized().save_pretrained(tmp_path / "resized")
    svdbank.fuse(tmp_path / "resized", folder, tmp_path / "fused")
    assert off(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "fused"), TOKENS), expected) < 1e-5
    assert off(logits(svdbank.peft.load_adapter(resized(), folder, is_trainable=False), TOKENS), expected) < 1e-6
    svdbank.export(folder, to="lora", output=tmp_path / "exported")
    assert off(logits(svdbank.peft.load_adapter(resized(), tmp_path / "exported", is_trainable=False), TOKENS), expected) < 1e-6


def test_eval_and_train_end_where_a_loss_is_no_number_or_a_token_has_no_row(base: Path, tmp_path: Path) -> None:
    import transformers

    broken = write_base("untied", tmp_path / "broken")
    model = transformers.AutoModelForCausalLM.from_pretrained(broken)
    with torch.no_grad():
        model.model.norm.weight[:] = torch.inf
    model.save_pretrained(broken)
    with pytest.raises(NotFiniteError, match="the base is NaN"):
        svdbank.eval(broken, data={"text": base / "text.txt"})
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([f"x{i}" for i in range(8)])
    other = write_base("untied", tmp_path / "other")
    tokenizer.save_pretrained(other)
    with pytest.raises(CheckpointError, match="104 tokens, its embedding 96 rows"):
        svdbank.eval(other, data={"text": base / "text.txt"})
    short: dict[str, Any] = {"length": 4, "held_out": 0.0, "method": "lora", "rank": 2, "steps": 1}
    (tmp_path / "text.txt").write_text("w1 x7 w3 x5 w5 w6 w7 w8")
    with pytest.raises(CheckpointError, match="104 tokens, its embedding 96 rows"):
        svdbank.train(other, output=tmp_path / "out", data=str(tmp_path / "text.txt"), **short)
    with pytest.raises(SvdbankError, match="not a number"):
        svdbank.train(broken, output=tmp_path / "not", data=str(base / "text.txt"), **short)
    assert not (tmp_path / "out").exists()


def test_null_metadata_and_an_adapters_config_beside_a_model(plain: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    import transformers

    folder, expected = plain
    base = write_base("untied", tmp_path / "base")
    (base / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    data = (base / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8 : 8 + length]) | {"__metadata__": None}).encode()
    (base / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    svdbank.fuse(base, folder, tmp_path / "fused")
    assert not (tmp_path / "fused" / "adapter_config.json").exists()
    assert off(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "fused"), TOKENS), expected) < 1e-5


def test_an_adapter_of_a_convolution_is_refused_by_name_in_every_verb(base: Path, tmp_path: Path) -> None:
    import peft
    import transformers

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "image_size": 8}
    model = transformers.ViTModel(transformers.ViTConfig(**sizes, patch_size=4))
    config = peft.LoraConfig(r=2, target_modules=["projection"], init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "convolution")
    model.save_pretrained(tmp_path / "vit")
    folder, out, bank = tmp_path / "convolution", tmp_path / "out", svdbank.build(base, tmp_path / "bank", rank=4)
    text, short = base / "text.txt", {"length": 4, "held_out": 0.0}
    verbs: dict[str, Callable[[], object]] = {
        "fuse": lambda: svdbank.fuse(tmp_path / "vit", folder, out),
        "merge": lambda: svdbank.merge({"one": folder, "two": folder}, output=out),
        "stack": lambda: svdbank.stack({"one": folder, "two": folder}, output=out),
        "compare": lambda: svdbank.compare({"one": folder, "two": folder}),
        "export": lambda: svdbank.export(folder, to="lora", output=out),
        "export for inference": lambda: svdbank.export(folder, inference=True, output=out),
        "export slim": lambda: svdbank.export(folder, to="slim", output=out, bank=bank),
        "eval": lambda: svdbank.eval(base, data={"text": text}, adapters={"one": folder}),
        "train": lambda: svdbank.train(base, output=out, data=str(text), bank=str(bank.path), on_top_of=str(folder), **short),
        "load_adapter": lambda: svdbank.peft.load_adapter(model, folder),
        "init": lambda: svdbank.init(bank, output=out, beside=[folder]),
        "read_adapter": lambda: svdbank.read_adapter(folder),
    }
    for verb, call in verbs.items():
        with pytest.raises(CheckpointError) as caught:
            call()
        assert "embeddings.patch_embeddings.projection is a convolution" in str(caught.value), verb
    assert not out.exists()


def test_an_index_without_metadata_is_read(base: Path, plain: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    import transformers

    folder, expected = plain
    sharded = tmp_path / "sharded"
    transformers.AutoModelForCausalLM.from_pretrained(base).save_pretrained(sharded, max_shard_size="50KB")
    index = sharded / "model.safetensors.index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"metadata": None}))
    svdbank.fuse(sharded, folder, tmp_path / "fused")
    assert off(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "fused"), TOKENS), expected) < 1e-5
    assert len(svdbank.build(sharded, tmp_path / "bank", rank=2)) == 14


LEFT_OUT: dict[str, object] = {
    "target_modules": ["q_proj"],
    "target_modules ": r".*\.1\.self_attn\..*",
    "target_modules  ": [],
    "exclude_modules": ["v_proj"],
    "layers_to_transform": [0],
    "modules_to_save": ["self_attn"],
}


@pytest.mark.parametrize("field", LEFT_OUT)
def test_factors_that_the_config_leaves_out_are_refused_as_peft_would_not_load_them(
    field: str, plain: tuple[Path, torch.Tensor]
) -> None:
    folder, _ = plain
    config = json.loads((folder / "adapter_config.json").read_text()) | {field.strip(): LEFT_OUT[field]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"holds factors of model\.layers.*, which {field.strip()} of its"):
        svdbank.read_adapter(folder)


def test_the_rule_of_targets_is_pefts() -> None:
    import peft
    from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists

    modules = ["layers.1.q_proj", "model.layers.0.q_proj", "model.layers.1.q_proj", "model.layers.1.mlp.experts.0.q_proj"]
    modules += ["model.layers.1.my_q_proj", "q_proj", "lm_head", "h.1.q_proj", "model.layers.1.lm_head.q_proj"]
    configs: list[dict[str, Any]] = [
        {"target_modules": targets, **other}
        for targets in (["q_proj"], ["q_proj", "lm_head", "layers.1.q_proj"], r".*layers\.1\..*q_proj")
        for other in (
            {},
            {"exclude_modules": ["layers.1.q_proj"]},
            {"exclude_modules": r".*experts.*"},
            {"modules_to_save": ["lm_head"]},
        )
    ]
    configs += [{"target_modules": ["q_proj"], "layers_to_transform": layers} for layers in (0, [1], [0, 1], [])]
    configs += [
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": own} for own in ("h", ["layers"], [])
    ]
    for own in configs:
        config = peft.LoraConfig(**own)
        taken = {module: check_target_module_exists(config, module) for module in modules}
        out = {module for module, found in taken.items() if not found or isinstance(found, _ExcludedModule)}
        settings = LoraSettings(r=1, lora_alpha=1, **own)
        assert {module for module, _ in untargeted(settings, modules)} == out, own


def test_a_start_that_the_record_contradicts_is_refused(base: Path, plain: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    folder, _ = plain
    svdbank.stack({"one": folder, "two": folder}, output=tmp_path / "stack")
    config = json.loads((tmp_path / "stack" / "adapter_config.json").read_text()) | {"init_lora_weights": "olora"}
    (tmp_path / "stack" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="olora"):
        svdbank.fuse(base, tmp_path / "stack", tmp_path / "fused")


def test_a_module_that_one_adapter_replaces_and_another_changes_is_refused(base: Path, tmp_path: Path) -> None:
    for name, options in {
        "whole": {"modules_to_save": ["lm_head"]},
        "factors": {"target_modules": ["q_proj", "lm_head"]},
    }.items():
        save(Case(options), wrapped(Case(options), small_llama(), 1, {}), tmp_path / name)
    with pytest.raises(OptionError, match="is replaced whole"):
        svdbank.merge([tmp_path / "whole", tmp_path / "factors"], weights=[1, 0.5], output=tmp_path / "out")


CHANGING: dict[str, Case] = {
    "olora": Case({"init_lora_weights": "olora"}),
    "trained biases": Case({"bias": "all"}, model="biased"),
    "rows": cases()["beside the factors: rows set by the user"],
    "kasa": cases()["kasa_config: true"],
}


@pytest.mark.parametrize("name", CHANGING)
def test_eval_measures_the_base_and_other_adapters_on_the_base_as_it_is(name: str, tmp_path: Path) -> None:
    """Loading these adapters changes the base's own weights in memory."""
    case = CHANGING[name]
    base = write_base(case.model, tmp_path / "base")
    first, second = Case(model=case.model), case
    kinds = (
        {"plain": first, "changing": second} if name != "kasa" else {"changing": second}
    )  # PEFT has KaSA beside nothing else
    models = {own: wrapped(kind, MODELS[kind.model](), 1, {}) for own, kind in kinds.items()}
    folders = {own: save(kinds[own], model, tmp_path / own) for own, model in models.items()}
    for order in (list(folders), list(reversed(folders))):
        report = svdbank.eval(
            base, data={"text": base / "text.txt"}, adapters={own: folders[own] for own in order}, dtype="float32"
        )
        for score in report.scores:
            model = MODELS[case.model]() if score.adapter == "base" else models[score.adapter]
            tokens = TOKENS[:, : score.tokens + 1]
            wanted = torch.nn.functional.cross_entropy(logits(model, TOKENS)[0, : score.tokens], tokens[0, 1:])
            assert score.loss == pytest.approx(float(wanted), abs=1e-5), score.adapter  # of float32


def test_adapters_that_act_together_are_their_sum_in_any_order_or_refused(base: Path, tmp_path: Path) -> None:
    kinds = {"plain": Case(), "dora": Case({"use_dora": True}), "other": Case({"use_dora": True, "r": 2})}
    models = {name: wrapped(case, small_llama(), number, {}) for number, (name, case) in enumerate(kinds.items())}
    folders = {name: save(kinds[name], model, tmp_path / name) for name, model in models.items()}
    start = {name: value.double() for name, value in small_llama().state_dict().items()}
    total = dict(start)
    for name in ("plain", "dora"):
        merged = models[name].merge_and_unload().state_dict()
        total = {key: value + merged[key].double() - start[key] for key, value in total.items()}
    summed = small_llama()
    summed.load_state_dict(total)
    data = {"text": base / "text.txt"}
    for order in (["plain", "dora"], ["dora", "plain"]):
        stack = [folders[name] for name in order]
        score = next(
            own for own in svdbank.eval(base, data=data, adapters={"x": stack}, dtype="float32").scores if own.adapter == "x"
        )
        wanted = torch.nn.functional.cross_entropy(logits(summed, TOKENS)[0, : score.tokens], TOKENS[0, 1 : score.tokens + 1])
        assert score.loss == pytest.approx(float(wanted), abs=1e-5)
    with pytest.raises(OptionError, match="use_dora"):
        svdbank.eval(base, data=data, adapters={"x": [folders["dora"], folders["other"]]})


def test_replicated_layers_beside_anything_else_are_refused(
    base: Path, plain: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    case = cases()["layer_replication: two layers twice"]
    folder = save(case, wrapped(case, small_llama(), 1, {}), tmp_path / "replicated")
    with pytest.raises(OptionError, match="layer_replication"):
        svdbank.eval(base, data={"text": base / "text.txt"}, adapters={"x": folder})
    model = svdbank.peft.load_adapter(small_llama(), plain[0])
    with pytest.raises(CheckpointError, match="layer_replication"):
        svdbank.peft.load_adapter(model, folder, adapter_name="x")


def _pointer(folder: Path) -> None:
    """What git leaves where LFS is not installed."""
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "a" * 64 + "\nsize 1234\n"
    (folder / "adapter_model.safetensors").write_text(text)


def _configured(**fields: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return edit


def _codes(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({key: (100 * value).to(torch.int8) for key, value in tensors.items()}, folder / "adapter_model.safetensors")


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "a pointer of LFS": (_pointer, "Git LFS"),
    "whole numbers": (_codes, "int8"),
    "targets that leave factors out": (_configured(target_modules=["q_proj"]), r"v_proj.*target_modules"),
    "an expression that leaves factors out": (_configured(target_modules=r".*layers\.0.*proj"), r"layers\.1.*target_modules"),
    "excluded modules with factors": (_configured(exclude_modules=["v_proj"]), "exclude_modules"),
    "layers that are not transformed": (_configured(layers_to_transform=[0]), r"layers\.1.*layers_to_transform"),
    "whole modules that are not held": (_configured(modules_to_save=["lm_head"]), "modules_to_save"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_config_and_tensors_that_are_not_of_one_adapter_are_refused(
    kind: str, base: Path, plain: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    folder, _ = plain
    edit, said = REFUSED[kind]
    edit(folder)
    verbs: list[Callable[[], object]] = [
        lambda: svdbank.fuse(base, folder, tmp_path / "out"),
        lambda: svdbank.merge([folder, f"again={folder}"], output=tmp_path / "out"),
        lambda: svdbank.stack([folder], output=tmp_path / "out", scale={"plain": 0.5}),
        lambda: svdbank.compare([folder, f"again={folder}"]),
        lambda: svdbank.export(folder, to="lora", output=tmp_path / "out"),
    ]
    for verb in verbs:
        with pytest.raises(CheckpointError, match=said):
            verb()
    with pytest.raises(CheckpointError):  # PEFT takes fields for what they say; the tensors that are left over name it
        svdbank.peft.load_adapter(small_llama(), folder)


def test_factors_of_eight_bits_are_the_values_that_peft_loads(
    base: Path, plain: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    import peft
    import transformers

    folder, _ = plain
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({key: value.to(torch.float8_e4m3fn) for key, value in tensors.items()}, folder / "adapter_model.safetensors")
    expected = logits(peft.PeftModel.from_pretrained(small_llama(), folder).eval(), TOKENS)
    assert off(logits(svdbank.peft.load_adapter(small_llama(), folder, is_trainable=False).eval(), TOKENS), expected) < 1e-6
    svdbank.fuse(base, folder, tmp_path / "fused")
    assert off(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "fused"), TOKENS), expected) < 1e-5
    svdbank.merge([folder, f"again={folder}"], output=tmp_path / "merged")
    assert off(logits(peft.PeftModel.from_pretrained(small_llama(), tmp_path / "merged").eval(), TOKENS), expected) < 1e-5


def test_a_pointer_of_lfs_in_place_of_a_models_weights_is_said(tmp_path: Path) -> None:
    small_llama().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(CheckpointError, match="Git LFS") as caught:
        svdbank.plan(tmp_path / "base")
    assert "git lfs pull" in (caught.value.hint or "")


def test_links_a_second_format_and_other_adapters_beside_one_change_nothing(
    base: Path, plain: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    import transformers

    folder, expected = plain
    tensors = load_file(folder / "adapter_model.safetensors")
    torch.save({key: 2 * value for key, value in tensors.items()}, folder / "adapter_model.bin")  # PEFT prefers safetensors too
    (folder / "adapter_model.safetensors").rename(tmp_path / "blob")
    (folder / "adapter_model.safetensors").symlink_to(tmp_path / "blob")
    (folder / "other").mkdir()
    for name in ("adapter_config.json",):
        (folder / "other" / name).write_bytes((folder / name).read_bytes())
    save_file({key: 3 * value for key, value in tensors.items()}, folder / "other" / "adapter_model.safetensors")
    svdbank.fuse(base, folder, tmp_path / "fused")
    assert off(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "fused"), TOKENS), expected) < 1e-5
    assert off(logits(svdbank.peft.load_adapter(small_llama(), folder, is_trainable=False).eval(), TOKENS), expected) < 1e-6


@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["norm"]}], ids=["factors", "factors and a norm"])
@pytest.mark.parametrize("where", ["the model", "its layers"])
def test_an_adapter_loads_onto_a_model_that_torch_compile_wrapped(where: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model = wrapped(Case(settings), small_llama(), 1, {})
    folder, expected = save(Case(), model, tmp_path / "adapter"), logits(model, TOKENS)
    plain = small_llama()
    if where == "the model":
        compiled: Any = torch.compile(plain, backend="eager")
    else:
        compiled = plain
        for number, layer in enumerate(plain.model.layers):
            plain.model.layers[number] = torch.compile(layer, backend="eager")
    loaded = svdbank.peft.load_adapter(compiled, folder, is_trainable=False)
    assert off(logits(loaded.eval(), TOKENS), expected) < 1e-6
    loaded.save_pretrained(tmp_path / "again")
    again = svdbank.peft.load_adapter(small_llama(), tmp_path / "again", is_trainable=False)
    assert off(logits(again.eval(), TOKENS), expected) < 1e-6


def test_what_lies_in_place_of_the_tensors_is_named(plain: tuple[Path, torch.Tensor]) -> None:
    folder, _ = plain
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model-00001-of-00002.safetensors")
    (folder / "pytorch_model_fsdp_0").mkdir()
    with pytest.raises(CheckpointError, match=r"adapter_model-00001-of-00002\.safetensors, pytorch_model_fsdp_0"):
        svdbank.read_adapter(folder)


def test_a_folder_that_lacks_part_of_a_module_that_was_saved_whole_is_refused(base: Path, tmp_path: Path) -> None:
    case = Case({"modules_to_save": ["mlp"]})
    folder = save(case, wrapped(case, small_llama(), 1, {}), tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    del tensors["base_model.model.model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        OptionError, match=r"modules_to_save mlp, and model\.layers\.1\.mlp\.up_proj\.weight is not in its folder"
    ):
        svdbank.fuse(base, folder, tmp_path / "fused")


def test_fuse_says_where_the_adapter_names_another_base(base: Path, plain: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    folder, _ = plain
    path = folder / "adapter_config.json"
    for number, (named, said) in enumerate(
        {"somebody/model": True, f"somebody/{base.name.upper()}": False, None: False}.items()
    ):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": named}))
        report = svdbank.fuse(base, folder, tmp_path / f"fused{number}")
        assert any("names somebody/model as its base" in note for note in report.notes) == said
