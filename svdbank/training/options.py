"""What a training run is asked for: one flat set of options, the same on the command line, in Python and in a TOML file."""

from __future__ import annotations

import difflib
import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec

from svdbank.core.errors import OptionError
from svdbank.core.specs import Struct
from svdbank.lm.loading import Dtype, LoadIn

TrainMethod = Literal["mica", "milora", "pissa", "lora"]

#: Which state of the factors a run writes.
Keep = Literal["best", "last"]

_CHOICES = {
    "method": get_args(TrainMethod),
    "dtype": get_args(Dtype),
    "load_in": (None, *get_args(LoadIn)),
    "keep": get_args(Keep),
}

#: Peak learning rates where none is given and none can be found, the factors lying in pieces on several devices.
RATES = {"mica": 2e-3, "milora": 3e-4, "pissa": 3e-4, "lora": 5e-4}

#: Fields that may be written as one string where there is only one.
_LISTS = ("data", "retain", "targets", "on_top_of")


class TrainOptions(Struct, frozen=True, kw_only=True):
    """Options of ``train``. The recipe's defaults are those of the MiCA paper (arXiv 2604.01694), except where said.

    Attributes
    ----------
    model
        Folder or ``org/name[@revision]`` of a causal language model.
    output
        Adapter folder to write.
    data
        Files, folders or Hub datasets to train on.
    bank
        Bank folder; without one, the model's bank in the cache. ``lora`` needs none.
    method
        ``mica``, ``milora``, ``pissa``, or ``lora``: PEFT's ordinary one, for comparison.
    rank, alpha, rslora, dropout, targets
        As in ``init``; ``alpha`` is the rank where it is not given, so that the scale is 1.
    on_top_of
        Adapters, folders or ``org/name[@revision]`` on the Hub, that lie frozen under the new one. It takes the next free band of the bank.
    field, split, streaming
        Column of text in tables; split of Hub datasets; read on the fly instead of into the cache (needs ``steps``).
    length
        Tokens of a block. 1024, or what the model takes where that is less.
    packing
        Attention and positions begin anew at each document inside a block (TRL's name; axolotl's is ``sample_packing``).
    batch_size, accumulation
        Blocks a device computes at a time, and such batches a step.
    epochs, steps
        How often the data is gone through, or, where given, how many steps are made.
    learning_rate, schedule, warmup, weight_decay, clip
        AdamW's peak rate (found at the start where not given), Transformers' name of the schedule, share of the steps that warm up,
        decoupled weight decay, norm that gradients are clipped to.
    dtype, load_in, gradient_checkpointing
        dtype of the base and of the computation (``auto``: bfloat16 on a GPU, else float32), ``4bit`` or ``8bit`` by bitsandbytes,
        activations computed again in the backward pass.
    held_out, held_out_blocks
        Share of the documents that are not trained on, and how many blocks of them are measured at most: 16 to 64, as many as the length
        of the run allows, where not given.
    keep
        Which state is written: the ``best`` by loss on the text held out, the start included, or the ``last``.
    patience
        The run ends after so many measurements in a row without a new best one.
    retain
        Other text whose loss is measured before and after: forgetting.
    save_steps, save_minutes
        A checkpoint every so many steps or minutes, whichever is given.
    log_steps
        Steps whose mean loss is one point of the curve.
    seed
        Of the split, the order of blocks, dropout and the initialisation of ``lora``.
    """

    model: str
    output: str
    data: tuple[str, ...]
    bank: str | None = None
    method: TrainMethod = "mica"
    rank: int = 16
    alpha: float | None = None
    rslora: bool = False
    dropout: float = 0.05
    targets: tuple[str, ...] = ("all-linear",)
    on_top_of: tuple[str, ...] = ()
    field: str = "text"
    split: str = "train"
    streaming: bool = False
    length: int | None = None
    packing: bool = False
    batch_size: int = 4
    accumulation: int = 1
    epochs: float = 1.0
    steps: int | None = None
    learning_rate: float | None = None
    schedule: str = "cosine"
    warmup: float = 0.1
    weight_decay: float = 0.01
    clip: float = 0.3
    dtype: Dtype = "auto"
    load_in: LoadIn | None = None
    gradient_checkpointing: bool = False
    held_out: float = 0.05
    held_out_blocks: int | None = None
    keep: Keep = "best"
    patience: int | None = None
    retain: tuple[str, ...] = ()
    save_steps: int | None = None
    save_minutes: float | None = 10.0
    log_steps: int = 10
    seed: int = 0


