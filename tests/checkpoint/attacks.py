"""Weight files and folders as a stranger could prepare them, made byte by byte."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


def tensors_file(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """An honest file, by the reference writer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return path


def raw(header: bytes | dict[str, Any], data: bytes = b"", *, length: int | None = None) -> bytes:
    """A file from its parts: the length field may lie."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(begin: int, end: int, shape: list[Any] | None = None, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


#: What is wrong → (file, words of the refusal).
HEADERS: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "too few"),
    "seven bytes": (b"\x02\0\0\0\0\0\0", "too few"),
    "length over the format's limit": (raw(b"{}", length=100_000_001), "claims 100000001 bytes; the format allows"),
    "length of 2**64 - 1": (raw(b"{}", length=2**64 - 1), "the format allows"),
    "length beyond the file": (raw(b"{}", length=3), "the file holds 2"),
    "length zero": (raw(b"", b"xxxx"), "claims 0 bytes"),
    "not JSON": (raw(b"{nope}"), "not valid JSON"),
    "leading space": (raw(b" {}"), "does not begin with"),
    "a list": (raw(b"[]"), "does not begin with"),
    "invalid UTF-8": (raw(b'{"a\xff": 1}'), "not valid UTF-8"),
    "nested deeply": (raw(b'{"a":' + b"[" * 200_000), "nested too deeply|not valid JSON"),
    "a key twice": (raw(b'{"a":%s,"a":%s}' % ((json.dumps(entry(0, 4)).encode(),) * 2), b"1234"), "'a' appears twice"),
    "a field twice": (
        raw(b'{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"1234"),
        "'dtype' appears twice",
    ),
    "metadata that is no mapping": (raw({"__metadata__": [1]}), "__metadata__"),
    "metadata that holds numbers": (raw({"__metadata__": {"a": 1}}), "__metadata__"),
    "a missing field": (raw({"a": {"dtype": "F32", "shape": [1]}}, b"1234"), "exactly dtype, shape and data_offsets"),
    "a field more": (raw({"a": {**entry(0, 4), "code": "x"}}, b"1234"), "exactly dtype, shape and data_offsets"),
    "a tensor that is no mapping": (raw({"a": 5}), "exactly dtype, shape and data_offsets"),
    "unknown dtype": (raw({"a": entry(0, 4, dtype="F31")}, b"1234"), "unknown dtype 'F31'"),
    "dtype of another type": (raw({"a": {**entry(0, 4), "dtype": ["F32"]}}, b"1234"), "unknown dtype"),
    "negative size": (raw({"a": entry(0, 4, [-1, -1])}, b"1234"), "the shape is not"),
    "fractional size": (raw({"a": entry(0, 4, [1.0])}, b"1234"), "the shape is not"),
    "boolean size": (raw({"a": entry(0, 4, [True])}, b"1234"), "the shape is not"),
    "size of 2**63": (raw({"a": entry(0, 4, [2**63])}, b"1234"), "the shape is not"),
    "size with 5000 digits": (
        raw(b'{"a":{"dtype":"F32","shape":[1%s],"data_offsets":[0,4]}}' % (b"0" * 5000), b"1234"),
        "not valid JSON",
    ),
    "a product that wraps to 4 bytes": (raw({"a": entry(0, 4, [2**62, 4, 2**40 + 1])}, b"1234"), "data_offsets span 4"),
    "65 dimensions": (raw({"a": entry(0, 4, [1] * 65)}, b"1234"), "the shape is not"),
    "shape and bytes differ": (raw({"a": entry(0, 8, [1])}, b"12345678"), "takes 4 bytes, data_offsets span 8"),
    "half a byte": (raw({"a": entry(0, 1, [1], "F4")}, b"1"), "takes 0.5 bytes"),
    "descending offsets": (raw({"a": {"dtype": "F32", "shape": [0], "data_offsets": [4, 0]}}, b"1234"), "data_offsets are not"),
    "negative offsets": (raw({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}, b"1234"), "data_offsets are not"),
    "three offsets": (raw({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, b"1234"), "data_offsets are not"),
    "two tensors on the same bytes": (
        raw({"a": entry(0, 8), "b": entry(0, 8)}, b"12345678"),
        "'b' begins at 0, not 8: it overlaps",
    ),
    "overlap by one element": (raw({"a": entry(0, 8), "b": entry(4, 12)}, b"x" * 12), "overlaps"),
    "a hole": (raw({"a": entry(0, 4), "b": entry(8, 12)}, b"x" * 12), "leaves a hole"),
    "a hole at the start": (raw({"a": entry(4, 8)}, b"x" * 8), "leaves a hole"),
    "cut off": (raw({"a": entry(0, 8)}, b"1234"), "beyond the end of the file"),
    "bytes after the last tensor": (raw({"a": entry(0, 4)}, b"12345678"), "short of the end of the file"),
    "an empty name": (raw({"": entry(0, 4)}, b"1234"), "name of 0 characters"),
    "a very long name": (raw({"a" * 513: entry(0, 4)}, b"1234"), "name of 513 characters"),
    "an escape sequence in a name": (raw({"a\x1b[2J.weight": entry(0, 4)}, b"1234"), "control characters"),
    "a lone surrogate in a name": (
        raw(b'{"\\ud800.weight":%s}' % json.dumps(entry(0, 4)).encode(), b"1234"),
        "control characters",
    ),
    "a size written as a float": (
        raw(b'{"a":{"dtype":"F32","shape":[1e0],"data_offsets":[0,4]}}', b"1234"),
        "the shape is not",
    ),
    "a size of NaN": (raw(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', b"1234"), "the shape is not"),
    "an infinite offset": (
        raw(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,Infinity]}}', b"1234"),
        "data_offsets are not",
    ),
    "an offset of 2**64": (raw({"a": {**entry(0, 4), "data_offsets": [0, 2**64]}}, b"1234"), "data_offsets are not"),
    "a dtype in lower case": (raw({"a": entry(0, 4, dtype="f32")}, b"1234"), "unknown dtype 'f32'"),
    "a shape that is a string": (raw({"a": {**entry(0, 4), "shape": "1"}}, b"1234"), "the shape is not"),
    "a shape nested deeply": (
        raw(b'{"a":{"dtype":"F32","shape":' + b"[" * 900 + b"]" * 900 + b',"data_offsets":[0,4]}}', b"1234"),
        "the shape is not|nested too deeply",
    ),
    "a name that reverses the terminal's text": (raw({"a\u202eb": entry(0, 4)}, b"1234"), "control characters"),
    "a pickle under another name": (b"\x80\x02ccollections\nOrderedDict\nq\x00)Rq\x01." * 4, "the format allows"),
    "a Git LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        "a pointer of Git LFS, of 64 bytes",
    ),
}

#: File names that an index must not give → each leads out of the folder or is no weight file.
FILE_NAMES = (
    "../model.safetensors",
    "/etc/model.safetensors",
    "sub/model.safetensors",
    "sub\\model.safetensors",
    "..\\model.safetensors",
    "C:model.safetensors",
    "\\\\host\\share\\model.safetensors",
    "..",
    ".safetensors",
    ".hidden.safetensors",
    "model.bin",
    "model.safetensors\n.bin",
    "model\x00.safetensors",
    "a\u202e.safetensors",
    "a" * 300 + ".safetensors",
    "",
)


class Loaded:
    """A pickle of it makes a folder when it is loaded: proof that code ran."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (str(self.mark),)


