"""From a PEFT LoRA folder, ours or anybody's, to an :class:`~svdbank.adapter.model.Adapter`.

The tensors say what the adapter is. ``svdbank.json`` and ``components.safetensors`` beside them only add names to parts of it, and
where they contradict the tensors they are not used, which a note of the adapter says.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from svdbank.adapter.bands import free, recover
from svdbank.adapter.components import Band, Component, Free, InBank, bands_of, combined, indices_of, inner
from svdbank.adapter.experts import parameters_of, split
from svdbank.adapter.folder import AdapterFolder, read_folder
from svdbank.adapter.methods import METHODS, RESIDUAL_METHODS, Method, initial_factors, lora_scale, restored
from svdbank.adapter.model import AdaptedWeight, Adapter, BaseIdentity, Kind, Source
from svdbank.adapter.naming import bank_names
from svdbank.adapter.settings import COMPONENTS, WEIGHTS, AdapterCache, LoraSettings
from svdbank.bank.reading import Bank
from svdbank.core.errors import BankError, CheckpointError, OptionError, WrongBaseError

#: ‖A_file − Σ C‖ / ‖A_file‖ up to which the parts beside a sum are its parts: both are float32 roundings of the same sum.
_SAME = 1e-6

#: ‖BᵀB − I‖ up to which columns that a cache calls bank directions can be that without a bank at hand: bfloat16 rounds by 2⁻⁹.
_ORTHONORMAL = 2.0**-6

#: The same for float32 columns, of which norms and inner products may be taken from coefficients alone: a few thousand entries
#: rounded by 6e-8 give about 1e-7.
_FLOAT32_ORTHONORMAL = 1e-6


#: ``init_lora_weights`` of PEFT, or how it begins, with which an adapter belongs to a base that was changed when it was made.
_CHANGED_BASE = ("pissa", "milora", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Entry:
    """One weight of a folder: factors (r, in) and (out, r), the scale PEFT applies, and what kind of weight it is."""

    key: str
    A: Tensor
    B: Tensor
    rank: int
    alpha: float
    scale: float
    kind: Kind
    experts: int = 0


def read_adapter(path: str | Path, *, bank: Bank | None = None, name: str | None = None, method: str | None = None) -> Adapter:
    """Read any PEFT LoRA folder: plain, rsLoRA, rank and alpha patterns, embeddings, ``Conv1D``, experts.

    Parameters
    ----------
    path
        The folder.
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
    folder = read_folder(path)
    _refuse_other_kinds(folder)
    own = name or folder.path.resolve().name
    kind = made_as(folder, method)
    entries = list(entries_of(folder))
    names = {} if bank is None else bank_names(bank, [entry.key for entry in entries])
    notes = _check_base(folder, bank, names)
    if kind in RESIDUAL_METHODS:
        weights = _on_unchanged_base(entries, folder, bank, names, kind, own)
    else:
        found, said = _recovered(entries, folder, bank, names)
        notes += said
        weights, said = _with_parts(folder, entries, found, own)
        notes += said
    # Without a record nothing is known of the base, whatever bank is at hand.
    sources = folder.cache.sources if folder.cache is not None else {}
    adapted = {
        entry.key: AdaptedWeight(
            out_features=entry.B.shape[0],
            in_features=entry.A.shape[1],
            components=weights[entry.key],
            kind=entry.kind,
            source=Source(*sources[entry.key]) if entry.key in sources else None,
            experts=entry.experts,
        )
        for entry in entries
    }
    settings = folder.settings
    base = BaseIdentity(settings.base_model_name_or_path or (folder.cache.base if folder.cache else None), settings.revision)
    return Adapter(adapted, base, kind, settings, tuple(notes))


