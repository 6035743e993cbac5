"""What wrappers around a model (torch.compile, DDP, FSDP, checkpointed activations) leave in the names of its tensors."""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Collection, Mapping
from typing import Any

from svdbank.core.errors import CheckpointError

#: Parts of names that only wrappers write.
PARTS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

_INSIDE = re.compile(rf"(?<![^.])({'|'.join(PARTS)})\.")
_LEADING = re.compile(r"(module\.)+")

#: The same for Transformers' ``key_mapping``, which replaces each once a name.
_ONCE = (*(rf"{part}\." for part in PARTS), r"^module\.")


def unwrapped(name: str) -> str:
    """A name without what wrappers added; ``module`` is theirs at the beginning alone."""
    inner = _INSIDE.sub("", name)
    leading = _LEADING.match(inner)
    return inner if leading is None else inner[leading.end() :]


def refuse_wrapped(names: Collection[str], config: Mapping[str, Any], where: str) -> None:
    """Raise :class:`CheckpointError` for a checkpoint with names of wrappers: no model class finds its tensors under them.

    Transformers loads such a model with random weights, and what is decomposed under such names fits no model.
    """
    every = bool(names) and all(name.startswith("module.") for name in names)
    wrapped = next((name for name in names if every or _INSIDE.search(name)), None)
    if wrapped is None:
        return
    raise CheckpointError(
        f"{where}: {wrapped!r} is a name that a wrapper (torch.compile, DDP, FSDP) gave the tensor; in the model it is "
        f"{unwrapped(wrapped)!r}, and Transformers does not find it",
        hint=_renaming(names, config, where),
    )


def _renaming(names: Collection[str], config: Mapping[str, Any], where: str) -> str:
    """The shell command that saves the model under its own names, where Transformers has the class and no wrapper is there twice."""
    kinds = config.get("architectures")
    kind = kinds[0] if isinstance(kinds, list) and kinds and isinstance(kinds[0], str) and kinds[0].isidentifier() else None
    used = [pattern for pattern in _ONCE if any(re.search(pattern, name) for name in names)]
    once = {name: functools.reduce(lambda left, pattern: re.sub(pattern, "", left, count=1), used, name) for name in names}
    if kind is None or any(plain != unwrapped(name) for name, plain in once.items()):
        return "save the state dict of the model inside the wrapper: unwrapped_model.save_pretrained(FOLDER)"
    target = where.rstrip("/").rsplit("/", 1)[-1].split("@")[0] + "-unwrapped"
    program = (
        f"from transformers import {kind} as M; "
        f"M.from_pretrained({where!r}, dtype='auto', key_mapping={dict.fromkeys(used, '')})"
        f".save_pretrained({target!r}, save_original_format=False)"
    )
    return f"python -c {shlex.quote(program)}"