Files = dict[str, bytes]
_ONES = raw({"a.weight": entry(0, 64, [4, 4])}, b"\0\0\x80?" * 16)


def model(config: object, *tensors: tuple[str, str, list[int]]) -> Files:
    """A folder with ``config`` (bytes as they are) and tensors of zeros of (name, dtype, shape)."""
    from svdbank.checkpoint.dtypes import BITS

    header, end = {}, 0
    for name, dtype, shape in tensors:
        size = BITS[dtype] // 8
        for n in shape:
            size *= n
        header[name] = entry(end, end + size, shape, dtype)
        end += size
    text = config if isinstance(config, bytes) else json.dumps(config).encode()
    return {"config.json": text, "model.safetensors": raw(header, bytes(end)) if tensors else _ONES}


def quantised(about: object, *tensors: tuple[str, str, list[int]]) -> Files:
    return model({"quantization_config": about}, *tensors)


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
WHOLE = {"quant_method": "fp8", "weight_block_size": None}
MXFP4 = {"quant_method": "mxfp4"}
CODES = ("a.weight", "F8_E4M3", [200, 300])
BLOCKS = ("e.up_blocks", "U8", [2, 6, 3, 16])


def tensors_of(strategy: str, **weights: object) -> dict[str, Any]:
    """A configuration of compressed-tensors."""
    group = {"weights": {"num_bits": 8, "type": "float", "strategy": strategy, **weights}}
    return {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"g": group}}


