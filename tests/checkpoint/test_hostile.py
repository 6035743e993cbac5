"""Every attack file is refused for its own reason, before anything is allocated from what it says; the ordinary cache works."""

from __future__ import annotations

import json
import math
import os
import pickle
import shlex
import shutil
import stat
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import deserialize
from safetensors.torch import save

import svdbank
from svdbank.checkpoint import decomposable, open_checkpoint
from svdbank.core.errors import BankNotFoundError, CheckpointError, OptionError, SvdbankError
from tests.checkpoint.attacks import FILE_NAMES, FOLDERS, HEADERS, Loaded, entry, raw, tensors_file

WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3)}


def tree(*roots: Path) -> dict[Path, tuple[int, int, bytes]]:
    """Every file and folder below, with its type, time of change and bytes."""
    found = {}
    for path in sorted(path for root in roots for path in root.rglob("*")):
        status = path.lstat()
        found[path] = (status.st_mode, status.st_mtime_ns, path.read_bytes() if stat.S_ISREG(status.st_mode) else b"")
    return found


def refused(model: Path, reason: str) -> SvdbankError:
    """The error of a build of ``model``: for ``reason``, and without a trace beside it or in the bank cache."""
    roots = (model.parent, Path(os.environ["SVDBANK_HOME"]))
    before = tree(*roots)
    with pytest.raises(SvdbankError, match=reason) as caught:
        svdbank.build(model)
    with pytest.raises(SvdbankError, match=reason):
        svdbank.build(model, model.parent / "bank")
    assert tree(*roots) == before
    return caught.value


@pytest.mark.parametrize("attack", HEADERS)
def test_a_lying_header_is_refused_with_its_reason_and_nothing_is_written(tmp_path: Path, attack: str) -> None:
    data, reason = HEADERS[attack]
    path = tmp_path / "model" / "model.safetensors"
    path.parent.mkdir()
    path.write_bytes(data)
    assert str(path) in str(refused(path.parent, reason))


@pytest.mark.parametrize("attack", FOLDERS)
def test_a_folder_whose_parts_do_not_fit_is_refused_with_its_reason_and_nothing_is_written(tmp_path: Path, attack: str) -> None:
    files, reason = FOLDERS[attack]
    folder = tmp_path / "model"
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    assert str(folder) in str(refused(folder, reason))


