"""Quantised checkpoints: their values are the libraries' to the bit, a bank of them is theirs, and what is not worth reading is refused."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from safetensors.torch import load_file, save_file

import svdbank
from svdbank.checkpoint import decomposable, open_checkpoint
from svdbank.checkpoint.quantised import dequantisation
from svdbank.checkpoint.quantised.quantisation import full_precision
from svdbank.core.errors import CheckpointError, WrongBaseError
from svdbank.solver import pinned_threads
from svdbank_cli.main import run
from tests.building.test_accuracy import BOUND, sine
from tests.checkpoint import quantised_models as made


@pytest.fixture(scope="module")
def checkpoints(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each layout, with one layer of trained weights."""
    root = tmp_path_factory.mktemp("quantised")
    folders = {
        "fp8": made.save_fp8(made.llama(minilm), root / "fp8"),
        "fp8-ue8m0": made.save_fp8(made.llama(minilm), root / "ue8m0", scale_fmt="ue8m0"),
        "fp8-edges": made.save_fp8_edges(made.llama(minilm, intermediate=100), root / "edges"),
        "tensor": made.save_compressed_tensors(made.llama(minilm), root / "tensor", "tensor"),
        "channel": made.save_compressed_tensors(
            made.llama(minilm), root / "channel", "channel", ignore=("lm_head", "re:.*o_proj")
        ),
        "block": made.save_compressed_tensors(made.llama(minilm, intermediate=300), root / "block", "block"),
        "mxfp4": made.save_mxfp4(made.gpt_oss(minilm), root / "mxfp4"),
        "deepseek": made.save_fp8(made.deepseek(minilm), root / "deepseek"),
    }
    for layout, dtype in (("fp8", "float32"), ("fp8-edges", "float32"), ("tensor", "float32"), ("mxfp4", "float16")):
        folders[f"{layout}-{dtype}"] = Path(shutil.copytree(folders[layout], root / f"{layout}-{dtype}"))
        config = config_of(folders[layout])
        (root / f"{layout}-{dtype}" / "config.json").write_text(json.dumps({**config, "dtype": dtype}))
    return folders


LOADED = ("fp8", "fp8-ue8m0", "fp8-float32", "tensor", "tensor-float32", "channel", "block", "mxfp4", "mxfp4-float16")
LAYOUTS = (*LOADED, "fp8-edges", "fp8-edges-float32")


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def by_the_library(folder: Path) -> dict[str, torch.Tensor]:
    """The quantised weights of a checkpoint as its own library dequantises each."""
    config = config_of(folder)
    about, dtype = config["quantization_config"], getattr(torch, config["dtype"])
    stored = load_file(folder / "model.safetensors")
    values = {}
    for name, codes in stored.items():
        if about["quant_method"] == "mxfp4" and name.endswith("_blocks"):
            from transformers.integrations.mxfp4 import convert_moe_packed_tensors

            logical = name.removesuffix("_blocks")
            values[logical] = convert_moe_packed_tensors(codes, stored[f"{logical}_scales"], dtype=dtype)
        elif name + "_scale_inv" in stored:
            values[name] = _fp8(codes, stored[name + "_scale_inv"], about["weight_block_size"], dtype)
        elif name + "_scale" in stored:
            from compressed_tensors.compressors import BaseCompressor
            from compressed_tensors.quantization import QuantizationScheme

            compressor = BaseCompressor.get_value_from_registry(about["format"])
            scheme = QuantizationScheme.model_validate(about["config_groups"]["group_0"])
            state = {"weight": codes, "weight_scale": stored[name + "_scale"]}
            values[name] = compressor.decompress(state, scheme)["weight"].to(dtype)
    return values


def _fp8(codes: torch.Tensor, scales: torch.Tensor, block: list[int], dtype: torch.dtype) -> torch.Tensor:
    from compressed_tensors.entrypoints.convert.converters.fp8block_dequantizer import FP8BlockDequantizer
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    if all(n % b == 0 for n, b in zip(codes.shape, block, strict=True)):
        whole: torch.Tensor = Fp8Dequantize(None)._dequantize_one(codes, scales, dtype)
        return whole
    # transformers refuses most shapes that are no multiple of the block, and takes the blocks of the others to be smaller.
    edges = FP8BlockDequantizer(weight_block_size=tuple(block), dtype=dtype)
    named = edges.process({"a.weight": codes, "a.weight_scale_inv": scales})
    return named["a.weight"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("read", "panel"), [(dequantisation.READ, dequantisation.PANEL), (50_000, 20_000)])