#: What is wrong → (files of the folder, words of the refusal). In headers nothing is wrong here, but in what they say together.
FOLDERS: dict[str, tuple[Files, str]] = {
    "configuration: not JSON": (model(b"{"), "not valid JSON"),
    "configuration: a list": (model(b"[]"), "a JSON object was expected"),
    "configuration: a key twice": (model(b'{"model_type": "a", "model_type": "b"}'), "appears twice"),
    "configuration: over 10 MB": (model(b'{"a": "' + b"x" * 10_000_001 + b'"}'), "more than 10000000 bytes"),
    "configuration: nested 600 deep": (model(b'{"a":' + b"[" * 600 + b"]" * 600 + b"}"), "nested too deeply"),
    "configuration: nested 600 objects deep": (model(b'{"a":' * 600 + b"1" + b"}" * 600), "nested too deeply"),
    "configuration: nested a million deep": (model(b'{"a":' + b"[" * 1_000_000), "nested too deeply|not valid JSON"),
    "configuration: a number of 5000 digits": (model(b'{"vocab_size": 1%s}' % (b"0" * 5000)), "not valid JSON"),
    "configuration: quantisation that is a list": (quantised([1]), "'quantization_config' must be dict"),
    "quantised: method that is a list": (quantised({"quant_method": ["fp8"]}), "no scheme named"),
    "quantised: method with an escape sequence": (
        quantised({"quant_method": "x\x1b[2J" + "y" * 500}),
        r"cannot read: 'x\\x1b\[2Jy",
    ),
    "fp8: block of zero": (quantised({**FP8, "weight_block_size": [0, 128]}), "weight_block_size"),
    "fp8: negative block": (quantised({**FP8, "weight_block_size": [-1, -1]}), "weight_block_size"),
    "fp8: fractional block": (quantised({**FP8, "weight_block_size": [1.5, 128]}), "weight_block_size"),
    "fp8: block of 2**40": (quantised({**FP8, "weight_block_size": [2**40, 1]}), "weight_block_size"),
    "fp8: block of one number": (quantised({**FP8, "weight_block_size": [128]}), "weight_block_size"),
    "fp8: codes without scales": (quantised(FP8, CODES), "its scales 'a.weight_scale_inv' are not there"),
    "fp8: scales without codes": (quantised(FP8, ("a.weight_scale_inv", "F32", [2, 3])), "scales of 'a.weight', which is not"),
    "fp8: scales beside values": (
        quantised(FP8, ("a.weight", "F32", [4, 4]), ("a.weight_scale_inv", "F32", [1, 1])),
        "is stored as F32 and has scales",
    ),
    "fp8: scales transposed": (quantised(FP8, CODES, ("a.weight_scale_inv", "F32", [3, 2])), r"have the shape \(3, 2\)"),
    "fp8: scales of whole blocks only": (quantised(FP8, CODES, ("a.weight_scale_inv", "F32", [1, 2])), "blocks of 128x128"),
    "fp8: one scale where blocks are said": (quantised(FP8, CODES, ("a.weight_scale_inv", "F32", [1, 1])), "blocks of 128x128"),
    "fp8: flat scales": (quantised(FP8, CODES, ("a.weight_scale_inv", "F32", [6])), r"have the shape \(6,\)"),
    "fp8: scales of another type": (quantised(FP8, CODES, ("a.weight_scale_inv", "I64", [2, 3])), "are stored as I64"),
    "fp8: scales that are codes themselves": (
        quantised(FP8, CODES, ("a.weight_scale_inv", "F8_E4M3", [2, 3])),
        "are stored as F8_E4M3|its scales 'a.weight_scale_inv_scale_inv'",
    ),
    "fp8: blocks where one scale is said": (
        quantised(WHOLE, CODES, ("a.weight_scale_inv", "F32", [2, 3])),
        "that of one for the tensor",
    ),
    "fp8: codes that are a vector": (
        quantised(FP8, ("a.weight", "F8_E4M3", [128]), ("a.weight_scale_inv", "F32", [1])),
        "no quantised matrix",
    ),
    "fp8: codes without elements": (
        quantised(FP8, ("a.weight", "F8_E4M3", [0, 2**61]), ("a.weight_scale_inv", "F32", [0, 2**54])),
        "no quantised matrix",
    ),
    "fp8: experts with the scales of one": (
        quantised(FP8, ("e.up", "F8_E4M3", [4, 128, 128]), ("e.up_scale_inv", "F32", [1, 1])),
        r"have the shape \(1, 1\)",
    ),
    "fp8: experts with too few scales": (
        quantised(FP8, ("e.up", "F8_E4M3", [4, 128, 128]), ("e.up_scale_inv", "F32", [3, 1, 1])),
        r"have the shape \(3, 1, 1\)",
    ),
    "compressed-tensors: groups that are a list": (
        quantised({"quant_method": "compressed-tensors", "config_groups": []}),
        "config_groups",
    ),
    "compressed-tensors: a thousand and one groups": (
        quantised({"quant_method": "compressed-tensors", "config_groups": {str(n): {} for n in range(1001)}}),
        "config_groups",
    ),
    "compressed-tensors: a group that is a string": (
        quantised({"quant_method": "compressed-tensors", "config_groups": {"g": "FP8"}}),
        "config_groups",
    ),
    "compressed-tensors: no group for the codes": (
        quantised({"quant_method": "compressed-tensors"}, CODES, ("a.weight_scale", "F32", [1])),
        "have the shape",
    ),
    "compressed-tensors: scales of channels where one is said": (
        quantised(tensors_of("tensor"), CODES, ("a.weight_scale", "F32", [200, 1])),
        "one for the tensor",
    ),
    "compressed-tensors: too few channels": (
        quantised(tensors_of("channel"), CODES, ("a.weight_scale", "F32", [199, 1])),
        "one for each row",
    ),
    "compressed-tensors: scales of columns": (
        quantised(tensors_of("channel"), CODES, ("a.weight_scale", "F32", [1, 300])),
        "one for each row",
    ),
    "compressed-tensors: blocks without a block": (quantised(tensors_of("block")), "strategy and block_structure disagree"),
    "compressed-tensors: a block of zero": (quantised(tensors_of("block", block_structure=[0, 1])), "block_structure"),
    "compressed-tensors: bits of 2**70": (quantised(tensors_of("tensor", num_bits=2**70)), "num_bits|more than 8 bits"),
    "mxfp4: codes without scales": (quantised(MXFP4, BLOCKS), "scales 'e.up_scales' are not there"),
    "mxfp4: scales without codes": (quantised(MXFP4, ("e.up_scales", "U8", [2, 6, 3])), "scales without 'e.up_blocks'"),
    "mxfp4: scales of another shape": (
        quantised(MXFP4, BLOCKS, ("e.up_scales", "U8", [2, 3, 6])),
        r"have the shape \(2, 3, 6\), not \(2, 6, 3\)",
    ),
    "mxfp4: scales of another type": (quantised(MXFP4, BLOCKS, ("e.up_scales", "F32", [2, 6, 3])), "are stored as F32"),
    "mxfp4: half a group": (
        quantised(MXFP4, ("e.up_blocks", "U8", [2, 6, 3, 8]), ("e.up_scales", "U8", [2, 6, 3])),
        "not U8 of",
    ),
    "mxfp4: codes of another type": (
        quantised(MXFP4, ("e.up_blocks", "I8", [2, 6, 3, 16]), ("e.up_scales", "U8", [2, 6, 3])),
        "not U8 of",
    ),
    "mxfp4: values beside the codes": (
        quantised(MXFP4, BLOCKS, ("e.up_scales", "U8", [2, 6, 3]), ("e.up", "BF16", [2, 96, 6])),
        "'e.up' is there beside its codes",
    ),
    "mxfp4: codes of no name": (
        quantised(MXFP4, ("_blocks", "U8", [6, 3, 16]), ("_scales", "U8", [6, 3])),
        "beside its codes '_blocks'",
    ),
    "mxfp4: no groups": (
        quantised(MXFP4, ("e.up_blocks", "U8", [2, 6, 0, 16]), ("e.up_scales", "U8", [2, 6, 0])),
        "no quantised matrix",
    ),
}
