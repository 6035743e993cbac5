"""Quantised checkpoints: which can be read, and what tensors of values their codes and scales stand for.

Read are the formats in which models are released: FP8 with a scale for each block or tensor (``quant_method: fp8``), FP8 of
compressed-tensors, and MXFP4. Whatever else ``config.json`` says about quantisation is an error that names it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar

import msgspec

from svdbank.checkpoint.configuration import AGAIN, text_part
from svdbank.core.errors import CheckpointError
from svdbank.core.specs import Quantisation, TensorSource

_TARGETS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_FP8 = ("F8_E4M3", "F8_E5M2")
_FLOAT_SCALES = ("F32", "BF16", "F16")

#: Methods that quantise a finished model to 8 bits or fewer, and how they are called.
_AFTERWARDS = {
    "aqlm": "AQLM",
    "auto-round": "AutoRound",
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "eetq": "EETQ",
    "fouroversix": "FourOverSix",
    "fp_quant": "FP-Quant",
    "gguf": "GGUF",
    "gptq": "GPTQ",
    "higgs": "HIGGS",
    "hqq": "HQQ",
    "metal": "Metal affine quantisation",
    "quanto": "Quanto",
    "sinq": "SINQ",
    "spqr": "SpQR",
    "torchao": "torchao",
    "vptq": "VPTQ",
}
_BITS = ("bits", "num_bits", "nbits", "w_bit", "wbits")
_FLOAT_FORMATS = ("float-quantized", "naive-quantized")
_READ = "fp8, mxfp4, and compressed-tensors in float-quantized or naive-quantized"

#: What to do about codes and scales that do not fit each other.
_DAMAGED = "the checkpoint is incomplete or was edited: download it again, or name the full-precision repository"

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,95}/[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}")

T = TypeVar("T")
_Positive = Annotated[int, msgspec.Meta(ge=1, lt=2**31)]


class _Fp8(msgspec.Struct, frozen=True):
    """The keys that are read of a configuration with ``quant_method: fp8``; the default is transformers'."""

    weight_block_size: tuple[_Positive, _Positive] | None = (128, 128)
    expert_dtype: str = "fp8"


class _Weights(msgspec.Struct, frozen=True):
    num_bits: int = 8
    type: str = "int"
    symmetric: bool = True
    strategy: str | None = None
    block_structure: tuple[_Positive, _Positive] | None = None


class _Group(msgspec.Struct, frozen=True):
    weights: _Weights | None = None
    format: str | None = None


class _CompressedTensors(msgspec.Struct, frozen=True):
    """The keys that are read of a configuration with ``quant_method: compressed-tensors``."""

    config_groups: Annotated[dict[str, _Group | list[Any]], msgspec.Meta(max_length=1000)] = {}
    format: str = ""
    transform_config: dict[str, Any] | None = None
    sparsity_config: dict[str, Any] | None = None


#: Finds the full-precision repository where the model names one (:func:`full_precision`); called when something is refused.
MadeFrom = Callable[[], str | None]


def _unknown() -> None:
    return None


def refuse_unreadable(quantisation: Mapping[str, Any] | None, where: str, *, made_from: MadeFrom = _unknown) -> None:
    """CheckpointError for a ``quantization_config`` whose weights cannot be read, or would not be worth decomposing.

    Needs no header, so it can be called before anything is downloaded.
    """
    if quantisation is None:
        return
    method = quantisation.get("quant_method")
    if method is None and (quantisation.get("load_in_4bit") or quantisation.get("load_in_8bit")):
        method = "bitsandbytes"
    if not isinstance(method, str) or not method:
        raise _unreadable(where, "no scheme named", made_from)
    if method in _AFTERWARDS or method.startswith("intel/auto-round"):
        raise _afterwards(where, _AFTERWARDS.get(method, "AutoRound"), _bits(quantisation), made_from)
    if method == "fp8":
        about = _checked(quantisation, _Fp8, where)
        if about.expert_dtype != "fp8":
            raise _unreadable(where, f"fp8 with expert_dtype {about.expert_dtype[:40]!r}", made_from)
    elif method == "compressed-tensors":
        _refuse_compressed(_checked(quantisation, _CompressedTensors, where), where, made_from)
    elif method != "mxfp4":
        raise _unreadable(where, repr(method[:60]), made_from)


