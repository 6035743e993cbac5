"""Which files of a folder or repository are the weights, and what an index says about them."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from svdbank.checkpoint.documents import check_name, is_bare_weight_name, parse_object
from svdbank.core.errors import CheckpointError

#: Size limits of the JSON files read whole.
MAX_INDEX = 100_000_000
MAX_CONFIG = 10_000_000

#: What to do with a configuration without weights.
NO_WEIGHTS = "put the model's *.safetensors beside it; svdbank plan alone makes do with config.json"

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_ADAPTER = ("adapter_config.json", "svdbank.json", "slim.json")
_FOREIGN = (".h5", ".msgpack", ".onnx", ".npz")


@dataclass(frozen=True)
class Layout:
    """Either one weight file (``single``) or an index that names several (``index``)."""

    single: str | None = None
    index: str | None = None


def choose(names: Iterable[str], where: str) -> Layout:
    """The weights among the file names of a folder or repository, as transformers would choose them.

    ``model.safetensors`` first, then its index, then the only index or the only ``*.safetensors``. CheckpointError when there are
    none, or several and no index; pickle files are refused with the command that converts them.
    """
    top = sorted({name for name in names if "/" not in name})
    if _SINGLE in top:
        return Layout(single=_SINGLE)
    if _INDEX in top:
        return Layout(index=_INDEX)
    indices = [name for name in top if name.endswith(".safetensors.index.json")]
    if len(indices) == 1:
        return Layout(index=indices[0])
    weights = [name for name in top if is_bare_weight_name(name)]
    if "config.json" not in top and (marks := [name for name in _ADAPTER if name in top]):
        raise _adapter(where, marks[0])
    if len(weights) == 1 and weights[0] != "adapter_model.safetensors":
        return Layout(single=weights[0])
    raise _none_or_many(top, indices or weights, where)


def holds_weights(names: Iterable[str]) -> bool:
    """True where a file is of a format that weights are stored in, an index of them, or a mark of a bank or an adapter."""
    endings = (".safetensors", ".safetensors.index.json", ".gguf", *_PICKLES, *_FOREIGN)
    return any(name.endswith(endings) or name == "manifest.json" or name in _ADAPTER for name in names)


def _none_or_many(top: list[str], candidates: list[str], where: str) -> CheckpointError:
    if candidates == ["adapter_model.safetensors"]:
        return _adapter(where, _ADAPTER[0])
    if candidates:
        shown = ", ".join(candidates[:5]) + (", …" if len(candidates) > 5 else "")
        return CheckpointError(
            f"{where}: several weight files and no model.safetensors.index.json: {shown}", hint="name one file"
        )
    if "manifest.json" in top:
        place = where if Path(where).exists() else f"hf://{where}"
        return CheckpointError(f"{where}: holds a bank, not a model", hint=f"svdbank info {shlex.quote(place)}")
    pickles = [name for name in top if name.endswith(_PICKLES)]
    if pickles:
        return CheckpointError(
            f"{where}: only pickle weights ({pickles[0]}); svdbank reads safetensors, because loading a pickle can run code",
            hint=f"if you trust where it comes from, convert it once: {conversion(where)}",
        )
    if quantised := [name for name in top if name.endswith(".gguf")]:
        return gguf(where, quantised[0])
    foreign = [name for name in top if name.endswith(_FOREIGN)]
    if foreign:
        return CheckpointError(
            f"{where}: no safetensors weights ({foreign[0]} is of another format)",
            hint="name the repository or folder that holds the original model in safetensors",
        )
    if "config.json" in top:
        return CheckpointError(f"{where}: no weights there, config.json alone", hint=NO_WEIGHTS)
    return CheckpointError(
        f"{where}: no *.safetensors file there", hint="name a model folder, a .safetensors file or org/name on the Hub"
    )


def _adapter(where: str, mark: str) -> CheckpointError:
    return CheckpointError(f"{where}: holds an adapter, not a model", hint=f"name the base model; {mark} says which one it is")


def gguf(where: str, name: str) -> CheckpointError:
    """The error for GGUF, which mostly holds weights quantised after training."""
    return CheckpointError(
        f"{where}: no safetensors weights; {name} is GGUF, made for inference and mostly quantised after training, which leaves "
        "the minor singular directions to rounding noise",
        hint="name the full-precision repository or folder that it was made from, in safetensors",
    )


def conversion(where: str) -> str:
    """The shell command that re-saves a pickle checkpoint as safetensors, with transformers."""
    target = where.rstrip("/").rsplit("/", 1)[-1].split("@")[0] + "-safetensors"
    program = f"from transformers import AutoModel as M; M.from_pretrained({where!r}).save_pretrained({target!r})"
    return f"python -c {shlex.quote(program)}"


def parse_index(data: bytes, where: str) -> dict[str, str]:
    """``weight_map`` of an index: tensor name to file name, every file name a bare ``*.safetensors`` one."""
    mapping = parse_object(data, where).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise CheckpointError(f"{where}: weight_map is missing or empty")
    checked: set[str] = set()
    for tensor, file in mapping.items():
        check_name(tensor, where)
        if not isinstance(file, str):
            raise CheckpointError(f"{where}: tensor {tensor!r}: the file name is not a string")
        if file not in checked:
            if not is_bare_weight_name(file):
                raise CheckpointError(
                    f"{where}: tensor {tensor!r} is said to lie in {file[:200]!r}; only a bare *.safetensors name is accepted",
                    hint="this index points outside its own folder: do not use this checkpoint",
                )
            checked.add(file)
    return mapping
