"""``fuse``: an adapter added into the weights of a checkpoint, one weight at a time.

``W' = W + ΔW`` is summed in float32 and rounded once, to the dtype in which the file stores W. What that rounding leaves of ΔW is
measured: a bfloat16 weight has eight significant bits, so a change below 0.4 % of an entry may not move it at all.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from svdbank import fsio
from svdbank.adapter.folder import CACHE, AdapterCache, read_settings
from svdbank.adapter.methods import RESIDUAL_METHODS
from svdbank.adapter.model import AdaptedWeight, Adapter
from svdbank.adapter.naming import matched
from svdbank.adapter.reading import read_adapter
from svdbank.adapter.saved import SavedModules, saved_modules
from svdbank.bank.reading import Bank, base_digest
from svdbank.checkpoint.configuration import facts
from svdbank.checkpoint.correspondence import Parameter, correspondence
from svdbank.checkpoint.selection import decomposable
from svdbank.checkpoint.source import Checkpoint, open_checkpoint
from svdbank.checkpoint.writing import check_folder, write_checkpoint
from svdbank.errors import BankError, NotFiniteError, OptionError, WrongBaseError
from svdbank.pipeline.locating import opened as opened_bank
from svdbank.pipeline.planning import available_cpus
from svdbank.solver import pinned_threads
from svdbank.specs import ProgressCallback, Struct, TensorSource, WeightSpec, from_json

FusedDtype = Literal["float32", "bfloat16", "float16"]

#: Entries summed at a time: what is in between stays in the processor's cache.
_PANEL = 1 << 18

#: Share of ΔW that rounding may take before it is worth a warning.
_SWALLOWED = 0.1

#: Left free on a disk that a Hub model is downloaded to.
_HEADROOM = 256 << 20

#: ``init_lora_weights`` of PEFT with which an adapter belongs to a base that was changed when it was made.
_CHANGED_BASE = ("pissa", "milora", "olora", "corda", "loftq", "lora_ga")

#: Names spelled out in an error before "and n more".
_NAMED = 3


class FusedWeight(Struct, frozen=True):
    """What became of one weight.

    Attributes
    ----------
    name, module
        In the model; of an expert, the module is its parameter.
    elements, changed
        Entries of the weight, and how many of them have other bits now.
    norm
        ``‖ΔW‖`` (Frobenius), as intended.
    error
        ``‖(W' − W) − ΔW‖ / ‖ΔW‖`` with W' as stored; 0 where ΔW is zero.
    """

    name: str
    module: str
    elements: int
    changed: int
    norm: float
    error: float


class FuseReport(Struct, frozen=True):
    """What :func:`fuse` did.

    Attributes
    ----------
    checkpoint, base, adapter
        The folder written; the model whose weights were changed; the adapter.
    dtype
        What changed weights are stored in; several names where the checkpoint has several.
    weights
        Each changed weight, in the order of the files.
    elements, changed, error
        The same figures over all of them.
    replaced
        Tensors that the adapter's ``modules_to_save`` replaced whole.
    dequantised
        True where the checkpoint held codes and scales, and now holds values.
    nbytes
        Size of the weight files.
    notes
        What a reader should know, in sentences.
    """

    checkpoint: str
    base: str
    adapter: str
    dtype: str
    weights: tuple[FusedWeight, ...]
    elements: int
    changed: int
    error: float
    replaced: tuple[str, ...]
    dequantised: bool
    nbytes: int
    notes: tuple[str, ...]

    def __str__(self) -> str:
        return self.checkpoint


def fuse(
    model: str | os.PathLike[str],
    adapter: str | Path | Adapter,
    output: str | Path,
    *,
    into: str | os.PathLike[str] | None = None,
    bank: Bank | str | os.PathLike[str] | None = None,
    dtype: FusedDtype | None = None,
    progress: ProgressCallback | None = None,
) -> FuseReport:
    """Write a checkpoint that holds ``model`` with ``adapter`` added in; it loads without PEFT and without svdbank.

    Parameters
    ----------
    model
        The adapter's base: a folder, a file or ``org/name[@revision]``.
    adapter
        A PEFT LoRA folder, ours or anybody's, or an :class:`~svdbank.adapter.model.Adapter`.
    output
        Folder to write. It appears whole or not at all.
    into
        Another model of the same shapes to change instead of the base, such as its instruct model.
    bank
        The base's bank, which MiLoRA and PiSSA adapters need: a bank, its folder, or a model whose bank is in the cache; by default
        the cached one of ``model``.
    dtype
        ``float32``, …: store every floating tensor so. By default each stays as it is stored, what is quantised becomes its values.

    Shard layout, metadata and tensors that the adapter does not touch are kept byte for byte (with ``dtype``, or of a quantised
    checkpoint, their values); configuration, tokenizer and other files are carried over.

    Raises
    ------
    OptionError
        An adapter that touches no weight, names a module that the model lacks, or changes no bit; an embedding tied to the output
        head; an output in use; a disk with too little space.
    WrongBaseError
        The adapter records other weights than those of ``model``, or has other shapes.
    CheckpointError
        A model or adapter that cannot be read; an adapter that is no sum of low rank (DoRA, trained biases, trained tokens).
    """
    if dtype is not None and dtype not in get_args(FusedDtype):
        raise OptionError(f"a fused checkpoint is stored in {', '.join(get_args(FusedDtype))}, not {dtype!r}")
    check_folder(Path(output).expanduser().resolve())
    with contextlib.ExitStack() as stack:
        # Everything is in small pieces, many at a time: threads inside one of them would only wait for each other.
        stack.enter_context(pinned_threads(1))
        base = stack.enter_context(open_checkpoint(model))
        subject = base if into is None else stack.enter_context(open_checkpoint(into))
        opened, saved, cache = _opened(adapter, opened_bank(bank), model)
        matrices = _matched(opened, subject, other=into is not None)
        full = _full_weights(saved, subject)
        clash = {spec.sources[0].name for spec, _ in full} & {s.name for spec, _ in matrices for s in spec.sources}
        if clash:
            raise OptionError(f"the adapter both changes and replaces {min(clash)}")
        if into is not None:
            _check_shapes(opened, _matched(opened, base, other=False), matrices, base, subject)
        expected = _check_base(opened, cache, _matched(opened, base, other=False) if into is not None else matrices, base)
        pool = stack.enter_context(ThreadPoolExecutor(available_cpus(), "svdbank-fuse"))
        factors = {spec.name: weight.total().factors for spec, weight in matrices}
        addition = _Addition(factors, {spec.name: values for spec, values in full}, dtype, pool)
        stack.enter_context(_downloads(subject, Path(output).expanduser(), progress))
        written = write_checkpoint(
            subject,
            output,
            [spec for spec, _ in (*matrices, *full)],
            addition,
            dtype=dtype,
            expected=expected if into is None else None,
            approve=lambda: addition.refuse_nothing(opened),
            progress=progress,
        )
        return _report(addition, [spec for spec, _ in matrices], full, opened, subject, adapter, written.path, written.nbytes)


class _Addition:
    """``W + ΔW`` panel by panel, with a tally of what rounding did; the ``edit`` of :func:`write_checkpoint`."""

    def __init__(
        self,
        factors: Mapping[str, tuple[Tensor, Tensor]],
        full: Mapping[str, Tensor],
        dtype: FusedDtype | None,
        pool: ThreadPoolExecutor,
    ) -> None:
        self._factors = factors
        self._full = full
        self._dtype = None if dtype is None else getattr(torch, dtype)
        self._pool = pool
        self.tallies: dict[str, _Tally] = {}
        self.dtypes: dict[str, None] = {}

    def __call__(self, spec: WeightSpec, values: Tensor, rows: slice) -> Tensor:
        """The piece (rows, in) of the matrix with ΔW added; it may be ``values`` itself, changed in place."""
        to = self._dtype or values.dtype
        self.dtypes[str(to).removeprefix("torch.")] = None
        tally = self.tallies.setdefault(spec.name, _Tally())
        if spec.name in self._full:
            new = self._full[spec.name].to(to).reshape(values.shape)
            tally.take(_Tally(values.numel(), _changed(values, new)))
            return new
        A, B = self._factors[spec.name]
        # Panels of rows as they lie in memory: a transposed weight is (in, out) there.
        turned = spec.operation == "transpose"
        stored, left, right = (values.mT, A.mT, B[rows].mT) if turned else (values, B[rows], A)
        out = stored if to == stored.dtype else torch.empty(stored.shape, dtype=to)
        step = max(1, _PANEL // max(1, stored.shape[1]))
        wide = torch.float64 if stored.dtype == torch.float64 else torch.float32
        left, right = left.to(wide).contiguous(), right.to(wide).contiguous()

        def add(begin: int) -> _Tally:
            panel = slice(begin, begin + step)
            old = stored[panel].to(wide)
            delta = left[panel] @ right
            new = (old + delta).to(to)
            own = _Tally.of(stored[panel], new, old, delta)
            out[panel] = new
            return own

        for own in self._pool.map(add, range(0, len(stored), step)):
            tally.take(own)
        return out.mT if turned else out

    def refuse_nothing(self, adapter: Adapter) -> None:
        """Raise where not one bit changed, or what changed is no number."""
        for name, tally in self.tallies.items():
            if not math.isfinite(tally.lost):
                raise NotFiniteError(
                    f"{name} with the adapter added holds NaN or infinity",
                    hint="--dtype float32 has the range that float16 lacks",
                )
        if not any(tally.changed for tally in self.tallies.values()):
            elements = sum(tally.elements for tally in self.tallies.values())
            raise OptionError(
                f"not one of {elements:,} elements changed: {' and '.join(self.dtypes)} swallows the whole adapter, whose norm is "
                f"{adapter.norm():.3g}",
                hint="--dtype float32 keeps it",
            )


@dataclass
class _Tally:
    elements: int = 0
    changed: int = 0
    intended: float = 0.0
    lost: float = 0.0

    def take(self, other: _Tally) -> None:
        self.elements += other.elements
        self.changed += other.changed
        self.intended += other.intended
        self.lost += other.lost

    @classmethod
    def of(cls, before: Tensor, after: Tensor, old: Tensor, delta: Tensor) -> _Tally:
        """Of one panel. ``old`` is ``before`` in the dtype of the sum."""
        intended = float(torch.linalg.vector_norm(delta)) ** 2
        realised = after.to(old.dtype, copy=True).sub_(old)
        lost = float(torch.linalg.vector_norm(realised.sub_(delta))) ** 2
        return cls(before.numel(), _changed(before, after), intended, lost)


def _changed(before: Tensor, after: Tensor) -> int:
    """How many entries have other bits; across dtypes, other values."""
    if before.dtype == after.dtype:
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[before.element_size()]
        before, after = before.view(bits), after.view(bits)
    return before.numel() - int(torch.count_nonzero(before == after))


def _opened(
    adapter: str | Path | Adapter, bank: Bank | None, model: str | os.PathLike[str]
) -> tuple[Adapter, SavedModules, AdapterCache | None]:
    """The adapter, what its folder holds beside its factors, and what svdbank recorded in it."""
    if isinstance(adapter, Adapter):
        return _not_zero(adapter, SavedModules()), SavedModules(), None
    folder = Path(adapter).expanduser()
    settings = read_settings(folder)
    cache = None
    if (folder / CACHE).is_file():
        cache = from_json((folder / CACHE).read_bytes(), AdapterCache, where=str(folder / CACHE), error=OptionError)
    saved = saved_modules(folder)
    made_as = cache.method if cache is not None else None
    said = settings.init_lora_weights
    if cache is None and isinstance(said, str) and said.lower().startswith(_CHANGED_BASE):
        if said.lower() not in RESIDUAL_METHODS:
            raise OptionError(
                f"{folder}: initialised as {said!r}, which changed the base it was trained on; added to the unchanged base it would be "
                "another model",
                hint="save it with PEFT's save_pretrained(…, path_initial_model_for_weight_conversion=…): that is for the base",
            )
        made_as = said.lower()
    if made_as in RESIDUAL_METHODS and bank is None:
        bank = _cached_bank(model, folder, made_as)
    # Without a need for it the bank is not asked: it would only be compared.
    residual = made_as in RESIDUAL_METHODS
    opened = read_adapter(folder, bank=bank if residual else None, method=made_as if residual else None)
    return _not_zero(opened, saved), saved, cache


def _cached_bank(model: str | os.PathLike[str], folder: Path, method: str) -> Bank:
    from svdbank.pipeline.locating import open as open_cached

    try:
        return open_cached(model)
    except BankError as cause:
        raise BankError(
            f"{folder}: a {method} adapter belongs to W − s·B₀·A₀, and adding it to W needs the bank ({cause})",
            hint=f"svdbank build {model}, or name the bank with --bank",
        ) from cause


def _not_zero(adapter: Adapter, saved: SavedModules) -> Adapter:
    """The adapter, unless it adds nothing to any weight."""
    if saved.tensors:
        return adapter
    for weight in adapter.weights.values():
        A, B = weight.total().factors
        if bool(A.any()) and bool(B.any()):
            return adapter
    what = "ΔW is zero in every weight, as in an adapter that was not trained" if adapter.weights else "it touches no weight"
    raise OptionError(f"this adapter changes nothing: {what}", hint="train it first: svdbank train MODEL … -o ADAPTER")


def _matched(adapter: Adapter, checkpoint: Checkpoint, *, other: bool) -> list[tuple[WeightSpec, AdaptedWeight]]:
    """Each weight of the adapter with the weight of the checkpoint that it changes.

    Raises :class:`OptionError` where there is none, :class:`WrongBaseError` for another shape (OptionError where the model is
    ``other`` than the base).
    """
    if not adapter.weights:
        return []
    specs, _ = decomposable(checkpoint, (".*",))
    held = {(spec.name if spec.stacked else spec.module): spec for spec in specs}
    names = matched({key: key for key in held}, list(adapter.weights))
    missing = [key for key in adapter.weights if key not in names]
    if missing:
        raise OptionError(
            f"{checkpoint.name}: the adapter changes {len(missing)} weights that this model lacks: {_some(missing)}",
            hint="name the base model of the adapter: base_model_name_or_path in its adapter_config.json",
        )
    found = [(held[names[key]], weight) for key, weight in adapter.weights.items()]
    for spec, weight in found:
        ours, theirs = (spec.out_features, spec.in_features), (weight.out_features, weight.in_features)
        if ours != theirs:
            kind = OptionError if other else WrongBaseError
            raise kind(
                f"{checkpoint.name}: {spec.name} is {ours[0]}×{ours[1]}, the adapter's change of it {theirs[0]}×{theirs[1]}",
                hint="name the base model of the adapter: base_model_name_or_path in its adapter_config.json",
            )
    _refuse_tied([spec for spec, _ in found], specs, checkpoint)
    return found


def _refuse_tied(chosen: Sequence[WeightSpec], specs: Sequence[WeightSpec], checkpoint: Checkpoint) -> None:
    users = _users(specs)
    for spec in chosen:
        others = [module for source in spec.sources for module in users[source] if module != spec.module]
        if others:
            raise OptionError(
                f"{checkpoint.name}: {spec.module} and {others[0]} are one tensor, {spec.sources[0].name}; the adapter changes "
                f"{spec.module} alone, and one tensor cannot hold both",
                hint="untie them first: load the model, give the head a copy, set tie_word_embeddings to false, save_pretrained",
            )


def _users(specs: Sequence[WeightSpec]) -> dict[TensorSource, list[str]]:
    """The modules that are made of each stored tensor or piece: two of a tied embedding and head."""
    users: dict[TensorSource, list[str]] = {}
    for spec in specs:
        for source in spec.sources:
            users.setdefault(source, []).append(spec.module)
    return users


def _check_shapes(
    adapter: Adapter,
    base: Sequence[tuple[WeightSpec, AdaptedWeight]],
    matrices: Sequence[tuple[WeightSpec, AdaptedWeight]],
    one: Checkpoint,
    other: Checkpoint,
) -> None:
    """Raise where the base and the model that is changed instead name the adapted weights differently."""
    for (mine, _), (theirs, _) in zip(base, matrices, strict=True):
        if mine.kind != theirs.kind or (mine.expert is None) != (theirs.expert is None):
            raise OptionError(f"{other.name}: {theirs.name} is not what {mine.name} is in {one.name}")


def _check_base(
    adapter: Adapter, cache: AdapterCache | None, matrices: Sequence[tuple[WeightSpec, AdaptedWeight]], base: Checkpoint
) -> dict[str, str]:
    """sha256 that each weight must have, by name; raises :class:`WrongBaseError` before the work where the smallest has another."""
    expected = {spec.name: weight.source.sha256 for spec, weight in matrices if weight.source is not None}
    if expected:
        smallest = min((spec for spec, _ in matrices if spec.name in expected), key=lambda spec: spec.nbytes)
        wrong = base.read_hashed(smallest)[1] != expected[smallest.name]
    elif cache is not None and cache.base_digest and cache.weights:
        specs = {spec.name: spec for spec, _ in matrices}
        known = all(name in specs for name in cache.weights)
        wrong = not known or base_digest({n: base.read_hashed(specs[n])[1] for n in cache.weights}) != cache.base_digest
    else:
        return {}
    if wrong:
        said = adapter.base.name or "another base"
        raise WrongBaseError(
            f"{base.name}: not the weights that the adapter was made on ({said})",
            hint=f"svdbank fuse BASE ADAPTER --into {base.name} adds it to another model of the same shapes, if that is meant",
        )
    return expected


def _full_weights(saved: SavedModules, checkpoint: Checkpoint) -> list[tuple[WeightSpec, Tensor]]:
    """The tensors of ``modules_to_save``, each with the stored tensor that it replaces."""
    if not saved.tensors:
        return []
    about = facts(checkpoint.config, f"{checkpoint.name}: config.json")
    found: dict[str, Parameter] = {}
    for parameter in correspondence(checkpoint.tensors, about).parameters:
        if parameter.expert is None and len(parameter.sources) == 1:
            found[parameter.name] = parameter
    names = matched({key: key for key in found}, list(saved.tensors))
    users = _users(decomposable(checkpoint, (".*",))[0])
    full = []
    for key, values in saved.tensors.items():
        source = found[names[key]].sources[0] if key in names else None
        why = None
        if source is None:
            why = "the model stores no tensor of that name"
        elif source.shape != tuple(values.shape):
            why = f"its shape is {tuple(values.shape)}, the model's {source.shape}: a vocabulary that was resized, or another head"
        elif len(shared := users.get(source, ())) > 1:
            why = f"{' and '.join(shared)} are one tensor"
        if source is None or why is not None:
            raise OptionError(
                f"the adapter holds a whole {key} (modules_to_save) that cannot be carried over: {why}",
                hint="merge it with PEFT: PeftModel.from_pretrained(model, ADAPTER).merge_and_unload().save_pretrained(…)",
            )
        spec = WeightSpec(
            name=f"{names[key]} (whole)",
            module=names[key].rpartition(".")[0],
            kind="linear",
            family="",
            out_features=source.shape[0],
            in_features=math.prod(source.shape[1:]),
            dtype=source.dtype,
            sources=(source,),
        )
        full.append((spec, values))
    return full


@contextlib.contextmanager
def _downloads(checkpoint: Checkpoint, output: Path, progress: ProgressCallback | None) -> Iterator[None]:
    """Download the files of a Hub model ahead of the reading where they fit on the disk; else each read fetches its own bytes."""
    remote = checkpoint.remote
    if remote is None:
        yield
        return
    room = fsio.free_bytes(remote.folder) - _HEADROOM
    if fsio.same_disk(remote.folder, output):
        room -= sum(file.size for file in checkpoint.files)
    if sum(file.source.size for file in remote.files.values()) > room:
        yield
        return
    uses = [frozenset({file.name}) for file in checkpoint.files]
    try:
        with remote.shards(uses, budget=None, keep=True):
            yield
    except BaseException:
        remote.close()
        raise


def _report(
    addition: _Addition,
    specs: Sequence[WeightSpec],
    full: Sequence[tuple[WeightSpec, Tensor]],
    adapter: Adapter,
    subject: Checkpoint,
    named: str | Path | Adapter,
    path: str,
    nbytes: int,
) -> FuseReport:
    order = {name: number for number, name in enumerate(addition.tallies)}
    weights = []
    for spec in sorted(specs, key=lambda spec: order[spec.name]):
        tally = addition.tallies[spec.name]
        error = math.sqrt(tally.lost / tally.intended) if tally.intended else 0.0
        weights.append(FusedWeight(spec.name, spec.module, tally.elements, tally.changed, math.sqrt(tally.intended), error))
    tallies = [addition.tallies[spec.name] for spec in specs]
    intended, lost = math.fsum(t.intended for t in tallies), math.fsum(t.lost for t in tallies)
    dtype = ", ".join(addition.dtypes)
    error = math.sqrt(lost / intended) if intended else 0.0
    still = [weight.name for weight in weights if not weight.changed and weight.norm]
    notes = list(adapter.notes)
    quantised = any(source.quantisation is not None for source in subject.tensors.values())
    if quantised:
        notes.append(
            f"{subject.name} holds codes and scales: every weight was written as its values, quantization_config removed"
        )
    if error > _SWALLOWED:
        notes.append(
            f"{dtype} rounds {error:.0%} of the intended change away (norm of the error over norm of ΔW); --dtype float32 keeps all of it"
        )
    if still:
        notes.append(f"{len(still)} weights did not change at all: {_some(still)}")
    return FuseReport(
        checkpoint=path,
        base=subject.name if subject.revision is None else f"{subject.name}@{subject.revision}",
        adapter=repr(named) if isinstance(named, Adapter) else str(named),
        dtype=dtype,
        weights=tuple(weights),
        elements=sum(t.elements for t in tallies),
        changed=sum(t.changed for t in tallies),
        error=error,
        replaced=tuple(spec.sources[0].name for spec, _ in full),
        dequantised=quantised,
        nbytes=nbytes,
        notes=tuple(notes),
    )


def _some(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
