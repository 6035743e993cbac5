"""``init``: a fresh adapter folder from a bank, by lookup."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from svdbank.adapter.base import base_of, is_bank, task_of
from svdbank.adapter.components import Band
from svdbank.adapter.experts import join, wrapper_paths
from svdbank.adapter.folder import Factors, check_output, write_folder
from svdbank.adapter.methods import METHODS, RESIDUAL_METHODS, Method, count_floored, initial_factors, lora_scale, mica_factors
from svdbank.adapter.settings import AdapterCache, LoraSettings
from svdbank.bank.reading import Bank
from svdbank.cache import opened
from svdbank.checkpoint.naming.targets import ALL_LINEAR
from svdbank.core.errors import OptionError
from svdbank.core.specs import ProgressCallback, Struct
from svdbank.initialisation.allocation import next_bands, ranks_within
from svdbank.initialisation.residual import write_residual
from svdbank.initialisation.selection import selected
from svdbank.peft.lookup import check_rank, check_sides

if TYPE_CHECKING:
    from svdbank.adapter.model import Adapter

#: Rank where none is asked for.
RANK = 16


class InitReport(Struct, frozen=True):
    """What ``init`` wrote: the folder, where its bases came from, and its size. As text it is the folder.

    Attributes
    ----------
    rank
        Largest rank of any weight; ``ranks`` has each, by name in the bank.
    band
        Hull of the bands, 0 = the most minor direction; None for ``pissa``, which stands at the other end.
    floored
        Singular values that MiLoRA or PiSSA raised to the floor, because a factor of zero would never learn.
    residual
        Folder of the base without the adapter's start, where it was written.
    residual_rounding
        What rounding that base to its dtype lost, ``‖fl(W') − W'‖ / ‖W‖`` in the Frobenius norm, the largest of all weights.
    notes
        What to know before using it.
    """

    adapter: str
    bank: str
    base: str
    method: str
    rank: int
    weights: int
    trainable_parameters: int
    ranks: dict[str, int]
    band: Band | None = None
    floored: int = 0
    residual: str | None = None
    residual_rounding: float = 0.0
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.adapter


def init(
    model_or_bank: str | Path | Bank,
    *,
    output: str | Path,
    rank: int | None = None,
    method: str = "mica",
    alpha: float | None = None,
    targets: str | Sequence[str] = (ALL_LINEAR,),
    exclude: str | Sequence[str] = (),
    layers: Sequence[int] = (),
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    params: int | None = None,
    band: Band | str | None = None,
    beside: Sequence[str | Path | Adapter] = (),
    residual_out: str | Path | None = None,
    dropout: float = 0.0,
    rslora: bool = False,
    base_model: str | None = None,
    task_type: str | None = None,
    force: bool = False,
    progress: ProgressCallback | None = None,
) -> InitReport:
    """Write a fresh adapter as a PEFT folder; :func:`svdbank.adapter.reading.read_adapter` reads it back.

    Parameters
    ----------
    model_or_bank
        A bank, its folder, or a model whose bank is in the cache.
    output
        Folder to write. It appears whole or not at all.
    rank
        Of every weight, 16 by default. Above what a weight allows or the bank stores, it is an error.
    method
        ``mica`` (arXiv 2604.01694): ``B = U[:, -rank:]``, frozen in training; ``A = 0``, trained. ``milora`` (NAACL 2025) and
        ``pissa`` (NeurIPS 2024): both factors start from the smallest or largest triplets and train; the adapter belongs to the
        *residual* base ``W − s B A``, which ``residual_out`` writes and ``svdbank.peft`` makes in memory.
    alpha
        LoRA's α for every weight; by default each weight's rank, so that the scale α/r is 1.
    targets, exclude, layers
        Which weights: PEFT's language (names that match the end of a module path, ``all-linear``, or one regular expression); what
        to leave out of them in the same language; numbers of layers, all by default.
    rank_pattern, alpha_pattern
        Other ranks and alphas by module, as in PEFT: the first pattern that matches the end of a path counts.
    params
        Choose ranks so that at most that many parameters train; see :func:`svdbank.initialisation.allocation.ranks_within`.
    band
        ``(i, j)`` or ``"i:j"``: minor directions [i, j) instead of [0, rank). ``"auto"``: the next band that ``beside`` leaves free.
    beside
        Adapters (or their folders) whose bands stay free, for ``band="auto"``, which they imply.
    residual_out
        Folder for the residual base of MiLoRA or PiSSA as a checkpoint: summed in float32, rounded once to the base's dtype.
    dropout, rslora
        As PEFT's ``lora_dropout``, ``use_rslora``.
    base_model
        What the adapter records as its base, by default the full path of a model's folder, else the name in the bank; the residual
        where that is written. Where ``model_or_bank`` is a bank, ``residual_out`` reads the weights from here.
    task_type
        As PEFT's; by default what the model's ``config.json`` plainly says, where it is on this machine.
    force
        Replace an adapter folder that is already at ``output``.

    Raises :class:`OptionError` for targets that match nothing, options that cannot be meant, or an output in use; :class:`BankError`
    for a rank or side that the bank lacks; :class:`WrongBaseError` where the base to make a residual of is not the bank's.
    """
    chosen = _checked(method, alpha, dropout, residual_out)
    path = Path(output).expanduser().resolve()
    check_output(path, force=force)
    bank = opened(model_or_bank)
    check_sides(bank, chosen)
    names = selected(bank, targets, exclude, layers)
    bands = _bands(bank, names, chosen, rank, rank_pattern or {}, params, band, beside)
    for name, (start, stop) in bands.items():
        if start == 0:
            check_rank(bank, name, stop, method=chosen)
    ranks = {name: stop - start for name, (start, stop) in bands.items()}
    keys = {name: _key(bank, name) for name in names}
    paths = {name: bank[name].module for name in names}
    alphas = _alphas(paths, ranks, alpha, alpha_pattern or {})
    scales = {name: lora_scale(ranks[name], alphas[name], rslora=rslora) for name in names}
    factors, floored = _factors(bank, bands, scales, chosen)
    rounding, residual = 0.0, None
    if residual_out is not None:
        residual = Path(residual_out).expanduser()
        source = base_model if isinstance(model_or_bank, Bank) or is_bank(model_or_bank) else model_or_bank
        rounding = write_residual(bank, source, residual, factors, scales, progress)
    base, revision = base_of(model_or_bank, bank)
    recorded = str(residual) if residual is not None else base_model or base
    settings = LoraSettings(
        task_type=task_type or task_of([*([(base_model, None)] if base_model else []), (base, revision)]),
        base_model_name_or_path=recorded,
        revision=None if base_model or residual is not None else revision,
        lora_dropout=dropout,
        use_rslora=rslora,
        # PEFT refuses "milora" and takes "pissa" out of the base itself; on the residual these are ordinary factors.
        init_lora_weights=chosen if residual is None else True,
        inference_mode=False,
        **_shape(bank, names, ranks, alphas),
    )
    cache = AdapterCache(
        format=1,
        method=chosen,
        band=(0, 0) if chosen == "pissa" else (min(b[0] for b in bands.values()), max(b[1] for b in bands.values())),
        rank=max(ranks.values()),
        base=base,
        base_digest=bank.base_digest(names),
        bank_format=bank.manifest.format,
        weights=names,
        sources={keys[name]: (name, bank[name].source_sha256) for name in names},
        components={path.name: {keys[name]: (bands[name],) if chosen == "mica" else () for name in names}},
    )
    write_folder(path, settings, _as_peft(bank, names, factors), cache, force=force)
    trained = sum(A.numel() + (B.numel() if chosen in RESIDUAL_METHODS else 0) for A, B in factors.values())
    return InitReport(
        adapter=str(output),
        bank=str(bank.path),
        base=recorded,
        method=chosen,
        rank=max(ranks.values()),
        weights=len(names),
        trainable_parameters=trained,
        ranks=ranks,
        band=None if chosen == "pissa" else cache.band,
        floored=floored,
        residual=None if residual is None else str(residual),
        residual_rounding=rounding,
        notes=tuple(_notes(bank, names, chosen, floored, residual)),
    )


def _checked(method: str, alpha: float | None, dropout: float, residual_out: object) -> Method:
    if method.lower() not in METHODS:
        raise OptionError(f"{method!r} is not a method of this version: {', '.join(METHODS)}", hint="--method mica")
    if alpha is not None and not (math.isfinite(alpha) and alpha > 0):
        raise OptionError(f"alpha is a positive number, not {alpha}")
    if not 0 <= dropout < 1:
        raise OptionError(f"dropout is at least 0 and below 1, not {dropout}")
    chosen = cast("Method", method.lower())
    if residual_out is not None and chosen not in RESIDUAL_METHODS:
        raise OptionError(f"{chosen} leaves the base as it is: there is no residual to write", hint="leave --residual-out out")
    return chosen


def _bands(
    bank: Bank,
    names: Sequence[str],
    method: Method,
    rank: int | None,
    pattern: Mapping[str, int],
    params: int | None,
    band: Band | str | None,
    beside: Sequence[str | Path | Adapter],
) -> dict[str, Band]:
    """The half-open band of minor indices of each weight; for ``pissa`` [0, rank) counts from the largest."""
    if params is not None and (rank is not None or pattern):
        raise OptionError("params chooses the ranks; a rank or a rank pattern beside it cannot be meant", hint="leave one out")
    automatic = band == "auto" or (band is None and bool(beside))
    if method in RESIDUAL_METHODS and (automatic or band is not None):
        raise OptionError(
            f"{method} trains both factors and keeps to no band; bands are MiCA's", hint="leave --band and --beside out"
        )
    fixed = None if automatic or band is None else _parsed(band)
    if fixed is not None and beside:
        raise OptionError("a band given and adapters to stay beside contradict each other", hint="--band auto")
    if fixed is not None and rank is not None and rank != fixed[1] - fixed[0]:
        raise OptionError(f"rank {rank} and band {fixed[0]}:{fixed[1]} contradict each other", hint="leave --rank out")
    others = [_adapter(other, bank) for other in beside]
    if params is not None:
        starts = dict.fromkeys(names, fixed[0]) if fixed is not None else {}
        if automatic:
            starts = {name: start for name, (start, _) in next_bands(bank, dict.fromkeys(names, 1), others).items()}
        ranks = ranks_within(bank, names, params, method, starts)
    else:
        common = RANK if rank is None else rank
        ranks = _by_pattern(bank, names, fixed[1] - fixed[0] if fixed is not None else common, pattern)
    if automatic:
        for name, own in ranks.items():
            check_rank(bank, name, own, method=method)
        return next_bands(bank, ranks, others)
    start = fixed[0] if fixed is not None else 0
    if start:
        for name, own in ranks.items():
            check_rank(bank, name, start + own, method=method)
    return {name: (start, start + own) for name, own in ranks.items()}


def _parsed(band: Band | str) -> Band:
    if isinstance(band, str):
        match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", band)
        if match is None:
            raise OptionError(f"{band!r} is no band", hint="--band 16:32 for minor directions 16 to 31, or --band auto")
        band = (int(match[1]), int(match[2]))
    if not 0 <= band[0] < band[1]:
        raise OptionError(f"band {band[0]}:{band[1]} is empty", hint="--band 16:32 for minor directions 16 to 31")
    return band


def _adapter(other: str | Path | Adapter, bank: Bank) -> Adapter:
    from svdbank.adapter.model import Adapter
    from svdbank.adapter.reading import read_adapter

    return other if isinstance(other, Adapter) else read_adapter(other, bank=bank)


def _by_pattern(bank: Bank, names: Iterable[str], default: int, pattern: Mapping[str, int]) -> dict[str, int]:
    paths = {name: bank[name].module for name in names}
    _check_patterns(pattern, paths.values(), "rank")
    return {name: int(_matching(pattern, path, default)) for name, path in paths.items()}


def _alphas(
    paths: Mapping[str, str], ranks: Mapping[str, int], alpha: float | None, pattern: Mapping[str, float]
) -> dict[str, float]:
    _check_patterns(pattern, paths.values(), "alpha")
    return {name: _matching(pattern, path, ranks[name] if alpha is None else alpha) for name, path in paths.items()}


def _check_patterns(pattern: Mapping[str, float], paths: Iterable[str], what: str) -> None:
    modules = list(paths)
    for own, value in pattern.items():
        if not (math.isfinite(value) and value > 0):
            raise OptionError(f"{what} pattern {own}={value}: a positive number is needed")
        try:
            expression = re.compile(rf"(.*\.)?({own})$")
        except re.error as cause:
            raise OptionError(f"{what} pattern {own!r} is not a regular expression: {cause}") from cause
        if not any(expression.match(module) for module in modules):
            raise OptionError(f"{what} pattern {own!r} matches none of the adapted modules")


def _matching(pattern: Mapping[str, float], path: str, default: float) -> float:
    """PEFT's rule (``get_pattern_key``): the first pattern that matches the end of the path, at a dot."""
    return next((value for own, value in pattern.items() if re.match(rf"(.*\.)?({own})$", path)), default)


def _key(bank: Bank, name: str) -> str:
    return name if bank[name].stacked else bank[name].module


def _factors(
    bank: Bank, bands: Mapping[str, Band], scales: Mapping[str, float], method: Method
) -> tuple[dict[str, tuple[Tensor, Tensor]], int]:
    """A (r, in) and B (out, r) of each weight, float32, and how many singular values were floored; one bulk read a rank."""
    by_stop: dict[int, list[str]] = {}
    for name, (_, stop) in bands.items():
        by_stop.setdefault(stop, []).append(name)
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    floored = 0
    for stop, names in by_stop.items():
        if method == "mica":
            lefts = bank.left(names, stop)
            for name in names:
                # PEFT's order: the last column is index 0, so a band [i, j) of [0, j) is the first j − i columns.
                columns = lefts[name][:, : stop - bands[name][0]]
                factors[name] = mica_factors(columns, bank[name].in_features)
            continue
        pissa = method == "pissa"
        lefts = (bank.principal_left if pissa else bank.left)(names, stop)
        rights = (bank.principal_right if pissa else bank.right)(names, stop)
        sigmas = (bank.principal_sigma if pissa else bank.sigma)(names, stop)
        for name in names:
            own = slice(0, stop - bands[name][0])
            sigma, largest = sigmas[name][own], bank[name].certificate.sigma_max
            factors[name] = initial_factors(
                method, lefts[name][:, own], sigma, rights[name][:, own], scales[name], sigma_max=largest
            )
            floored += count_floored(sigma, largest)
    return {name: factors[name] for name in bands}, floored


def _shape(bank: Bank, names: Sequence[str], ranks: Mapping[str, int], alphas: Mapping[str, float]) -> dict[str, Any]:
    """The fields of a config that follow from ranks and alphas: the common ones, and patterns for the others."""
    of_path = {bank[name].module: (ranks[name], alphas[name]) for name in names}
    pairs = list(of_path.values())
    rank, alpha = max(dict.fromkeys(pairs), key=pairs.count)
    parameters = sorted({bank[name].module for name in names if bank[name].stacked})
    return {
        "r": rank,
        "lora_alpha": _plain(alpha),
        "rank_pattern": {path: r for path, (r, _) in of_path.items() if r != rank},
        "alpha_pattern": {path: _plain(a) for path, (_, a) in of_path.items() if a != alpha},
        "target_modules": [path for path in of_path if path not in set(parameters)],
        "target_parameters": parameters or None,
    }


def _plain(alpha: float) -> int | float:
    return int(alpha) if float(alpha).is_integer() else alpha


def _as_peft(bank: Bank, names: Sequence[str], factors: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Factors]:
    """Factors by PEFT's module paths, experts stacked in their order."""
    stacked: dict[str, list[str]] = {}
    found: dict[str, Factors] = {}
    for name in names:
        basis = bank[name]
        if basis.stacked:
            stacked.setdefault(basis.module, []).append(name)
        else:
            found[basis.module] = Factors(*factors[name], embedding=basis.kind == "embedding")
    paths = wrapper_paths(list(stacked))
    for parameter, members in stacked.items():
        members.sort(key=lambda name: bank[name].record.expert or 0)
        found[paths[parameter]] = Factors(*join([factors[name] for name in members]))
    return found


#: What plain PEFT does with a folder whose config names the method.
_BY_PEFT = {"milora": "refuses it", "pissa": "runs one SVD a weight to load it"}


def _notes(bank: Bank, names: Sequence[str], method: Method, floored: int, residual: Path | None) -> Iterable[str]:
    if method in RESIDUAL_METHODS and residual is None:
        yield (
            "this adapter belongs to W − s·B·A, not to the base itself: load it with svdbank.peft.load_adapter and the bank, "
            f"or write that base with --residual-out; PEFT alone {_BY_PEFT[method]}"
        )
    if floored:
        yield f"{floored} singular values are zero to rounding and were raised to 1e-6 of the largest, or they would never learn"
    if method == "mica" and any(bank[name].stacked for name in names):
        yield "PEFT itself refuses MiCA on experts: load it with svdbank.peft.load_adapter"