def test_a_claimed_terabyte_is_refused_without_allocating_it(tmp_path: Path) -> None:
    size = 2**40
    text = json.dumps({"a.weight": entry(0, size, [size // 4])}).encode()
    (tmp_path / "model.safetensors").write_bytes(raw(text, b"1234"))
    with pytest.raises(CheckpointError, match="beyond the end of the file"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "bomb", [b'{"a":[' + b"[]," * 33_000_000, b'{"a":[' + b"{}," * 33_000_000, b"{" + b'"":0,' * 19_000_000]
)
def test_a_header_of_100_mb_that_would_take_gigabytes_is_refused_before_it_is_parsed(tmp_path: Path, bomb: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(raw(bomb))
    with pytest.raises(CheckpointError, match="more than 5000000 lists, objects and values"):
        open_checkpoint(tmp_path)


def test_what_the_reference_writer_accepts_is_accepted(tmp_path: Path) -> None:
    tensors = {
        "scalar": torch.tensor(1.0),
        "empty.weight": torch.zeros(0, 5),
        "bits": torch.zeros(3, dtype=torch.bool),
        "half.weight": torch.ones(2, 2).half(),
        "odd": torch.ones(3, dtype=torch.uint8),
        "complex": torch.ones(2, dtype=torch.complex64),
    }
    with open_checkpoint(tensors_file(tmp_path / "x.safetensors", tensors)) as checkpoint:
        assert {name: source.shape for name, source in checkpoint.tensors.items()} == {
            n: tuple(t.shape) for n, t in tensors.items()
        }


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_is_changed_in_a_file_is_refused_or_means_what_the_reference_reader_says(
    tmp_path: Path, data: st.DataObject
) -> None:
    honest = save({"a.weight": torch.ones(2, 3), "b.weight": torch.ones(4).half(), "c": torch.zeros(0)}, {"format": "pt"})
    changed = bytearray(honest)
    for _ in range(data.draw(st.integers(1, 3))):
        where = data.draw(st.integers(0, len(changed) - 1))
        changed[where : where + data.draw(st.integers(0, 2))] = data.draw(
            st.sampled_from([b"", b"0", b"1", b"9", b"-", b",", b'"', b"}", b"\xff", b"a", b"F16", b" "])
        )
    path = tmp_path / "model.safetensors"
    path.write_bytes(changed)
    try:
        with open_checkpoint(path) as checkpoint:
            seen = {name: (source.shape, source.begin, source.end) for name, source in checkpoint.tensors.items()}
    except CheckpointError:
        return
    base = 8 + int.from_bytes(changed[:8], "little")
    reference = deserialize(bytes(changed))
    assert {name: (shape, bytes(changed[begin:end])) for name, (shape, begin, end) in seen.items()} == {
        name: (tuple(tensor["shape"]), bytes(tensor["data"])) for name, tensor in reference
    }
    assert all(base <= begin <= end <= len(changed) for _, begin, end in seen.values())


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_name_is_not_this_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    tensors_file(tmp_path / "model.safetensors", WEIGHTS)
    monkeypatch.chdir(tmp_path)
    open_checkpoint(".").close()
    with pytest.raises(OptionError, match="empty") as caught:
        open_checkpoint(name)
    assert caught.value.hint


def test_a_path_too_long_to_exist_is_an_ordinary_error() -> None:
    with pytest.raises(CheckpointError, match="cannot be looked at"):
        open_checkpoint("a" * 5000)


def indexed(folder: Path, weight_map: object, shards: dict[str, dict[str, torch.Tensor]]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, tensors in shards.items():
        tensors_file(folder / name, tensors)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("name", FILE_NAMES)
def test_an_index_that_leads_out_of_its_folder_is_refused_as_text(tmp_path: Path, name: str) -> None:
    folder = indexed(tmp_path / "model", {"a.weight": name}, {})
    tensors_file(tmp_path / "model.safetensors", WEIGHTS)
    with pytest.raises(CheckpointError, match="only a bare"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("weight_map", "reason"),
    [
        ({}, "missing or empty"),
        ([], "missing or empty"),
        (None, "missing or empty"),
        ({"a.weight": 1}, "not a string"),
        ({"a.weight": "1.safetensors"}, "holds the tensor 'b.weight', which the index says lies nowhere"),
        (
            {"a.weight": "1.safetensors", "b.weight": "2.safetensors"},
            "holds the tensor 'b.weight', which the index says lies in 2",
        ),
        ({"a.weight": "1.safetensors", "b.weight": "1.safetensors", "c.weight": "1.safetensors"}, "the index names 'c.weight'"),
        ({"a.weight": "1.safetensors", "b.weight": "1.safetensors", "c": "3.safetensors"}, "there is no such file"),
        ({"a\x1b.weight": "1.safetensors"}, "control characters"),
    ],
)
def test_index_and_headers_must_agree(tmp_path: Path, weight_map: object, reason: str) -> None:
    shards = {"1.safetensors": {"a.weight": torch.ones(2), "b.weight": torch.ones(2)}, "2.safetensors": {"d": torch.ones(1)}}
    with pytest.raises(CheckpointError, match=reason) as caught:
        open_checkpoint(indexed(tmp_path / "model", weight_map, shards))
    assert caught.value.hint or reason in ("missing or empty", "not a string", "control characters")


def test_a_tensor_named_twice_in_an_index_is_refused(tmp_path: Path) -> None:
    tensors_file(tmp_path / "1.safetensors", WEIGHTS)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a.weight": "1.safetensors", "a.weight": "../2.safetensors"}}')
    with pytest.raises(CheckpointError, match="appears twice"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("target", ["outside", "sibling", "broken", "loop"])
def test_a_link_in_an_ordinary_folder_is_not_followed(tmp_path: Path, name: str, target: str) -> None:
    folder = tmp_path / "model"
    tensors_file(folder / "model.safetensors", WEIGHTS)
    (folder / "config.json").write_text("{}")
    moved = {"outside": tmp_path / "other", "sibling": folder / "other", "broken": tmp_path / "none", "loop": folder / name}[
        target
    ]
    if target in ("outside", "sibling"):
        shutil.move(folder / name, moved)
    else:
        (folder / name).unlink()
    (folder / name).symlink_to(moved)
    with pytest.raises(CheckpointError, match=r"only the Hugging Face cache's links|cannot be followed"):
        open_checkpoint(folder)


def cache_entry(root: Path, links: dict[str, str]) -> Path:
    """A snapshot of the Hugging Face cache: ``links`` maps file names to what they point at, from the snapshot."""
    snapshot = root / "models--org--name" / "snapshots" / ("c" * 40)
    snapshot.mkdir(parents=True)
    blobs = root / "models--org--name" / "blobs"
    blobs.mkdir()
    tensors_file(blobs / "w", WEIGHTS)
    (blobs / "c").write_text('{"model_type": "llama"}')
    for name, target in links.items():
        (snapshot / name).symlink_to(target)
    return snapshot


def test_the_ordinary_cache_made_of_links_works_and_gives_the_hubs_file_id(tmp_path: Path) -> None:
    snapshot = cache_entry(tmp_path, {"model.safetensors": "../../blobs/w", "config.json": "../../blobs/c"})
    with open_checkpoint(snapshot) as checkpoint:
        assert checkpoint.config == {"model_type": "llama"}
        assert [file.identity for file in checkpoint.files] == ["w"]
    (tmp_path / "link").symlink_to(snapshot)
    with open_checkpoint(tmp_path / "link") as checkpoint:
        assert list(checkpoint.tensors) == ["a.weight"]


@pytest.mark.parametrize(
    "target", ["../../../secret", "../../blobs/../../secret", "../../blobs/sub/w", "/etc/hostname", "../../blobs/chained"]
)
def test_a_cache_link_out_of_its_own_blobs_is_refused(tmp_path: Path, target: str) -> None:
    snapshot = cache_entry(tmp_path, {"model.safetensors": target})
    blobs = tmp_path / "models--org--name" / "blobs"
    tensors_file(tmp_path / "secret", WEIGHTS)
    tensors_file(blobs / "sub" / "w", WEIGHTS)
    (blobs / "chained").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="only the Hugging Face cache's links"):
        open_checkpoint(snapshot)


def test_a_pipe_or_folder_in_place_of_a_weight_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="not a regular file"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="not a regular file"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        '{"model_type": 5}',
        '{"tie_word_embeddings": "yes"}',
        '{"vocab_size": true}',
        '{"architectures": [1]}',
    ],
)
def test_a_configuration_key_of_the_wrong_type_is_refused_by_name(tmp_path: Path, config: str) -> None:
    tensors_file(tmp_path / "model.safetensors", WEIGHTS)
    (tmp_path / "config.json").write_text(config)
    key = next(iter(json.loads(config)))
    with open_checkpoint(tmp_path) as checkpoint, pytest.raises(CheckpointError, match=key) as caught:
        decomposable(checkpoint)
    assert caught.value.hint


def test_a_pickle_is_never_loaded(tmp_path: Path) -> None:
    """Beside safetensors it is not looked at, alone it is refused; loaded, it would make a folder."""
    mark = tmp_path / "ran"
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("pytorch_model.bin", "training_args.bin", "model.pt", "optimizer.pth", "a.ckpt", "a.pkl"):
        (folder / name).write_bytes(pickle.dumps(Loaded(mark)))
    refused(folder, "can run code")
    (folder / "model.safetensors").write_bytes(pickle.dumps(Loaded(mark)))
    refused(folder, "the format allows")
    tensors_file(folder / "model.safetensors", WEIGHTS)
    svdbank.build(folder, tmp_path / "bank")
    assert not mark.exists()
    pickle.loads((folder / "a.pkl").read_bytes())
    assert mark.exists()


@pytest.mark.parametrize("name", ["config.json", "README.md"])
def test_a_pipe_in_place_of_a_small_file_hangs_nobody(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    tensors_file(folder / "model.safetensors", WEIGHTS)
    os.mkfifo(folder / name)
    if name == "config.json":
        refused(folder, "not a regular file")
    else:
        open_checkpoint(folder).close()


def test_a_model_card_that_is_a_link_out_is_not_read(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tensors_file(folder / "model.safetensors", WEIGHTS)
    (folder / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    (tmp_path / "secret").write_text("---\nbase_model: Org/Secret\n---\n")
    (folder / "README.md").symlink_to(tmp_path / "secret")
    assert "Secret" not in str(refused(folder, "GPTQ").hint)
    (folder / "README.md").unlink()
    (tmp_path / "secret").rename(folder / "README.md")
    assert "Org/Secret" in str(refused(folder, "GPTQ").hint)


@pytest.mark.parametrize(
    ("place", "value"), [("scale", torch.nan), ("scale", torch.inf), ("code", torch.nan), ("value", torch.inf)]
)
def test_what_is_not_finite_is_named_and_no_bank_is_published(tmp_path: Path, place: str, value: float) -> None:
    """Only reading shows it. Finite scales and codes can still overflow the type of the values."""
    codes, scales = torch.ones(200, 300).to(torch.float8_e4m3fn), torch.ones(2, 3)
    if place == "scale":
        scales[1, 2] = value
    elif place == "code":
        codes[150, 299] = torch.nan
    else:
        scales[1, 2] = 3e38
        codes[150, 299] = 448.0
    folder = tmp_path / "model"
    tensors_file(folder / "model.safetensors", {"a.weight": codes, "a.weight_scale_inv": scales})
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(SvdbankError, match="'a.weight_scale_inv' of 'a.weight'" if place == "scale" else "a.weight in"):
        svdbank.build(folder, tmp_path / "bank")
    assert not (tmp_path / "bank" / "manifest.json").exists()
    with pytest.raises(BankNotFoundError):
        svdbank.open(tmp_path / "bank")


def test_only_pickles_are_refused_with_a_command_that_converts_them(
    tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file

    folder = tmp_path / "pickled"
    folder.mkdir()
    shutil.copy(models["llama-tied"] / "config.json", folder)
    torch.save(load_file(models["llama-tied"] / "model.safetensors"), folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="can run code") as caught:
        open_checkpoint(folder)
    assert caught.value.hint
    python, option, program = shlex.split(caught.value.hint.partition(": ")[2])
    assert (python, option) == ("python", "-c")
    monkeypatch.chdir(tmp_path)
    exec(program, {})
    with open_checkpoint(tmp_path / "pickled-safetensors") as checkpoint:
        assert any(name.endswith("layers.0.self_attn.q_proj.weight") for name in checkpoint.tensors)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "no \\*.safetensors file"),
        ({"model.h5": b""}, "another format"),
        ({"model.gguf": b""}, "is GGUF"),
        ({"adapter_model.safetensors": b""}, "holds an adapter"),
        ({"adapter_config.json": b"{}", "adapter_model.safetensors": b"", "components.safetensors": b""}, "holds an adapter"),
        ({"slim.json": b"{}", "coefficients.safetensors": b""}, "holds an adapter"),
        ({"manifest.json": b"{}"}, "holds a bank"),
        ({"a.safetensors": b"", "b.safetensors": b""}, "several weight files"),
    ],
)
def test_a_folder_without_one_clear_set_of_weights_is_refused(tmp_path: Path, files: dict[str, bytes], reason: str) -> None:
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(SvdbankError, match=reason) as caught:
        open_checkpoint(tmp_path)
    assert caught.value.hint


#: Values that a key of ``config.json`` may be given by a stranger.
ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 2**65)
    | st.floats()
    | st.sampled_from(["", "fp8", "mxfp4", "tensor", "channel"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["weights", "g", "block_structure"]), inner, max_size=3)
    ),
    max_leaves=5,
)
MODEL_TYPES = st.sampled_from(
    ["llama", "gpt_oss", "gpt2", "bert", "mixtral", "nomic_bert", "dinov2", "llama4", "granitemoe", "llava"]
)
STEMS = st.sampled_from(
    [
        "model.layers.0.q_proj", "a", "lm_head", "model.embed_tokens", "model.layers.0.mlp.experts.gate_up_proj", "h.0.attn.c_attn",
        "layers.0.self_attn.Wqkv", "encoder.layer.0.mlp.weights_in", "model.layers.0.mlp.experts.0.gate_proj",
        "model.layers.0.block_sparse_moe.experts.1.w1", "model.layers.0.block_sparse_moe.input_linear", "x.experts.999999999.up_proj", "",
    ]
)  # fmt: skip
ENDS = st.sampled_from(
    [".weight", "", "_blocks", "_scales", ".weight_scale_inv", ".weight_scale", "_scale_inv", ".bias", ".weight_packed"]
)
SIZES = st.lists(st.sampled_from([0, 1, 2, 3, 4, 16, 129, 2**40]), max_size=4)
QUANTISATIONS = st.one_of(
    ANYTHING,
    st.fixed_dictionaries(
        {"quant_method": st.just("fp8")}, optional={"weight_block_size": ANYTHING | st.just([2, 2]) | st.none()}
    ),
    st.just({"quant_method": "mxfp4"}),
    st.fixed_dictionaries(
        {
            "quant_method": st.just("compressed-tensors"),
            "format": st.just("float-quantized"),
            "config_groups": ANYTHING
            | st.fixed_dictionaries(
                {"g": st.fixed_dictionaries({"weights": ANYTHING | st.just({"type": "float", "strategy": "channel"})})}
            ),
        }
    ),
)


def check_whatever_it_holds(folder: Path, data: st.DataObject) -> None:
    """Open, select and read: each part of the folder is well formed, together they are arbitrary. Matrices or an error of ours."""
    from svdbank.checkpoint.dtypes import BITS

    names = data.draw(st.lists(st.tuples(STEMS, ENDS), max_size=5, unique=True))
    header, end = {}, 0
    for stem, suffix in names:
        dtype = data.draw(st.sampled_from(["F32", "BF16", "F8_E4M3", "U8", "F8_E8M0", "F4", "I64", "C64"]))
        shape = data.draw(SIZES)
        nbytes = math.prod(shape) * BITS[dtype] // 8
        if nbytes > 100_000:
            continue
        header[stem + suffix] = entry(end, end + nbytes, shape, dtype)
        end += nbytes
    config: dict[str, object] = {"model_type": data.draw(MODEL_TYPES), "quantization_config": data.draw(QUANTISATIONS)}
    key = st.sampled_from(["dtype", "vocab_size", "tie_word_embeddings", "architectures", "text_config", "_name_or_path"])
    config |= data.draw(st.dictionaries(key, ANYTHING, max_size=2))
    config = {name: value for name, value in config.items() if data.draw(st.booleans()) or name == "quantization_config"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(raw(header, data.draw(st.randoms(use_true_random=False)).randbytes(end)))
    try:
        with open_checkpoint(folder) as checkpoint:
            specs, skips = decomposable(checkpoint, data.draw(st.sampled_from(["all-linear", ".*"])))
            assert {source.name for spec in specs for source in spec.sources} | {
                s.name for s in skips
            } == checkpoint.tensors.keys()
            for spec in specs:
                assert checkpoint.read(spec).shape == (spec.out_features, spec.in_features)
    except SvdbankError:
        return


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_whatever_a_folder_holds_gives_matrices_or_an_error_of_ours(tmp_path: Path, data: st.DataObject) -> None:
    check_whatever_it_holds(tmp_path, data)


@pytest.mark.soak
@settings(max_examples=20_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_whatever_many_folders_hold_gives_matrices_or_an_error_of_ours(tmp_path: Path, data: st.DataObject) -> None:
    check_whatever_it_holds(tmp_path, data)
