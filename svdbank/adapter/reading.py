"""From a PEFT LoRA folder, ours or anybody's, to an :class:`~svdbank.adapter.model.Adapter`.

The tensors say what the adapter is. ``svdbank.json`` and ``components.safetensors`` beside them only add names to parts of it, and
where they contradict the tensors they are not used, which a note of the adapter says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from svdbank.adapter.bands import free
from svdbank.adapter.claims import placed
from svdbank.adapter.components import Component
from svdbank.adapter.entries import Entry, entries_of
from svdbank.adapter.fetching import located, name_of
from svdbank.adapter.folder import AdapterFolder, read_folder
from svdbank.adapter.methods import RESIDUAL_METHODS, InitialisationMethod, restored
from svdbank.adapter.model import Adapter
from svdbank.adapter.naming import bank_names
from svdbank.adapter.parts import with_parts
from svdbank.adapter.starting import initial_of
from svdbank.adapter.weights import AdaptedWeight, BaseWeight
from svdbank.bank.reading import Bank
from svdbank.core.errors import BankError, WrongBaseError


def read_adapter(path: str | Path, *, bank: Bank | None = None, name: str | None = None, method: str | None = None) -> Adapter:
    """Read any PEFT LoRA folder: plain, rsLoRA, rank and alpha patterns, embeddings, ``Conv1D``, experts.

    Parameters
    ----------
    path
        The folder, or ``org/name[@revision]`` of one on the Hub.
    bank
        The bank of the adapter's base. With it, factors that stand on the bank's directions become :class:`InBank`, also where PEFT
        or another program saved them; without it, only those that ``svdbank.json`` names.
    name
        What its component is called where the folder does not say; by default the folder's name.
    method
        What the folder was initialised as, where ``svdbank.json`` is lost: ``milora`` and ``pissa`` are read as the adapter for the
        *unchanged* base, ``[A; A₀], [B, −B₀]``, and need the bank for that.

    Raises :class:`CheckpointError` for a folder that is no adapter or of a kind that is not ``ΔW = s B A`` on the unchanged base (DoRA,
    biases of LoRA's own, OLoRA and others that subtract from the base what they start from),
    :class:`WrongBaseError` where the bank belongs to another base, :class:`BankError` where it lacks weights that are needed.
    """
    return adapter_of(read_folder(located(path)[0]), bank=bank, name=name or name_of(path), method=method)


def adapter_of(
    folder: AdapterFolder,
    *,
    bank: Bank | None = None,
    name: str | None = None,
    method: str | None = None,
    known: Mapping[str, str] = MappingProxyType({}),
) -> Adapter:
    """:func:`read_adapter` of a folder that is read already; ``known`` are names in the bank by key, where nothing is recorded yet."""
    own = name or folder.path.resolve().name
    kind = folder.made_as(method)
    entries = list(entries_of(folder))
    sources = folder.cache.sources if folder.cache is not None else {}
    recorded = {key: of for key, (of, _) in sources.items()} or known
    names = {} if bank is None else bank_names(bank, [entry.key for entry in entries], recorded)
    notes = [] if folder.unchecked is None else [f"{folder.path.name}: its bytes are unchecked: {folder.unchecked}"]
    notes += _check_base(folder, bank, names)
    if kind in RESIDUAL_METHODS:
        weights = _on_unchanged_base(entries, folder, bank, names, kind, own)
    else:
        found, said = placed(entries, folder, bank, names)
        notes += said
        weights, said = with_parts(folder, found, own)
        notes += said
    # Without a record nothing is known of the base, whatever bank is at hand.
    adapted = {
        entry.key: AdaptedWeight(
            out_features=entry.B.shape[0],
            in_features=entry.A.shape[1],
            components=weights[entry.key],
            kind=entry.kind,
            source=BaseWeight(*sources[entry.key]) if entry.key in sources else None,
            experts=entry.experts,
        )
        for entry in entries
    }
    return Adapter(adapted, folder.base, kind, folder.settings, tuple(notes), folder.whole)


def _check_base(folder: AdapterFolder, bank: Bank | None, names: Mapping[str, str]) -> list[str]:
    """Raise where the folder and the bank record other weights; a note where the folder records none."""
    if bank is None:
        return []
    if not names:
        own, held = next(iter(folder.factors), "nothing"), next(iter(bank), "nothing")
        raise WrongBaseError(
            f"{folder.path}: none of its weights is in {bank.place}, a bank of {bank.manifest.base.name}: the adapter has {own}, the bank "
            f"{held}",
            hint="name the bank of the adapter's base, extended to these modules: svdbank build MODEL --targets …; an adapter with names "
            "of older Transformers is read by its base, without a bank",
        )
    if folder.cache is None or not folder.cache.sources:
        return [f"{folder.path.name}: its base is not recorded, so it could not be compared with the bank's"]
    different = [
        key
        for key, name in names.items()
        if key in folder.cache.sources and bank[name].source_sha256 != folder.cache.sources[key][1]
    ]
    if different:
        raise WrongBaseError(
            f"{folder.path}: made on other weights than those of {bank.place}, first {different[0]}",
            hint="name the bank of the adapter's base; Adapter.rebase carries an adapter over to another one",
        )
    return []


def _on_unchanged_base(
    entries: Sequence[Entry],
    folder: AdapterFolder,
    bank: Bank | None,
    names: Mapping[str, str],
    method: InitialisationMethod,
    name: str,
) -> dict[str, dict[str, Component]]:
    """Trained MiLoRA or PiSSA as what it adds to the unchanged base, ``s B A − s B₀A₀``, with the bank's ``B₀A₀``."""
    if bank is None:
        raise BankError(
            f"{folder.path}: a {method} adapter belongs to W − s·B₀·A₀, and reading it for the unchanged base needs the bank",
            hint="pass the bank of its base: --bank BANK",
        )
    initial = initial_of(bank, entries, names, method)
    weights: dict[str, dict[str, Component]] = {}
    for entry in entries:
        A, B = restored(entry.A.float(), entry.B.float(), *initial[entry.key])
        weights[entry.key] = {name: free(A, B, entry.scale)}
    return weights
