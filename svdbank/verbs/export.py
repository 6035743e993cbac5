"""``export``: an adapter in another form. Each conversion is exact, or says what it rounds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

import msgspec
import safetensors
import torch
from torch import Tensor

from svdbank import cache
from svdbank.adapter.card import composed_card
from svdbank.adapter.experts import join, parameters_of, wrapper_paths
from svdbank.adapter.folder import AdapterFolder, Factors, check_output, read_folder, write_folder
from svdbank.adapter.methods import RESIDUAL_METHODS, Method, restored, restored_alpha
from svdbank.adapter.model import Adapter
from svdbank.adapter.naming import bank_names
from svdbank.adapter.reading import Entry, entries_of, initial_of, made_as, read_adapter
from svdbank.adapter.settings import SLIM, WEIGHTS, AdapterCache, LoraSettings
from svdbank.adapter.slim import COEFFICIENTS, expand_slim, write_slim
from svdbank.adapter.writing import cache_of
from svdbank.bank.index import base_digest
from svdbank.bank.reading import Bank
from svdbank.core.errors import CheckpointError, OptionError
from svdbank.core.specs import Struct

Form = Literal["peft", "lora", "slim"]

#: Ranks that vLLM accepts as ``--max-lora-rank`` (``MaxLoRARanks`` in vllm/config/lora.py, 0.14); 1 is left out: older ones lack it.
SERVED_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


class ExportReport(Struct, frozen=True):
    """What was written. ``share`` is the size of its tensors over the size of those it was made from.

    ``rank`` is the largest rank of a module; ``flag`` what a vLLM server must be started with, for inference exports.
    """

    output: str
    form: str
    weights: int
    rank: int
    nbytes: int
    share: float
    flag: str | None = None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.output


def export(
    adapter: str | Path,
    *,
    to: Form = "peft",
    output: str | Path,
    bank: str | Path | Bank | None = None,
    inference: bool = False,
    method: str | None = None,
    initial: str | Path | None = None,
    force: bool = False,
) -> ExportReport:
    """Convert an adapter folder.

    Parameters
    ----------
    adapter
        A PEFT folder, or a slim one.
    to
        ``peft``: the PEFT folder of a slim one, byte for byte. ``lora``: a plain LoRA for the *unchanged* base; MiLoRA and PiSSA
        become ``[A; A₀], [B, −B₀]`` of rank 2r with α 2α (√2·α with rsLoRA). ``slim``: coefficients alone, B by reference to the bank.
    output
        Folder to write. It appears whole or not at all.
    bank
        The bank of the adapter's base: needed by ``slim``, from slim, and for MiLoRA and PiSSA unless ``initial`` is given; by
        default the cached one of the base that the adapter records.
    inference
        For serving (``peft`` and ``lora``): config ``true``, so that it loads anywhere without an SVD, every scale folded into A with
        α = r, one rank for all modules, one that vLLM allows.
    method
        What the folder was initialised as, where it does not say (PEFT drops ``svdbank.json`` when it saves).
    initial
        The fresh MiLoRA or PiSSA folder that training began from: its factors are A₀ and B₀.
    force
        Replace an adapter that is already at ``output``.

    Raises :class:`OptionError`, :class:`CheckpointError`, :class:`BankError` and :class:`WrongBaseError` as reading an adapter does.
    """
    if to not in get_args(Form):
        raise OptionError(f"{to!r} is not a form: {', '.join(get_args(Form))}", hint="--to lora")
    source, target = Path(adapter).expanduser(), Path(output).expanduser().resolve()
    check_output(target, force=force)
    opened = cache.opened(bank)
    if to == "slim":
        if inference:
            raise OptionError("a slim adapter is not for serving: it lacks B", hint="--to peft --for inference")
        record = write_slim(source, target, opened or cache.recorded_bank(source, "slim"), force=force)
        size, whole = (target / COEFFICIENTS).stat().st_size, record.size
        folder = read_folder(source)
        rank = max(pair.B.shape[1] for pair in folder.factors.values())
        full = len(folder.factors) - len(record.references)
        kept = f"{full} of {len(folder.factors)} weights are not the bank's vectors to the bit and keep their B"
        said = (kept,) if full else ()
        return ExportReport(str(output), to, len(folder.factors), rank, size, size / whole, notes=said)
    if (source / SLIM).is_file():
        if to != "peft" or inference:
            raise OptionError(
                f"{source} is slim", hint=f"first svdbank export {source} --to peft --bank BANK -o FOLDER, then that folder"
            )
        record = expand_slim(source, target, opened or cache.recorded_bank(source, "slim"), force=force)
        folder = read_folder(target)
        rank = max(pair.B.shape[1] for pair in folder.factors.values())
        return ExportReport(
            str(output), to, len(folder.factors), rank, record.size, record.size / (source / COEFFICIENTS).stat().st_size
        )
    folder = read_folder(source)
    kind = made_as(folder, method)
    notes = _other_tensors(folder)
    if inference:
        return _for_inference(folder, kind, target, output, to, opened, initial, notes, force=force)
    if to == "peft":
        raise OptionError(f"{source} is a PEFT folder already", hint="--to lora, --to slim, or --for inference")
    return _as_lora(folder, kind, target, output, opened, initial, notes, force=force)


def _as_lora(
    folder: AdapterFolder,
    kind: str,
    target: Path,
    output: str | Path,
    bank: Bank | None,
    initial: str | Path | None,
    notes: tuple[str, ...],
    *,
    force: bool,
) -> ExportReport:
    """A plain LoRA for the unchanged base, tensors kept to the bit."""
    settings, factors = folder.settings, folder.factors
    entries = list(entries_of(folder))
    if kind in RESIDUAL_METHODS:
        start = _initial(folder, entries, kind, bank, initial)
        pairs = {entry.key: restored(entry.A, entry.B, *start[entry.key]) for entry in entries}
        factors = _stacked(folder, entries, pairs)
        settings = _doubled(settings)
    base = folder.cache.base if folder.cache is not None and kind in RESIDUAL_METHODS else settings.base_model_name_or_path
    settings = msgspec.structs.replace(
        settings, init_lora_weights=True, base_model_name_or_path=base or settings.base_model_name_or_path, inference_mode=True
    )
    cache = _cache(
        folder, read_adapter(folder.path, name=None, method="lora") if kind not in RESIDUAL_METHODS else None, entries
    )
    write_folder(target, settings, factors, cache, readme=composed_card(settings, cache, ()), force=force)
    return _report(folder, target, output, "lora", max(pair.B.shape[1] for pair in factors.values()), notes)


def _for_inference(
    folder: AdapterFolder,
    kind: str,
    target: Path,
    output: str | Path,
    to: Form,
    bank: Bank | None,
    initial: str | Path | None,
    notes: tuple[str, ...],
    *,
    force: bool,
) -> ExportReport:
    """One rank, one α = r, every scale in A: right also in servers that know a single α/r."""
    entries = list(entries_of(folder))
    pairs = {entry.key: (entry.A, entry.B) for entry in entries}
    if kind in RESIDUAL_METHODS:
        start = _initial(folder, entries, kind, bank, initial)
        pairs = {entry.key: restored(entry.A, entry.B, *start[entry.key]) for entry in entries}
    largest = max(B.shape[1] for _, B in pairs.values())
    rank = next((allowed for allowed in SERVED_RANKS if allowed >= largest), None)
    if rank is None:
        raise OptionError(
            f"{folder.path}: rank {largest} is above {SERVED_RANKS[-1]}, the largest that vLLM serves",
            hint="Adapter.truncate(512) is the best approximation of that rank",
        )
    folded = {
        entry.key: _padded((pairs[entry.key][0].double() * entry.scale).float(), pairs[entry.key][1].float(), rank)
        for entry in entries
    }
    factors = _stacked(folder, entries, folded)
    parameters = sorted(set(parameters_of(folder).values()))
    base = (
        folder.cache.base if folder.cache is not None and kind in RESIDUAL_METHODS else folder.settings.base_model_name_or_path
    )
    settings = msgspec.structs.replace(
        folder.settings,
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        use_rslora=False,
        rank_pattern={},
        alpha_pattern={},
        base_model_name_or_path=base,
        target_modules=sorted({entry.key for entry in entries if entry.kind != "expert"}),
        target_parameters=parameters or None,
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        modules_to_save=None,
        init_lora_weights=True,
        inference_mode=True,
    )
    cache = msgspec.structs.replace(_cache(folder, None, entries), rank=rank)
    write_folder(target, settings, factors, cache, readme=composed_card(settings, cache, ()), force=force)
    report = _report(folder, target, output, to, rank, notes)
    return msgspec.structs.replace(report, flag=f"--max-lora-rank {rank}")


def _padded(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Rows of A and columns of B up to ``rank`` with zeros, which add nothing to B A."""
    return torch.nn.functional.pad(A, (0, 0, 0, rank - A.shape[0])), torch.nn.functional.pad(B, (0, rank - B.shape[1]))