def _refuse_compressed(about: _CompressedTensors, where: str, made_from: MadeFrom) -> None:
    if about.transform_config:
        raise _unreadable(where, "compressed-tensors with transform_config (rotated weights)", made_from)
    if (about.sparsity_config or {}).get("format", "dense") != "dense":
        raise _unreadable(where, "compressed-tensors with sparsity_config (compressed sparse weights)", made_from)
    if presets := [name for name, group in about.config_groups.items() if isinstance(group, list)]:
        raise _unreadable(where, f"compressed-tensors with the preset scheme {presets[0][:40]!r}", made_from)
    groups = _weight_groups(about)
    for group in groups:
        assert group.weights is not None
        stored = group.format or about.format
        if group.weights.type.lower() != "float" or group.weights.num_bits < 8:
            raise _afterwards(where, f"compressed-tensors, {stored[:40]}", group.weights.num_bits, made_from)
        if stored not in _FLOAT_FORMATS:
            raise _unreadable(where, f"compressed-tensors in the format {stored[:40]!r}", made_from)
        if group.weights.num_bits != 8 or not group.weights.symmetric:
            raise _unreadable(where, "compressed-tensors with zero points or more than 8 bits", made_from)
        if group.weights.strategy not in (None, "tensor", "channel", "block"):
            raise _unreadable(where, f"compressed-tensors with strategy {group.weights.strategy[:40]!r}", made_from)
        if (group.weights.strategy == "block") != (group.weights.block_structure is not None):
            raise _unreadable(where, "compressed-tensors in which strategy and block_structure disagree", made_from)
    # Of several groups each has its own format; without any the weights are as the format says, or not quantised at all.
    if about.format not in (*_FLOAT_FORMATS, "mixed-precision" if groups else "dense", ""):
        raise _unreadable(where, f"compressed-tensors in the format {about.format[:40]!r}", made_from)


def _weight_groups(about: _CompressedTensors) -> list[_Group]:
    """The groups that quantise weights, not activations alone."""
    return [group for group in about.config_groups.values() if isinstance(group, _Group) and group.weights is not None]


def with_values(
    tensors: Mapping[str, TensorSource],
    quantisation: Mapping[str, Any] | None,
    config: Mapping[str, Any],
    where: str,
    *,
    made_from: MadeFrom = _unknown,
) -> dict[str, TensorSource]:
    """``tensors`` in which codes and scales are replaced by the tensors of values that they stand for, as the model names them.

    ``quantisation`` passed :func:`refuse_unreadable`. Values have the dtype that ``config`` gives the model, bfloat16 without one:
    what transformers makes of them when it dequantises. Tensors that are not quantised stay as they are. Raises CheckpointError for
    codes without scales, scales without codes, and shapes that do not fit; also, without ``quantisation``, for tensors named as GPTQ
    and AWQ name theirs.
    """
    if quantisation is None:
        _refuse_packed(tensors, where, made_from)
        return dict(tensors)
    target = _target(config)
    if quantisation.get("quant_method") == "mxfp4":
        return _mxfp4(tensors, target, where)
    if quantisation.get("quant_method") == "fp8":
        block = _checked(quantisation, _Fp8, where).weight_block_size
        return _fp8(
            tensors, target, where, scheme="fp8", suffix="_scale_inv", blocks=(block,), scale_kinds=(*_FLOAT_SCALES, "F8_E8M0")
        )
    groups = _weight_groups(_checked(quantisation, _CompressedTensors, where))
    blocks = {(1, 0) if g.weights.strategy == "channel" else g.weights.block_structure for g in groups if g.weights is not None}
    return _fp8(
        tensors, target, where, scheme="compressed-tensors", suffix="_scale", blocks=tuple(blocks), scale_kinds=_FLOAT_SCALES
    )


def _refuse_packed(tensors: Mapping[str, TensorSource], where: str, made_from: MadeFrom) -> None:
    """CheckpointError for codes of GPTQ or AWQ: ``X.qweight`` beside ``X.qzeros`` and ``X.scales``."""
    for name in tensors:
        if not name.endswith(".qweight"):
            continue
        zeros, scales = (tensors.get(name.removesuffix("qweight") + part) for part in ("qzeros", "scales"))
        if zeros is None or scales is None:
            continue
        bits = None
        if zeros.dtype == "I32" and len(zeros.shape) == len(scales.shape) == 2 and scales.shape[1]:
            bits = next((b for b in (2, 3, 4, 8) if 32 * zeros.shape[1] == b * scales.shape[1]), None)
        raise _afterwards(where, f"{name!r} beside qzeros and scales, as GPTQ and AWQ store them", bits, made_from)


