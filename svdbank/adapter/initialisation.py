"""``init``: a fresh adapter folder from a bank, by lookup."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from svdbank.adapter.attachment import check_rank, read_left
from svdbank.adapter.folder import AdapterCache, Factors, LoraSettings, check_output, write_folder
from svdbank.bank.reading import Bank
from svdbank.checkpoint.targets import ALL_LINEAR, parse_targets
from svdbank.errors import OptionError
from svdbank.specs import Struct

METHODS = ("mica",)


class InitReport(Struct, frozen=True):
    """What ``init`` wrote: the folder, where its bases came from, and its size. As text it is the folder."""

    adapter: str
    bank: str
    base: str
    method: str
    rank: int
    weights: int
    trainable_parameters: int

    def __str__(self) -> str:
        return self.adapter


def init(
    model_or_bank: str | Path | Bank,
    *,
    output: str | Path,
    rank: int = 16,
    method: str = "mica",
    alpha: float | None = None,
    targets: str | Sequence[str] = (ALL_LINEAR,),
    dropout: float = 0.0,
    rslora: bool = False,
    base_model: str | None = None,
    task_type: str | None = None,
    force: bool = False,
) -> InitReport:
    """Write a fresh adapter as a PEFT folder; :func:`svdbank.adapter.folder.read_folder` reads it back.

    Parameters
    ----------
    model_or_bank
        A bank, its folder, or a model whose bank is in the cache.
    output
        Folder to write. It appears whole or not at all.
    rank
        Of every weight. Above what a weight allows or the bank stores, it is an error.
    method
        ``mica`` (arXiv 2604.01694): ``B = U[:, -rank:]``, frozen in training; ``A = 0``, trained.
    alpha
        LoRA's α; by default the rank, so that the scale α/r is 1.
    targets
        PEFT's language: names that match the end of a module path, ``all-linear``, or one regular expression.
    dropout, rslora, task_type
        As PEFT's ``lora_dropout``, ``use_rslora``, ``task_type``.
    base_model
        What the adapter records as its base; by default the name in the bank.
    force
        Replace an adapter folder that is already at ``output``.

    Raises :class:`OptionError` for targets that match nothing, an unknown method, a rank above ``min(out, in)`` or an output in
    use; :class:`BankError` for a rank above the bank's.
    """
    if method.lower() not in METHODS:
        raise OptionError(f"{method!r} is not a method of this version: {', '.join(METHODS)}", hint="--method mica")
    if alpha is not None and not (math.isfinite(alpha) and alpha > 0):
        raise OptionError(f"alpha is a positive number, not {alpha}")
    if not 0 <= dropout < 1:
        raise OptionError(f"dropout is at least 0 and below 1, not {dropout}")
    path = Path(output).expanduser().resolve()
    check_output(path, force=force)
    bank = model_or_bank if isinstance(model_or_bank, Bank) else _opened(model_or_bank)
    names = _selected(bank, targets)
    for name in names:
        check_rank(bank, name, rank)
    factors = {}
    for name, left in zip(names, read_left(bank, names, [rank] * len(names)), strict=True):
        basis = bank[name]
        zero = torch.zeros(rank, basis.in_features, dtype=torch.float32)
        # float32 whatever the bank stores: PEFT trains adapters in float32 and would cast on load.
        factors[basis.module] = Factors(A=zero, B=left.float(), embedding=basis.kind == "embedding")
    base = bank.manifest.base
    settings = LoraSettings(
        task_type=task_type,
        base_model_name_or_path=base_model or base.name,
        revision=None if base_model else base.revision,
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        lora_dropout=dropout,
        use_rslora=rslora,
        target_modules=list(factors),
        init_lora_weights="mica",
        inference_mode=False,
    )
    cache = AdapterCache(
        format=1,
        method="mica",
        band=(0, rank),
        rank=rank,
        base=base.name,
        base_digest=bank.base_digest(names),
        bank_format=bank.manifest.format,
        weights=names,
    )
    write_folder(path, settings, factors, cache, force=force)
    return InitReport(
        adapter=str(output),
        bank=str(bank.path),
        base=settings.base_model_name_or_path or base.name,
        method="mica",
        rank=rank,
        weights=len(names),
        trainable_parameters=sum(pair.A.numel() for pair in factors.values()),
    )


def _opened(model_or_bank: str | Path) -> Bank:
    import svdbank

    bank: Bank = svdbank.open(model_or_bank)
    return bank


def _selected(bank: Bank, targets: str | Sequence[str]) -> tuple[str, ...]:
    """Names of the bank's weights that the targets select; a target that matches nothing is an error."""
    wanted = parse_targets(targets)
    chosen = tuple(
        name for name in bank.names if (wanted.all_linear and bank[name].kind == "linear") or wanted.named(bank[name].module)
    )
    modules = [bank[name].module for name in chosen]
    silent = [name for name in wanted.names if not any(m == name or m.endswith("." + name) for m in modules)]
    if silent or not chosen:
        held = sorted({bank[name].module.rpartition(".")[2] for name in bank.names})
        shown = silent or ([targets] if isinstance(targets, str) else list(targets))
        raise OptionError(
            f"{bank.path}: {', '.join(map(repr, shown))} matches no weight of this bank, which holds {', '.join(held)}",
            hint="svdbank build MODEL " + " ".join(f"--targets {name}" for name in shown) + " extends the bank",
        )
    return chosen