def entries_of(folder: AdapterFolder) -> Iterator[Entry]:
    """Every weight of a folder, stacked experts taken apart, with PEFT's rank, α and scale."""
    parameters = parameters_of(folder)
    for module, pair in folder.factors.items():
        path = parameters.get(module, module)
        rank, alpha = folder.rank(path), folder.alpha(path)
        scale = lora_scale(rank, alpha, rslora=folder.settings.use_rslora)
        if module not in parameters:
            yield Entry(path, pair.A, pair.B, rank, alpha, scale, "embedding" if pair.embedding else "linear")
            continue
        pairs = split(pair.A, pair.B, rank, f"{folder.path / WEIGHTS}: {module}")
        if len(pairs) == 1 and path.endswith(".weight"):
            yield Entry(path.removesuffix(".weight"), *pairs[0], rank, alpha, scale, "linear")
            continue
        for expert, (A, B) in enumerate(pairs):
            yield Entry(f"{path}.{expert}", A, B, rank, alpha, scale, "expert", len(pairs))


def _refuse_other_kinds(folder: AdapterFolder) -> None:
    settings = folder.settings
    what = "DoRA" if settings.use_dora else "a LoRA with biases" if settings.lora_bias or settings.bias != "none" else None
    if what is not None:
        raise CheckpointError(
            f"{folder.path}: {what} is not a sum ΔW = s·B·A of low rank",
            hint="merge it into its base with PEFT's merge_and_unload(), if that is what it is for",
        )


def made_as(folder: AdapterFolder, method: str | None) -> str:
    """What a folder was initialised as: what the caller says, else the cache, else the config."""
    if method is not None:
        if method not in (*METHODS, "lora"):
            raise OptionError(f"{method!r} is not a method: {', '.join((*METHODS, 'lora'))}")
        return method
    return initialised_as(folder.path, folder.settings, folder.cache)


def initialised_as(path: Path, settings: LoraSettings, cache: AdapterCache | None) -> str:
    """What ``svdbank.json`` says, else the config. Raises :class:`CheckpointError` for what no bank can put on the unchanged base."""
    if cache is not None:
        return cache.method
    said = settings.init_lora_weights
    known = said.lower() if isinstance(said, str) else ""
    if known.startswith(_CHANGED_BASE) and known not in METHODS:
        raise CheckpointError(
            f"{path}: initialised as {said!r}, which changed the base it was trained on; on the unchanged base it would be "
            "another model",
            hint="save it with PEFT's save_pretrained(…, path_initial_model_for_weight_conversion=…): that is for the base",
        )
    return known if known in METHODS else "lora"


def _check_base(folder: AdapterFolder, bank: Bank | None, names: Mapping[str, str]) -> list[str]:
    """Raise where the folder and the bank record other weights; a note where the folder records none."""
    if bank is None:
        return []
    if not names:
        raise WrongBaseError(
            f"{folder.path}: none of its weights is in {bank.path}, a bank of {bank.manifest.base.name}",
            hint="name the bank of the adapter's base, extended to these modules: svdbank build MODEL --targets …",
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
            f"{folder.path}: made on other weights than those of {bank.path}, first {different[0]}",
            hint="name the bank of the adapter's base; Adapter.rebase carries an adapter over to another one",
        )
    return []


def _recovered(
    entries: Sequence[Entry], folder: AdapterFolder, bank: Bank | None, names: Mapping[str, str]
) -> tuple[dict[str, Component], list[str]]:
    claims = {entry.key: _claim(folder, entry) for entry in entries}
    found: dict[str, Component]
    if bank is None:
        found = {entry.key: _believed(entry, claims[entry.key]) for entry in entries}
        refuted = [
            e.key for e in entries if claims[e.key] and isinstance(found[e.key], Free) and not _in_span(e, claims[e.key])
        ]
        return found, _contradicted(
            folder, refuted if folder.cache is not None else [], "are not orthonormal, as directions of a bank are"
        )
    found = {entry.key: free(entry.A, entry.B, entry.scale) for entry in entries if entry.key not in names}
    lefts = _left_rows(bank, entries, names, claims)
    for entry in entries:
        if entry.key in lefts:
            found[entry.key] = recover(entry.A, entry.B, entry.scale, lefts[entry.key], claim=claims[entry.key])
    # Not where it was expected: now all that the bank stores is searched.
    elsewhere = [
        entry
        for entry in entries
        if isinstance(found[entry.key], Free) and len(lefts.get(entry.key, ())) < _stored(bank, names, entry)
    ]
    for key, left in _left_rows(bank, elsewhere, names, {}).items():
        entry = next(entry for entry in elsewhere if entry.key == key)
        found[key] = recover(entry.A, entry.B, entry.scale, left)
    refuted = [key for key, claim in claims.items() if key in names and claim and not _within(found[key], claim)]
    return found, _contradicted(
        folder, refuted if folder.cache is not None else [], f"lie elsewhere in {bank.path.name}, or outside"
    )