def _stacked(folder: AdapterFolder, entries: list[Entry], pairs: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Factors]:
    """Factors by PEFT's module paths again, experts side by side."""
    experts: dict[str, list[tuple[Tensor, Tensor]]] = {}
    factors: dict[str, Factors] = {}
    for entry in entries:
        if entry.kind == "expert":
            experts.setdefault(entry.key.rpartition(".")[0], []).append(pairs[entry.key])
        else:
            factors[entry.key] = Factors(*pairs[entry.key], embedding=entry.kind == "embedding")
    paths = wrapper_paths(list(experts))
    return factors | {paths[parameter]: Factors(*join(members)) for parameter, members in experts.items()}


def _doubled(settings: LoraSettings) -> LoraSettings:
    """The same scales at twice the rank."""
    rslora = settings.use_rslora
    return msgspec.structs.replace(
        settings,
        r=2 * settings.r,
        lora_alpha=restored_alpha(settings.lora_alpha, rslora=rslora),
        rank_pattern={key: 2 * rank for key, rank in settings.rank_pattern.items()},
        alpha_pattern={key: restored_alpha(alpha, rslora=rslora) for key, alpha in settings.alpha_pattern.items()},
    )


def _initial(
    folder: AdapterFolder, entries: list[Entry], kind: str, bank: Bank | None, initial: str | Path | None
) -> dict[str, tuple[Tensor, Tensor]]:
    """A₀ and B₀ of each weight: from the fresh folder, else from the bank."""
    if initial is not None:
        start = {entry.key: (entry.A, entry.B) for entry in entries_of(read_folder(initial))}
        missing = [e.key for e in entries if e.key not in start or start[e.key][0].shape != e.A.shape]
        if missing:
            raise CheckpointError(
                f"{initial}: not what {folder.path} was trained from: {missing[0]} is missing or of another rank"
            )
        return start
    opened = bank or cache.recorded_bank(folder.path, kind)
    method: Method = "pissa" if kind == "pissa" else "milora"
    return initial_of(opened, entries, bank_names(opened, [entry.key for entry in entries]), method)