def test_every_value_is_the_librarys_to_the_bit(
    checkpoints: dict[str, Path], layout: str, read: int, panel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In panels that end inside a block of scales as well."""
    monkeypatch.setattr(dequantisation, "READ", read)
    monkeypatch.setattr(dequantisation, "PANEL", panel)
    expected = by_the_library(checkpoints[layout])
    assert len(expected) == {"mxfp4": 2, "mxfp4-float16": 2, "channel": 6}.get(layout, 7)
    with open_checkpoint(checkpoints[layout]) as checkpoint:
        for name, values in expected.items():
            read = checkpoint.read_tensor(checkpoint.tensors[name])
            assert (read.dtype, read.shape) == (values.dtype, values.shape)
            assert torch.equal(read, values)
            into = torch.full(values.shape, torch.nan, dtype=values.dtype)
            assert checkpoint.read_tensor(checkpoint.tensors[name], out=into) is into
            assert torch.equal(into, values)


@pytest.mark.parametrize("layout", [*LOADED, "deepseek"])
def test_what_is_decomposed_is_the_parameter_that_transformers_loads(checkpoints: dict[str, Path], layout: str) -> None:
    """Of gpt-oss and DeepSeek-V3 each expert, stored one by one or stacked, as the slice of its parameter."""
    import transformers

    config = config_of(checkpoints[layout])
    how = {
        "fp8": transformers.FineGrainedFP8Config,
        "mxfp4": transformers.Mxfp4Config,
        "compressed-tensors": transformers.CompressedTensorsConfig,
    }[config["quantization_config"]["quant_method"]]
    model = getattr(transformers, config["architectures"][0]).from_pretrained(
        checkpoints[layout], quantization_config=how(dequantize=True)
    )
    parameters = dict(model.named_parameters())
    with open_checkpoint(checkpoints[layout]) as checkpoint:
        specs, _ = decomposable(checkpoint)
        assert len(specs) == {"deepseek": 13, "mxfp4": 9, "mxfp4-float16": 9}.get(layout, 7)
        for spec in specs:
            loaded = parameters[f"{spec.module}.weight"] if spec.expert is None else parameters[spec.module][spec.expert]
            if spec.operation == "transpose":
                loaded = loaded.mT
            if layout == "tensor-float32" and Version(transformers.__version__) < Version("5.23"):
                # Before, transformers widened the scale, not the product; the library that wrote it rounds to the scale's dtype.
                loaded = loaded.bfloat16().to(loaded.dtype)
            # A model loads what is not quantised in its own dtype; a bank describes it as stored.
            own = checkpoint.read(spec).dtype if spec.sources[0].quantisation else loaded.dtype
            assert torch.equal(checkpoint.read(spec).to(own), loaded), spec.name
        # The rest is stored in bfloat16: transformers does not convert DeepSeek's kv_b_proj, nor gpt-oss's attention.
        assert sum(spec.dtype != "BF16" for spec in specs) == {
            "deepseek": 11,
            "mxfp4": 4,
            "mxfp4-float16": 4,
            "channel": 6,
        }.get(layout, 7)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_codes_and_scales_are_one_tensor_whose_hash_is_of_the_codes_then_the_scales(
    checkpoints: dict[str, Path], layout: str
) -> None:
    stored = load_file(checkpoints[layout] / "model.safetensors")
    with open_checkpoint(checkpoints[layout]) as checkpoint:
        assert not [name for name in checkpoint.tensors if "scale" in name or "_blocks" in name]
        _, skips = decomposable(checkpoint)
        assert not [skip.name for skip in skips if "scale" in skip.name or "_blocks" in skip.name]
        for name in by_the_library(checkpoints[layout]):
            source = checkpoint.tensors[name]
            digest = hashlib.sha256()
            checkpoint.read_tensor(source, digest)
            scales = next(stored[name + suffix] for suffix in ("_scale_inv", "_scale", "_scales") if name + suffix in stored)
            pieces = [stored[name if name in stored else name + "_blocks"], scales]
            raw = b"".join(piece.contiguous().view(torch.uint8).numpy().tobytes() for piece in pieces)
            assert digest.hexdigest() == hashlib.sha256(raw).hexdigest()
            assert source.nbytes == len(raw)


def test_one_expert_is_read_alone(checkpoints: dict[str, Path]) -> None:
    values = by_the_library(checkpoints["mxfp4"])
    name = "model.layers.0.mlp.experts.gate_up_proj"
    with open_checkpoint(checkpoints["mxfp4"]) as checkpoint:
        source = checkpoint.tensors[name]
        assert source.shape == (2, 384, 384)
        for expert in range(2):
            part = source.part(expert)
            assert torch.equal(checkpoint.read_tensor(part), values[name][expert])
            assert checkpoint.read_tensor(part).mT.is_contiguous()
            assert part.nbytes == source.nbytes // 2


def test_a_panel_bounds_what_is_read_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is the values and one panel: of 2 MiB of codes no more than its bytes are ever asked for."""
    write(tmp_path, {"a.weight": torch.ones(2048, 1024).to(torch.float8_e4m3fn), "a.weight_scale_inv": torch.ones(16, 8)}, FP8)
    monkeypatch.setattr(dequantisation, "READ", 64 << 10)
    asked: list[int] = []
    with open_checkpoint(tmp_path) as checkpoint:
        file = checkpoint._open["model.safetensors"]
        original = file.read_into
        monkeypatch.setattr(file, "read_into", lambda buffer, *rest: (asked.append(len(buffer)), original(buffer, *rest))[1])
        checkpoint.read_tensor(checkpoint.tensors["a.weight"])
    assert sum(asked) == (2048 * 1024) + 16 * 8 * 4
    assert max(asked) == 64 << 10


@pytest.mark.parametrize(
    ("layout", "formats"),
    [
        ("fp8", {"BF16 = F8_E4M3 * F32[128x128]": 7}),
        ("channel", {"BF16 = F8_E4M3 * BF16[1x384]": 5, "BF16 = F8_E4M3 * BF16[1x512]": 1}),
        ("mxfp4", {"BF16 = F4 * U8[1x32]": 4}),
    ],
)
def test_a_bank_of_a_quantised_checkpoint_is_that_of_a_float64_svd_of_the_librarys_values(
    checkpoints: dict[str, Path], layout: str, formats: dict[str, int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoints[layout]
    assert run(["plan", str(folder), "--rank", "16"]) == 0
    said = f"{sum(formats.values())} weights are stored as {'F4' if layout == 'mxfp4' else 'F8_E4M3'} codes: the bank describes"
    assert said in capsys.readouterr().out
    assert run(["build", str(folder), "-o", str(tmp_path / "bank"), "--rank", "16"]) == 0
    assert said in capsys.readouterr().out
    assert run(["info", str(tmp_path / "bank"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["quantised"] == formats
    bank, compared = svdbank.open(tmp_path / "bank"), 0
    for name, matrix in matrices(by_the_library(folder)).items():
        with pinned_threads(1):
            U, S, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
        basis = bank[name]
        assert basis.dtype in formats
        for rank in (1, 16):
            # The next singular value is apart, so the subspace is defined far better than the bound asks.
            assert float(S[-rank - 1] - S[-rank]) > 1e-6 * float(S[0])
            assert sine(basis.left(rank).double(), U[:, -rank:]) <= BOUND
            assert sine(basis.right(rank).double(), Vh[-rank:].mT) <= BOUND
        compared += 1
    assert compared == sum(formats.values())
    assert svdbank.verify(bank.path, model=folder).sound


def matrices(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The matrices (out, in) that a bank holds of these parameters: of gpt-oss' (experts, in, out) each expert's transpose."""
    found = {name: value for name, value in values.items() if value.ndim == 2}
    for name, value in values.items():
        if value.ndim == 3:
            found |= {f"{name}.{expert}": value[expert].mT for expert in range(len(value))}
    return found


def test_another_scale_is_another_base(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """The base digest covers the scales: the same codes with one scale changed are other weights."""
    folder = tmp_path / "model"
    shutil.copytree(checkpoints["fp8"], folder)
    svdbank.build(folder, tmp_path / "bank", rank=4, targets=("q_proj",))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight_scale_inv"][0, 0] *= 1.5
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(WrongBaseError, match="q_proj"):
        svdbank.build(folder, tmp_path / "bank", rank=4, targets=("q_proj",))


def test_scales_in_another_file_than_their_codes_are_found(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    tensors = load_file(checkpoints["fp8"] / "model.safetensors")
    shards = {"1.safetensors": {}, "2.safetensors": {}}
    for name, tensor in tensors.items():
        shards["2.safetensors" if "scale" in name else "1.safetensors"][name] = tensor
    for file, own in shards.items():
        save_file(own, tmp_path / file)
    index = {name: file for file, own in shards.items() for name in own}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    shutil.copy(checkpoints["fp8"] / "config.json", tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        for name, values in by_the_library(checkpoints["fp8"]).items():
            source = checkpoint.tensors[name]
            assert torch.equal(checkpoint.read_tensor(source), values)
            assert [file for file, _, _ in source.pieces] == ["1.safetensors", "2.safetensors"]


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def compressed(weights: dict[str, Any] | None = None, **about: Any) -> dict[str, Any]:
    """A configuration of compressed-tensors."""
    group = {"weights": {"num_bits": 8, "type": "float", "strategy": "tensor", **(weights or {})}, "targets": ["Linear"]}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}, **about}


def write(folder: Path, tensors: dict[str, torch.Tensor], quantisation: object, **config: object) -> Path:
    """A checkpoint of these tensors with this ``quantization_config``."""
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantisation, **config}))
    return folder


#: quantization_config → what the error calls it.
AFTERWARDS = {
    "to 4 bits after training (GPTQ)": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "to 4 bits after training (AWQ)": {"quant_method": "awq", "bits": 4},
    "to 4 bits after training (bitsandbytes)": {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
    },
    "to 8 bits after training (bitsandbytes)": {"load_in_8bit": True},
    "to 3 bits after training (HQQ)": {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 3}}},
    "after training (Quanto)": {"quant_method": "quanto", "weights": "int4"},
    "after training (torchao)": {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int4WeightOnlyConfig"}}},
    "to 4 bits after training (compressed-tensors, pack-quantized)": compressed(
        {"num_bits": 4, "type": "int", "strategy": "group"}, format="pack-quantized"
    ),
    "to 8 bits after training (compressed-tensors, int-quantized)": compressed({"type": "int"}, format="int-quantized"),
    "to 4 bits after training (compressed-tensors, nvfp4-pack-quantized)": compressed(
        {"num_bits": 4, "strategy": "tensor_group"}, format="nvfp4-pack-quantized"
    ),
}


@pytest.mark.parametrize("scheme", AFTERWARDS)
def test_weights_quantised_after_training_are_refused_with_the_reason_before_any_work(
    tmp_path: Path, scheme: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "model", {"a.weight": torch.ones(4, 4)}, AFTERWARDS[scheme], _name_or_path="Org/Full-7B")
    assert run(["build", str(folder), "-o", str(tmp_path / "bank")]) == 1
    error = capsys.readouterr().err
    assert scheme in error and "rounding noise" in error
    assert "this one says it was made from Org/Full-7B" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


#: quantization_config → the scheme that the error names.
UNKNOWN = {
    "'squish'": {"quant_method": "squish"},
    "'fbgemm_fp8'": {"quant_method": "fbgemm_fp8"},
    "'modelopt'": {"quant_method": "modelopt", "quant_algo": "FP8"},
    "'bitnet'": {"quant_method": "bitnet"},
    "no scheme named": {"bits": 4},
    "fp8 with expert_dtype 'fp4'": {"quant_method": "fp8", "expert_dtype": "fp4"},
    "compressed-tensors in the format 'mxfp8-quantized'": compressed(format="mxfp8-quantized"),
    "compressed-tensors in the format 'pack-quantized'": compressed(format="pack-quantized", config_groups={}),
    "compressed-tensors in the format 'mixed-precision'": compressed(format="mixed-precision", config_groups={}),
    "compressed-tensors with the preset scheme 'W4A16'": compressed(config_groups={"W4A16": ["Linear"]}),
    "compressed-tensors with strategy 'group'": compressed({"strategy": "group"}),
    "compressed-tensors with zero points": compressed({"symmetric": False}),
    "compressed-tensors with transform_config": compressed(transform_config={"config_groups": {"u": {}}}),
    "compressed-tensors with sparsity_config": compressed(sparsity_config={"format": "sparse-24-bitmask"}),
}


@pytest.mark.parametrize("scheme", UNKNOWN)
def test_an_unknown_scheme_is_refused_by_name(tmp_path: Path, scheme: str) -> None:
    folder = write(tmp_path / "model", {"a.weight": torch.ones(4, 4)}, UNKNOWN[scheme])
    with pytest.raises(CheckpointError, match=f"cannot read: {re.escape(scheme)}.*it reads fp8, mxfp4") as caught:
        open_checkpoint(folder)
    assert caught.value.hint == "name the full-precision repository this one was made from; its model card says which one"


def test_codes_of_gptq_are_known_without_a_configuration(tmp_path: Path) -> None:
    packed = {
        "a.qweight": torch.zeros(16, 128, dtype=torch.int32),
        "a.qzeros": torch.zeros(1, 16, dtype=torch.int32),
        "a.scales": torch.ones(1, 128, dtype=torch.float16),
    }
    with pytest.raises(CheckpointError, match=r"to 4 bits after training .*GPTQ.*rounding noise") as caught:
        open_checkpoint(write(tmp_path / "model", packed, None))
    assert caught.value.hint and "full-precision" in caught.value.hint


@pytest.mark.parametrize(
    ("config", "card", "name"),
    [
        ({}, "---\nlicense: mit\nbase_model: Org/Full\n---\n# Text", "Org/Full"),
        ({}, "---\nbase_model:\n- Org/Full\nlicense: mit\n---\n", "Org/Full"),
        ({"_name_or_path": "Org/Other"}, "---\nbase_model: 'Org/Full'\n---\n", "Org/Full"),
        ({"_name_or_path": "Org/Other"}, "# no front matter\nbase_model: Org/Full", "Org/Other"),
        ({"_name_or_path": "/home/me/model"}, None, None),
        ({"_name_or_path": "Org/Self"}, None, None),
        ({"_name_or_path": "Org/x\u001b[2J"}, None, None),
        ({"_name_or_path": "../secret"}, None, None),
        ({"_name_or_path": ["Org/Full"]}, "---\nbase_model: <b>/x\n---\n", None),
    ],
)
def test_the_full_precision_repository_is_named_where_the_model_says_so(
    config: dict[str, Any], card: str | None, name: str | None
) -> None:
    assert full_precision(config, card, "Org/Self") == name


def test_a_gguf_file_is_refused_as_quantised(tmp_path: Path) -> None:
    (tmp_path / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    for place in (tmp_path, tmp_path / "model-Q4_K_M.gguf"):
        with pytest.raises(CheckpointError, match="GGUF") as caught:
            open_checkpoint(place)
        assert caught.value.hint and "full-precision" in caught.value.hint


def kept(matrix: torch.Tensor, quantised: torch.Tensor, rank: int = 16) -> float:
    """The share of the minor rank-r left subspace of a matrix that lies in that of its quantised version."""
    minor = [torch.linalg.svd(m.double(), full_matrices=False)[0][:, -rank:] for m in (matrix, quantised)]
    return float(torch.linalg.matrix_norm(minor[0].mT @ minor[1]) ** 2) / rank


#: Mean share of the rank-16 minor left subspace that is kept, in percent, as docs/checkpoints.md has it.
KEPT = {"fp8": 97, "tensor": 97, "mxfp4": 53}


@pytest.mark.parametrize("layout", KEPT)
def test_quantisation_moves_the_minor_subspace_as_documented(checkpoints: dict[str, Path], layout: str, minilm: Path) -> None:
    model = made.gpt_oss(minilm) if layout == "mxfp4" else made.llama(minilm)
    original = matrices({name: value.detach() for name, value in model.named_parameters()})
    with pinned_threads(1):
        shares = [kept(original[name], value) for name, value in matrices(by_the_library(checkpoints[layout])).items()]
    mean = sum(shares) / len(shares)
    print(f"{layout}: {mean:.3f} kept on average, {min(shares):.3f} at least")
    # A percent is where the figure is rounded; a subspace of 16 of 384 random directions would keep 4 %.
    assert 100 * mean == pytest.approx(KEPT[layout], abs=1)


# VmHWM and not ru_maxrss: the latter counts what the parent held when it forked.
_MEASURE = """
import re, sys
import torch
from svdbank.checkpoint import open_checkpoint
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) << 10
with open_checkpoint(sys.argv[1]) as checkpoint:
    for name in ("small.weight", "large.weight"):
        values = checkpoint.read_tensor(checkpoint.tensors[name])
        print(peak(), values.nbytes)
        del values
"""


def test_reading_takes_the_memory_of_the_values_and_a_panel(tmp_path: Path) -> None:
    """Of 64 Mi codes, 128 MiB of values: all codes at once would be 64 MiB more, all of it in float32 256 MiB."""
    codes = {"small": torch.ones(1024, 1024), "large": torch.ones(8192, 8192)}
    tensors = {f"{name}.weight": value.to(torch.float8_e4m3fn) for name, value in codes.items()}
    tensors |= {f"{name}.weight_scale_inv": torch.ones(len(value) // 128, len(value) // 128) for name, value in codes.items()}
    write(tmp_path, tensors, FP8)
    done = subprocess.run([sys.executable, "-c", _MEASURE, str(tmp_path)], capture_output=True, text=True, check=True)
    (before, small), (after, large) = ([int(number) for number in line.split()] for line in done.stdout.splitlines())
    print(f"{(after - before) / 2**20:.0f} MiB more for {(large - small) / 2**20:.0f} MiB more of values")
    # A buffer of 4 MiB, a panel of 4 in float32 and its scales; the allocator rounds up, and the system hands out pages of 2 MiB (28
    # and 33 MiB were seen on a busy machine). All codes at once would take 64.
    assert after - before <= large - small + (40 << 20)