def _stored(bank: Bank, names: Mapping[str, str], entry: Entry) -> int:
    return bank[names[entry.key]].rank if entry.key in names else 0


def _within(component: Component, claim: Sequence[Band]) -> bool:
    return isinstance(component, InBank) and set(component.indices) <= set(indices_of(claim))


def _contradicted(folder: AdapterFolder, keys: Sequence[str], how: str) -> list[str]:
    if not keys:
        return []
    return [
        f"{folder.path.name}: svdbank.json contradicts the tensors of {len(keys)} weights, first {keys[0]}: they {how}; "
        "the tensors are believed"
    ]


def _claim(folder: AdapterFolder, entry: Entry) -> tuple[Band, ...]:
    """The bands that the cache names for a weight, all components together; those of an ordinary MiCA adapter where there is no cache."""
    cache = folder.cache
    if cache is None:
        return ((0, entry.rank),)
    if not cache.components:
        return (cache.band,) if cache.band[1] - cache.band[0] == entry.rank else ()
    parts = [bands[entry.key] for bands in cache.components.values() if entry.key in bands]
    # A sum with free factors in it stands nowhere, whatever its other parts stand on.
    return bands_of(i for bands in parts for i in indices_of(bands)) if all(parts) else ()


def _believed(entry: Entry, claim: tuple[Band, ...]) -> Component:
    """Without a bank: the directions are what the cache says if they are orthonormal at all."""
    indices = indices_of(claim)
    if len(indices) != entry.B.shape[1]:
        return free(entry.A, entry.B, entry.scale)
    B = entry.B.float().flip(1)
    off = _off_orthonormal(B)
    if off > _ORTHONORMAL:
        return free(entry.A, entry.B, entry.scale)
    C = (entry.A.flip(0).double() * entry.scale).float()
    return InBank(claim, C, B.contiguous(), orthonormal=off < _FLOAT32_ORTHONORMAL)


def _in_span(entry: Entry, claim: tuple[Band, ...]) -> bool:
    """Whether B may be what a truncation leaves: fewer orthonormal columns than directions, in a span that only the bank can place."""
    return entry.B.shape[1] < len(indices_of(claim)) and _off_orthonormal(entry.B) <= _ORTHONORMAL


def _left_rows(
    bank: Bank, entries: Sequence[Entry], names: Mapping[str, str], claims: Mapping[str, tuple[Band, ...]]
) -> dict[str, Tensor]:
    """Left vectors (R, out) of each weight, most minor first: as many as the claim needs, one bulk read for each number."""
    wanted: dict[int, list[str]] = defaultdict(list)
    for entry in entries:
        if entry.key in names:
            claim = claims.get(entry.key, ())
            stored = bank[names[entry.key]].rank
            wanted[min(stored, claim[-1][1] if claim else stored)].append(entry.key)
    rows = {}
    for rank, keys in wanted.items():
        read = bank.left(dict.fromkeys(names[key] for key in keys), rank)
        rows.update({key: read[names[key]].mT.flip(0) for key in keys})
    return rows


