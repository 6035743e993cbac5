"""``export``: an adapter in another form. Each conversion is exact, or says what it rounds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

import msgspec

from svdbank import cache
from svdbank.adapter.conversion import Pairs, as_lora, for_inference, start_in
from svdbank.adapter.documents import read_documents
from svdbank.adapter.entries import entries_of
from svdbank.adapter.fetching import located
from svdbank.adapter.folder import AdapterFolder, Factors, check_output, read_folder
from svdbank.adapter.methods import RESIDUAL_METHODS, InitialisationMethod
from svdbank.adapter.naming import bank_names
from svdbank.adapter.renaming import one_by_one
from svdbank.adapter.settings import COEFFICIENTS, SLIM, WEIGHTS
from svdbank.adapter.slim import expand_slim, write_slim
from svdbank.adapter.starting import initial_of
from svdbank.bank.reading import Bank
from svdbank.core.errors import OptionError, abridge
from svdbank.core.folders import output_folder
from svdbank.core.specs import Struct

Form = Literal["peft", "lora", "slim"]


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
    source, target = located(adapter)[0], output_folder(output)
    check_output(target, force=force)
    opened = cache.opened(bank)
    if to == "slim":
        if inference:
            raise OptionError("a slim adapter is not for serving: it lacks B", hint="--to peft --for inference")
        folder = read_folder(source, any_kind=True)  # every byte but the bank's comes back
        record = write_slim(folder, target, opened or cache.recorded_bank(folder, "slim"), force=force)
        full = len(folder.factors) - len(record.references)
        kept = f"{full} of {len(folder.factors)} weights are not the bank's vectors to the bit and keep their B"
        return _report(folder.factors, output, to, (target / COEFFICIENTS, record.size), (kept,) if full else ())
    if (source / SLIM).is_file():
        if to != "peft" or inference:
            raise OptionError(
                f"{source} is slim", hint=f"first svdbank export {source} --to peft --bank BANK -o FOLDER, then that folder"
            )
        expand_slim(source, target, opened or cache.recorded_bank(read_documents(source, slim=True), "slim"), force=force)
        return _report(
            read_folder(target, any_kind=True).factors, output, to, (target / WEIGHTS, (source / COEFFICIENTS).stat().st_size)
        )
    folder = read_folder(source)
    kind = folder.made_as(method)
    if to == "peft" and not inference:
        raise OptionError(f"{source} is a PEFT folder already", hint="--to lora, --to slim, or --for inference")
    if not inference and folder.settings.use_rslora and (expert := one_by_one(folder.factors)):
        raise OptionError(
            f"{source}: {expert} is an expert that was a module, and PEFT gives such with rsLoRA another scale",
            hint=f"svdbank export {source} --for inference -o FOLDER folds the scale into A",
        )
    start = _start(folder, kind, opened, initial) if kind in RESIDUAL_METHODS else None
    made = (for_inference if inference else as_lora)(folder, start)
    made.write(target, force=force)
    notes = []
    if inference and folder.whole.beneath:
        beneath = abridge([f"{module}.base_layer.weight" for module in folder.whole.beneath])
        notes = [
            f"{beneath}: the base's own at training, which PEFT loads; vLLM leaves it out, so serve a base that has these values"
        ]
    report = _report(made.factors, output, to, (target / WEIGHTS, (source / WEIGHTS).stat().st_size), tuple(notes))
    if inference:
        report = msgspec.structs.replace(report, rank=made.settings.r, flag=f"--max-lora-rank {made.settings.r}")
    return report


def _start(folder: AdapterFolder, method: InitialisationMethod, bank: Bank | None, initial: str | Path | None) -> Pairs:
    """A₀ and B₀ of each weight: from the fresh folder, else from the bank."""
    if initial is not None:
        return start_in(initial, folder)
    entries = list(entries_of(folder))
    opened = bank or cache.recorded_bank(folder, method)
    return initial_of(opened, entries, bank_names(opened, [entry.key for entry in entries]), method)


def _report(
    factors: Mapping[str, Factors], output: str | Path, form: Form, sizes: tuple[Path, int], notes: tuple[str, ...] = ()
) -> ExportReport:
    """``sizes`` are the file written and the bytes of what it was made from."""
    rank = max(pair.B.shape[1] for pair in factors.values())
    nbytes = sizes[0].stat().st_size
    return ExportReport(str(output), form, len(factors), rank, nbytes, nbytes / sizes[1], notes=notes)
