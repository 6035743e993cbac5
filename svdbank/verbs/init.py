"""``init``: a fresh adapter folder from a bank, by lookup."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from svdbank.adapter.base import base_of, facts_of, is_bank, task_of
from svdbank.adapter.components import Band
from svdbank.adapter.folder import check_output
from svdbank.adapter.methods import lora_scale
from svdbank.adapter.model import Adapter
from svdbank.adapter.settings import LoraSettings
from svdbank.adapter.starting import Start, check_sides, starting_factors
from svdbank.bank.reading import Bank
from svdbank.checkpoint.naming.targets import ALL_LINEAR
from svdbank.core.folders import output_folder
from svdbank.core.specs import ProgressCallback, Struct
from svdbank.initialisation.allocation import adapters_of, allocate, stops
from svdbank.initialisation.configuration import alphas_by_pattern, checked_method, shape_fields
from svdbank.initialisation.residual import write_residual
from svdbank.initialisation.selection import adaptable, selected
from svdbank.initialisation.writing import in_config, notes_on, trainable_parameters, write_fresh
from svdbank.sharing.finding import opened
from svdbank.verbs.pull import pulled


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
    left_out
        Names in the bank of weights that ``all-linear`` selects, with fewer directions than the rank, or experts of Llama-4.
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
    left_out: tuple[str, ...] = ()
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
    pull: str | None = None,
    find: bool = True,
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
        Of every weight, 16 by default. Above what the bank stores it is an error, and so is one above what a weight allows that is
        named; what only ``all-linear`` selects is then left out.
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
    pull, find
        A bank on the Hub, ``org/name``, to bring into the cache for the model first. Without one, and without a bank in the cache, the
        error says which could be pulled, as the Hub knows by one request; ``find=False`` asks nothing.

    Raises :class:`OptionError` for targets that match nothing, options that cannot be meant, or an output in use; :class:`BankError`
    for a rank or side that the bank lacks; :class:`WrongBaseError` where the base to make a residual of is not the bank's.
    """
    chosen = checked_method(method, alpha, dropout, residual_out)
    path = output_folder(output)
    check_output(path, force=force)
    bank = opened(model_or_bank, find=find) if pull is None else pulled(model_or_bank, pull, progress)
    check_sides(bank, chosen)
    base, revision = base_of(model_or_bank, bank)
    about = facts_of([*([(base_model, None)] if base_model else []), (base, revision)])
    names, others = selected(bank, targets, exclude, layers), adapters_of(beside, bank)
    needed = stops(bank, names, rank, band, others) if params is None else {}
    model_type = about.model_type if about is not None else ""
    found = adaptable(bank, names, targets, model_type, stops=needed, pattern=rank_pattern or {})
    names = found.names
    bands = allocate(bank, names, chosen, rank=rank, pattern=rank_pattern, params=params, band=band, beside=others)
    ranks = {name: stop - start for name, (start, stop) in bands.items()}
    alphas = alphas_by_pattern(bank, ranks, alpha, alpha_pattern or {})
    scales = {name: lora_scale(ranks[name], alphas[name], rslora=rslora) for name in names}
    pairs, floored = starting_factors(bank, [Start(name, bands[name], scales[name]) for name in names], chosen)
    factors = dict(zip(names, pairs, strict=True))
    rounding, residual = 0.0, None
    if residual_out is not None:
        residual = Path(residual_out).expanduser()
        source = base_model if isinstance(model_or_bank, Bank) or is_bank(model_or_bank) else model_or_bank
        rounding = write_residual(bank, source, residual, factors, scales, progress)
    named = str(residual) if residual is not None else base_model or base
    settings = LoraSettings(
        task_type=task_type or task_of(about),
        base_model_name_or_path=named,
        revision=None if base_model or residual is not None else revision,
        lora_dropout=dropout,
        use_rslora=rslora,
        # PEFT refuses "milora" and takes "pissa" out of the base itself; on the residual these are ordinary factors.
        init_lora_weights=in_config(bank, names, chosen) if residual is None else True,
        inference_mode=False,
        **shape_fields(bank, names, ranks, alphas, dropout=dropout),
    )
    record = write_fresh(path, settings, bank, bands, factors, chosen, base, force=force)
    return InitReport(
        adapter=str(output),
        bank=bank.place,
        base=named,
        method=chosen,
        rank=record.rank,
        weights=len(names),
        trainable_parameters=trainable_parameters(factors, chosen),
        ranks=ranks,
        band=None if chosen == "pissa" else record.band,
        floored=floored,
        residual=None if residual is None else str(residual),
        residual_rounding=rounding,
        left_out=found.left_out,
        notes=(*notes_on(settings, chosen, floored, residual), *found.notes),
    )