def _with_parts(
    folder: AdapterFolder, entries: Sequence[Entry], found: Mapping[str, Component], name: str
) -> tuple[dict[str, dict[str, Component]], list[str]]:
    """Named components of each weight: those beside the sum if they add up to it, else the sum itself under ``name``."""
    cache = folder.cache
    own = next(iter(cache.components)) if cache is not None and len(cache.components) == 1 else name
    whole = {key: {own: component} for key, component in found.items()}
    if cache is None or len(cache.components) < 2:
        return whole, []
    try:
        tensors = safetensors.torch.load_file(folder.path / COMPONENTS)
        parts = {entry.key: _parts(cache.components, tensors, entry.key, found[entry.key]) for entry in entries}
    except (KeyError, OptionError, OSError, safetensors.SafetensorError) as cause:
        return whole, [f"{folder.path.name}: {COMPONENTS} cannot be used ({cause}); the adapter is read as one component"]
    wrong = [key for key in parts if not parts[key] or not _adds_up(parts[key], found[key])]
    if wrong:
        return whole, [
            f"{folder.path.name}: the components beside the tensors do not add up to them in {len(wrong)} weights, first {wrong[0]}; "
            "the tensors are believed and read as one component"
        ]
    return parts, []


def _parts(
    recorded: Mapping[str, Mapping[str, Sequence[Band]]], tensors: Mapping[str, Tensor], key: str, total: Component
) -> dict[str, Component]:
    """The components of one weight: coefficients from the file beside the sum, directions from there or from the sum itself."""
    parts: dict[str, Component] = {}
    for name, weights in recorded.items():
        if key not in weights:
            continue
        bands, A, B = tuple(weights[key]), tensors[f"{name}/{key}/A"], tensors.get(f"{name}/{key}/B")
        if B is not None:
            parts[name] = InBank(bands, A, B, _off_orthonormal(B) < _FLOAT32_ORTHONORMAL) if bands else Free(A, B)
        elif isinstance(total, InBank):
            place = {index: row for row, index in enumerate(total.indices)}
            columns = [place[index] for index in indices_of(bands)]
            parts[name] = InBank(bands, A, total.left[:, columns], total.orthonormal)
        else:
            raise KeyError(f"no directions for {key}")
    return parts


def _adds_up(parts: Mapping[str, Component], total: Component) -> bool:
    if any(part.factors[0].shape[1] != total.factors[0].shape[1] for part in parts.values()):
        return False
    difference = combined([*((1.0, part) for part in parts.values()), (-1.0, total)])
    size = max(inner(component, component) for component in (total, *parts.values()))
    return inner(difference, difference) <= _SAME**2 * size


def _off_orthonormal(B: Tensor) -> float:
    gram = B.double().mT @ B.double()
    return float((gram - torch.eye(len(gram), dtype=torch.float64)).abs().max())


def _on_unchanged_base(
    entries: Sequence[Entry], folder: AdapterFolder, bank: Bank | None, names: Mapping[str, str], method: Method, name: str
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


def initial_of(
    bank: Bank, entries: Sequence[Entry], names: Mapping[str, str], method: Method
) -> dict[str, tuple[Tensor, Tensor]]:
    """``A₀`` (r, in) and ``B₀`` (out, r) that MiLoRA or PiSSA start each weight from, by lookup, float32."""
    missing = [entry.key for entry in entries if entry.key not in names]
    if missing:
        raise BankError(f"{bank.path}: the bank holds no basis for {missing[0]}, which {method} starts from")
    initial = {}
    by_rank: dict[int, list[Entry]] = defaultdict(list)
    for entry in entries:
        by_rank[entry.rank].append(entry)
    for rank, group in by_rank.items():
        own = [names[entry.key] for entry in group]
        pissa = method == "pissa"
        left = (bank.principal_left if pissa else bank.left)(own, rank)
        right = (bank.principal_right if pissa else bank.right)(own, rank)
        sigma = (bank.principal_sigma if pissa else bank.sigma)(own, rank)
        for entry, own_name in zip(group, own, strict=True):
            largest = bank[own_name].certificate.sigma_max
            initial[entry.key] = initial_factors(
                method, left[own_name], sigma[own_name], right[own_name], entry.scale, sigma_max=largest
            )
    return initial
