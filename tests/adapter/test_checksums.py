"""What svdbank wrote and is not as it was is damage; what PEFT wrote, also over it, is read and called unchecked."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import svdbank
from svdbank.adapter.settings import CACHE, COEFFICIENTS, COMPONENTS, CONFIG, FILES, SLIM, WEIGHTS
from svdbank.adapter.writing import write_adapter
from svdbank.bank.reading import Bank
from svdbank.core.errors import CheckpointError, DamageError, SvdbankError
from svdbank_cli.main import run


def _changed_tensor(path: Path) -> None:
    """A valid safetensors file with one bit of its data changed."""
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _exchange(path: Path) -> None:
    """Another file of the same kind that svdbank wrote: here that of the adapter ``other`` beside."""
    shutil.copyfile(path.parent.parent / "other" / path.name, path)


def _mark(path: Path) -> None:
    """A byte of the mark itself."""
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"svdbank"', b'"svdbanj"', 1))


HARMS: dict[str, Callable[[Path], object]] = {
    "flipped": _changed_tensor,
    "cut": _cut,
    "empty": lambda path: path.write_bytes(b""),
    "exchanged": _exchange,
    "lost": Path.unlink,
    "its mark": _mark,
}


@pytest.fixture
def stack(trained: Callable[..., Path], tmp_path: Path) -> Path:
    """A stack that svdbank wrote, with another beside it."""
    law, med = trained("law", 1), trained("med", 2)
    svdbank.stack([law, med], output=tmp_path / "stack")
    svdbank.stack([law, med], output=tmp_path / "other", scale={"law": 0.5})
    return tmp_path / "stack"


def uses(folder: Path, tmp_path: Path, minilm: Path) -> dict[str, Callable[[], object]]:
    """Every verb that reads an adapter."""
    return {
        "merge": lambda: svdbank.merge([folder, tmp_path / "law"], output=tmp_path / "merged"),
        "stack": lambda: svdbank.stack([folder], output=tmp_path / "scaled", scale={"law": 0.5}),
        "compare": lambda: svdbank.compare([folder]),
        "fuse": lambda: svdbank.fuse(minilm, folder, tmp_path / "fused"),
        "export": lambda: svdbank.export(folder, to="lora", output=tmp_path / "lora"),
        "read_adapter": lambda: svdbank.read_adapter(folder),
    }


@pytest.mark.parametrize("name", [WEIGHTS, COMPONENTS])
@pytest.mark.parametrize("harm", HARMS)
def test_a_harmed_tensor_file_stops_every_verb(harm: str, name: str, stack: Path, tmp_path: Path, minilm: Path) -> None:
    HARMS[harm](stack / name)
    for verb, use in uses(stack, tmp_path, minilm).items():
        with pytest.raises(SvdbankError, match=name) as caught:
            use()
        # A file that is not there has always been an error of its own.
        assert isinstance(caught.value, DamageError) or (harm, name) == ("lost", WEIGHTS), verb
    assert not any((tmp_path / made).exists() for made in ("merged", "scaled", "fused", "lora"))
    assert run(["compare", str(stack)]) == (1 if (harm, name) == ("lost", WEIGHTS) else 4)


@pytest.mark.parametrize("change", [{"lora_alpha": 16}, {"use_rslora": True}, {"alpha_pattern": {"query": 2}}])
def test_a_config_that_gives_the_tensors_another_meaning_is_damage(change: dict[str, object], stack: Path) -> None:
    config = json.loads((stack / CONFIG).read_bytes())
    (stack / CONFIG).write_text(json.dumps(config | change))
    with pytest.raises(DamageError, match="not those that were written"):
        svdbank.read_adapter(stack)


def test_a_config_with_another_name_of_the_base_is_none(stack: Path) -> None:
    config = json.loads((stack / CONFIG).read_bytes())
    (stack / CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": "org/elsewhere", "inference_mode": False}))
    assert svdbank.read_adapter(stack).notes == ()


def test_every_flipped_byte_of_the_record_is_found(stack: Path) -> None:
    original = (stack / CACHE).read_bytes()
    read = svdbank.read_adapter(stack)
    for place in range(0, len(original), 13):
        data = bytearray(original)
        data[place] ^= 1
        (stack / CACHE).write_bytes(data)
        try:
            assert svdbank.read_adapter(stack).names == read.names, place  # a space between two fields
        except SvdbankError:
            continue


def test_what_peft_saves_over_it_is_no_damage(minilm: Path, pair_bank: Bank, tmp_path: Path) -> None:
    """The whole way: init, PEFT loads and trains, PEFT saves into the same folder, beside a record that now speaks of other bytes."""
    import transformers

    svdbank.init(pair_bank, output=tmp_path / "law", rank=2)
    assert svdbank.read_adapter(tmp_path / "law").notes == ()
    model = peft.PeftModel.from_pretrained(
        transformers.AutoModel.from_pretrained(minilm), tmp_path / "law", is_trainable=True, low_cpu_mem_usage=True
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter += 0.01
    model.save_pretrained(str(tmp_path / "law"))
    assert (tmp_path / "law" / CACHE).is_file()
    for bank in (None, pair_bank):
        (note,) = svdbank.read_adapter(tmp_path / "law", bank=bank).notes
        assert "unchecked" in note and "by another program" in note
    # And as anybody's file, its losses show only where they do not fit.
    save_file({"x": torch.zeros(1)}, tmp_path / "law" / WEIGHTS)
    with pytest.raises(CheckpointError, match="no LoRA factors"):
        svdbank.read_adapter(tmp_path / "law")


def test_a_folder_that_peft_alone_wrote_is_called_unchecked(minilm: Path, tmp_path: Path) -> None:
    import transformers

    model = peft.get_peft_model(transformers.AutoModel.from_pretrained(minilm), peft.LoraConfig(r=2, target_modules=["query"]))
    model.save_pretrained(str(tmp_path / "plain"))
    (note,) = svdbank.read_adapter(tmp_path / "plain").notes
    assert "no sha256" in note


def test_the_same_adapter_is_the_same_bytes_and_peft_reads_the_marked_file(stack: Path, tmp_path: Path) -> None:
    for copy in ("one", "two"):
        write_adapter(svdbank.read_adapter(stack), tmp_path / copy)
    assert (tmp_path / "one" / WEIGHTS).read_bytes() == (tmp_path / "two" / WEIGHTS).read_bytes()
    assert load_file(tmp_path / "one" / WEIGHTS).keys() == load_file(stack / WEIGHTS).keys()
    length = int.from_bytes((stack / WEIGHTS).read_bytes()[:8], "little")
    assert length % 8 == 0


@pytest.mark.parametrize("harm", ["flipped", "cut", "empty", "exchanged", "lost", "a pipe"])
@pytest.mark.parametrize("name", [COEFFICIENTS, f"{FILES}/{COMPONENTS}", f"{FILES}/{CACHE}", f"{FILES}/{CONFIG}", SLIM])
def test_a_harmed_slim_folder_does_not_come_back(
    name: str, harm: str, trained: Callable[..., Path], pair_bank: Bank, tmp_path: Path
) -> None:
    svdbank.stack([trained("law", 1), trained("med", 2)], output=tmp_path / "stack", bank=pair_bank)
    svdbank.stack([tmp_path / "law", trained("verse", 3, rank=6)], output=tmp_path / "twice", bank=pair_bank)
    for source, slim in (("stack", "slim"), ("twice", "other")):
        svdbank.export(tmp_path / source, to="slim", output=tmp_path / slim, bank=pair_bank)
    path = tmp_path / "slim" / name
    if harm == "exchanged":
        shutil.copyfile(tmp_path / "other" / name, path)
    elif harm == "a pipe":
        path.unlink()
        os.mkfifo(path)
    else:
        HARMS[harm](path)
    with pytest.raises(SvdbankError):
        svdbank.export(tmp_path / "slim", output=tmp_path / "back", bank=pair_bank)
    assert not (tmp_path / "back").exists()