def _fp8(
    tensors: Mapping[str, TensorSource],
    target: str,
    where: str,
    *,
    scheme: Any,
    suffix: str,
    blocks: tuple[tuple[int, int] | None, ...],
    scale_kinds: tuple[str, ...],
) -> dict[str, TensorSource]:
    """FP8 codes named as the weight, their scales named so with ``suffix``.

    ``blocks``: the blocks that the configuration allows; None is the whole tensor, 0 columns a whole row.
    """
    found = dict(tensors)
    for name, codes in tensors.items():
        if name.endswith("weight" + suffix) and name.removesuffix(suffix) not in tensors:
            raise CheckpointError(
                f"{where}: {name!r} are scales of {name.removesuffix(suffix)!r}, which is not there", hint=_DAMAGED
            )
        scales = tensors.get(name + suffix)
        if codes.dtype not in _FP8:
            if scales is not None and len(codes.shape) > 1:
                raise CheckpointError(
                    f"{where}: {name!r} is stored as {codes.dtype} and has scales, {scales.name!r}", hint=_DAMAGED
                )
            continue
        if scales is None:
            raise CheckpointError(
                f"{where}: {name!r} is stored as {codes.dtype} and its scales {name + suffix!r} are not there",
                hint=_DAMAGED,
            )
        _check(codes, scales, scale_kinds, where)
        for block in sorted(blocks, key=lambda block: (block is None, block)):
            height, width = block or codes.shape[-2:]
            size = (height, width or codes.shape[-1])
            grid = (*codes.shape[:-2], *(-(-n // b) for n, b in zip(codes.shape[-2:], size, strict=True)))
            if scales.shape == grid or (block is None and scales.shape in ((), (1,))):
                break
        else:
            raise CheckpointError(
                f"{where}: the scales {scales.name!r} have the shape {scales.shape}, which is not that of {_shown(blocks)} "
                f"for codes of shape {codes.shape}",
                hint=_DAMAGED,
            )
        del found[scales.name]
        how = Quantisation(scheme=scheme, codes=codes.dtype, shape=codes.shape, block=size, scales=scales)
        found[name] = msgspec.structs.replace(codes, dtype=target, quantisation=how)
    return found


def _mxfp4(tensors: Mapping[str, TensorSource], target: str, where: str) -> dict[str, TensorSource]:
    """``X_blocks`` (…, out, groups, 16) and ``X_scales`` (…, out, groups) become X (…, 32 · groups, out).

    A byte holds two e2m1 codes, 32 along the input dimension share a scale. The model's own weight is transposed: gpt-oss applies
    ``x @ W``.
    """
    found = dict(tensors)
    for name, codes in tensors.items():
        if name.endswith("_scales") and name.removesuffix("_scales") + "_blocks" not in tensors:
            raise CheckpointError(
                f"{where}: {name!r} are scales without {name.removesuffix('_scales') + '_blocks'!r}", hint=_DAMAGED
            )
        if not name.endswith("_blocks"):
            continue
        logical = name.removesuffix("_blocks")
        scales = tensors.get(logical + "_scales")
        if scales is None:
            raise CheckpointError(
                f"{where}: {name!r} are codes and their scales {logical + '_scales'!r} are not there", hint=_DAMAGED
            )
        if logical in tensors or not logical:
            raise CheckpointError(f"{where}: {logical!r} is there beside its codes {name!r}", hint=_DAMAGED)
        if codes.dtype != "U8" or len(codes.shape) < 3 or codes.shape[-1] != 16:
            raise CheckpointError(
                f"{where}: {name!r} is {codes.dtype} of shape {codes.shape}, not U8 of (…, rows, groups, 16)", hint=_DAMAGED
            )
        _check(codes, scales, ("U8",), where)
        if scales.shape != codes.shape[:-1]:
            raise CheckpointError(
                f"{where}: the scales {scales.name!r} have the shape {scales.shape}, not {codes.shape[:-1]} as their codes",
                hint=_DAMAGED,
            )
        *leading, rows, groups, _ = codes.shape
        how = Quantisation(
            scheme="mxfp4",
            codes="F4",
            shape=(*leading, rows, 32 * groups),
            block=(1, 32),
            scales=scales,
            transposed=True,
        )
        del found[name], found[scales.name]
        found[logical] = msgspec.structs.replace(
            codes, name=logical, dtype=target, shape=(*leading, 32 * groups, rows), quantisation=how
        )
    return found


def _check(codes: TensorSource, scales: TensorSource, kinds: tuple[str, ...], where: str) -> None:
    if len(codes.shape) < 2 or 0 in codes.shape:
        raise CheckpointError(
            f"{where}: {codes.name!r} is stored as {codes.dtype} of shape {codes.shape}: no quantised matrix", hint=_DAMAGED
        )
    if scales.dtype not in kinds:
        raise CheckpointError(
            f"{where}: the scales {scales.name!r} are stored as {scales.dtype}; known for this scheme: {', '.join(kinds)}",
            hint=_DAMAGED,
        )


def _shown(blocks: tuple[tuple[int, int] | None, ...]) -> str:
    names = [
        "one for the tensor" if b is None else "one for each row" if not b[1] else f"blocks of {b[0]}x{b[1]}" for b in blocks
    ]
    return " or ".join(sorted(names))


def _target(config: Mapping[str, Any]) -> str:
    for part in (config, text_part(config)):
        for key in ("dtype", "torch_dtype"):
            if (value := part.get(key)) is not None:
                return _TARGETS.get(value.removeprefix("torch.") if isinstance(value, str) else "", "BF16")
    return "BF16"


def full_precision(config: Mapping[str, Any], card: str | None, name: str) -> str | None:
    """The repository that a quantised model says it was made from: ``base_model`` of its model card, or ``_name_or_path``.

    Only what looks like a Hub id is returned, so the text is safe to show; a name that is ``name`` itself is not.
    """
    front = re.match(r"---\r?\n(.{0,20000}?)\r?\n---", card or "", re.DOTALL)
    named = re.findall(r"^base_model:[ \t]*(\S*)(?:[ \t]*\r?\n[ \t]*-[ \t]+(\S+))?", front[1], re.MULTILINE) if front else []
    stated = [one or other for one, other in named] + [config.get("_name_or_path")]
    for value in stated:
        text = value.strip("'\"") if isinstance(value, str) else ""
        if _ID.fullmatch(text) and ".." not in text and text != name:
            return text
    return None


def _bits(quantisation: Mapping[str, Any]) -> int | None:
    if quantisation.get("load_in_4bit"):
        return 4
    if quantisation.get("load_in_8bit"):
        return 8
    nested = quantisation
    for key in ("quant_config", "weight_quant_params"):  # where HQQ has them
        inner = nested.get(key)
        nested = inner if isinstance(inner, dict) else nested
    found = (part.get(key) for part in (quantisation, nested) for key in _BITS)
    return next((bits for bits in found if type(bits) is int and 0 < bits < 17), None)


def _afterwards(where: str, method: str, bits: int | None, made_from: MadeFrom) -> CheckpointError:
    width = f"to {bits} bits " if bits else ""
    return CheckpointError(
        f"{where}: the weights were quantised {width}after training ({method}), and such codes are not read: a bank of them would "
        "describe the quantiser's rounding noise, and so would what is fused into them or extracted from them",
        hint=_elsewhere(made_from),
    )


def _unreadable(where: str, scheme: str, made_from: MadeFrom) -> CheckpointError:
    return CheckpointError(
        f"{where}: the weights are quantised in a way that svdbank cannot read: {scheme}; it reads {_READ}",
        hint=_elsewhere(made_from),
    )


def _elsewhere(made_from: MadeFrom) -> str:
    if (named := made_from()) is None:
        return "name the full-precision repository this one was made from; its model card says which one"
    return f"name the full-precision repository; this one says it was made from {named}"


def _checked(quantisation: Mapping[str, Any], kind: type[T], where: str) -> T:
    try:
        return msgspec.convert(dict(quantisation), kind, strict=True)
    except msgspec.ValidationError as cause:
        raise CheckpointError(f"{where}: quantization_config: {cause}", hint=AGAIN) from cause