NAMES = tuple(field.name for field in msgspec.structs.fields(TrainOptions))


def resolve(config: Mapping[str, Any], given: Mapping[str, Any]) -> TrainOptions:
    """Options from a configuration, overridden by what was given by hand, checked. Raises :class:`OptionError`."""
    values = {**config, **given}
    refuse_unknown(values, "options")
    for name in ("model", "output", "data"):
        if not values.get(name):
            raise OptionError(
                f"no {name} was named", hint={"output": "-o ADAPTER", "data": "--data FILE"}.get(name, "svdbank train MODEL …")
            )
    for name in _LISTS:
        if isinstance(values.get(name), str | Path):
            values[name] = (str(values[name]),)
        elif isinstance(values.get(name), Sequence):
            values[name] = tuple(str(value) if isinstance(value, Path) else value for value in values[name])
    for name in ("model", "output", "bank"):
        if isinstance(values.get(name), Path):
            values[name] = str(values[name])
    for name, choices in _CHOICES.items():
        if name in values and values[name] not in choices:
            raise OptionError(f"{name} is one of {', '.join(map(str, choices))}, not {values[name]!r}")
    try:
        options = msgspec.convert(values, TrainOptions, strict=True)
    except msgspec.ValidationError as cause:
        raise OptionError(f"options of the training: {cause}") from cause
    _check(options)
    return options


def settled(options: TrainOptions, *, length: int, dtype: Dtype) -> TrainOptions:
    """The options with nothing left to be chosen before training begins: the block's tokens and the dtype as given here, alpha."""
    return msgspec.structs.replace(
        options,
        length=length,
        alpha=float(options.rank) if options.alpha is None else options.alpha,
        dtype=dtype,
    )


def read_config(path: str | Path) -> dict[str, Any]:
    """A flat TOML file as options. Raises :class:`OptionError` for one that cannot be read, holds tables or unknown names."""
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as cause:
        raise OptionError(f"{path}: {cause.strerror}", hint="check the path of --config") from cause
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as cause:
        raise OptionError(f"{path}: not a TOML file: {cause}") from cause
    values = {name.replace("-", "_"): value for name, value in values.items()}
    refuse_unknown(values, str(path))
    return values


def refuse_unknown(values: Mapping[str, Any], where: str) -> None:
    """Raises :class:`OptionError` for a name that is no option, with the nearest one that is."""
    for name in values:
        if name not in NAMES:
            near = difflib.get_close_matches(name, NAMES, n=1)
            raise OptionError(
                f"{where}: there is no option {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""),
                hint="the options are " + ", ".join(NAMES),
            )


def to_toml(options: TrainOptions) -> bytes:
    """The options as a flat TOML file that :func:`read_config` reads back; what is not set is left out."""
    values = msgspec.structs.asdict(options)
    lines = [f"{name} = {_toml(value)}" for name, value in values.items() if value is not None]
    return ("\n".join(lines) + "\n").encode()


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)


def _check(options: TrainOptions) -> None:
    """Refuse values that cannot be meant."""
    least = {
        "rank": 1,
        "batch_size": 1,
        "accumulation": 1,
        "held_out_blocks": 1,
        "patience": 1,
        "log_steps": 1,
        "steps": 1,
        "save_steps": 1,
    }
    for name, bound in least.items():
        value = getattr(options, name)
        if value is not None and value < bound:
            raise OptionError(f"{name} is {bound} or more, not {value}")
    for name in ("epochs", "save_minutes", "alpha", "learning_rate"):
        value = getattr(options, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise OptionError(f"{name} is a positive number, not {value}")
    for name in ("dropout", "warmup", "held_out"):
        value = getattr(options, name)
        if not 0 <= value < 1:
            raise OptionError(f"{name} is at least 0 and below 1, not {value}")
    for name in ("weight_decay", "clip"):
        value = getattr(options, name)
        if not (math.isfinite(value) and value >= 0):
            raise OptionError(f"{name} is 0 or more, not {value}")
    if not 0 <= options.seed < 2**32:
        raise OptionError(f"seed is at least 0 and below 2**32, not {options.seed}")
    if options.streaming and options.steps is None:
        raise OptionError("streamed data has no known length, so the number of steps has to be said", hint="--steps N")
    if options.patience is not None and options.held_out == 0:
        raise OptionError("patience waits for the text held out to improve, and none is held out", hint="--held-out 0.05")
    if options.on_top_of and options.method != "mica":
        raise OptionError(
            f"--on-top-of gives the new adapter a band of the bank of its own, which {options.method} does not have",
            hint="--method mica",
        )