def _other_tensors(folder: AdapterFolder) -> tuple[str, ...]:
    """Refuse what training changed and a LoRA cannot say; a note for copies of embeddings that PEFT adds."""
    with safetensors.safe_open(str(folder.path / WEIGHTS), framework="pt") as file:
        others = [key for key in file.keys() if "lora_" not in key]  # noqa: SIM118 - not a mapping
    copies = [key for key in others if ".base_layer." in key]
    if len(others) > len(copies):
        raise CheckpointError(
            f"{folder.path}: holds {len(others) - len(copies)} tensors that are not LoRA factors, first "
            f"{next(key for key in others if key not in copies)}: they would be lost",
            hint="modules_to_save are whole modules: merge them into the base",
        )
    return (f"{len(copies)} copies of the base's own embeddings were left out",) if copies else ()


def _cache(folder: AdapterFolder, adapter: Adapter | None, entries: list[Entry]) -> AdapterCache:
    """``svdbank.json`` of the converted folder: the base as recorded, components in the bank where they still are."""
    if adapter is not None:
        return msgspec.structs.replace(cache_of(adapter), method="lora")
    old = folder.cache
    name = folder.path.resolve().name
    return AdapterCache(
        format=1,
        method="lora",
        band=(0, 0),
        rank=max(entry.rank for entry in entries),
        base=old.base if old is not None else folder.settings.base_model_name_or_path or "",
        base_digest=old.base_digest if old is not None else base_digest({}),
        bank_format=1,
        weights=old.weights if old is not None else (),
        sources=old.sources if old is not None else {},
        components={name: {entry.key: () for entry in entries}},
    )


def _report(
    folder: AdapterFolder, target: Path, output: str | Path, form: str, rank: int, notes: tuple[str, ...]
) -> ExportReport:
    size, before = (target / WEIGHTS).stat().st_size, (folder.path / WEIGHTS).stat().st_size
    return ExportReport(str(output), form, len(folder.factors), rank, size, size / before, notes=notes)
