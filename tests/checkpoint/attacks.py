"""Weight files as a stranger could prepare them, made byte by byte."""

from __future__ import annotations

import json
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
    "a pickle under another name": (b"\x80\x02ccollections\nOrderedDict\nq\x00)Rq\x01." * 4, "the format allows"),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "the format allows"),
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
