"""``fuse``: an adapter added into the weights of a checkpoint, one weight at a time.

``W' = W + ΔW`` is summed in float32 and rounded once, to the dtype in which the file stores W. What that rounding leaves of ΔW is
measured: a bfloat16 weight has eight significant bits, so a change below 0.4 % of an entry may not move it at all.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import get_args

from svdbank.adapter.folder import check_apart
from svdbank.adapter.model import Adapter
from svdbank.bank.reading import Bank
from svdbank.cache import opened as opened_bank
from svdbank.checkpoint.source import Checkpoint, open_checkpoint
from svdbank.checkpoint.writing.tensors import check_folder, write_checkpoint
from svdbank.core import disk
from svdbank.core.errors import OptionError
from svdbank.core.folders import output_folder
from svdbank.core.processors import available_cpus
from svdbank.core.specs import ProgressCallback
from svdbank.fusion.addition import Addition
from svdbank.fusion.fuse_report import FusedDtype, FuseReport, report_of
from svdbank.fusion.matching import (
    check_base,
    check_beneath,
    check_kinds,
    match_weights,
    matrices_beneath,
    named_as_stored,
    whole_tensors,
)
from svdbank.fusion.opening import note_of_base, open_adapter
from svdbank.fusion.untying import UNTIED, tensors_to_untie, untied
from svdbank.solver import pinned_threads

#: Left free on a disk that a Hub model is downloaded to.
_HEADROOM = 256 << 20


def fuse(
    model: str | os.PathLike[str],
    adapter: str | Path | Adapter,
    output: str | Path,
    *,
    into: str | os.PathLike[str] | None = None,
    bank: Bank | str | os.PathLike[str] | None = None,
    dtype: FusedDtype | None = None,
    untie: bool = False,
    progress: ProgressCallback | None = None,
) -> FuseReport:
    """Write a checkpoint that holds ``model`` with ``adapter`` added in; it loads without PEFT and without svdbank.

    Parameters
    ----------
    model
        The adapter's base: a folder, a file or ``org/name[@revision]``.
    adapter
        A PEFT LoRA folder, ours or anybody's, ``org/name[@revision]`` of one on the Hub, or an
        :class:`~svdbank.adapter.model.Adapter`.
    output
        Folder to write. It appears whole or not at all.
    into
        Another model of the same shapes to change instead of the base, such as its instruct model.
    bank
        The base's bank, which MiLoRA and PiSSA adapters need: a bank, its folder, or a model whose bank is in the cache; by default
        the cached one of ``model``.
    dtype
        ``float32``, …: store every floating tensor so. By default each stays as it is stored, what is quantised becomes its values.
    untie
        Where embedding and output head are one tensor, write two, so that an adapter can change one of them; the configuration then
        says ``tie_word_embeddings: false``. Only where the adapter changes one of them, and only for causal language models.

    Shard layout, metadata and tensors that the adapter does not touch are kept byte for byte (with ``dtype``, or of a quantised
    checkpoint, their values); configuration, tokenizer and other files are carried over.

    Raises
    ------
    OptionError
        An adapter that touches no weight, names a module that the model lacks, or changes no bit; an embedding tied to the output
        head, without ``untie``; an output in use; a disk with too little space.
    WrongBaseError
        The adapter records other weights than those of ``model``, or has other shapes.
    CheckpointError
        A model or adapter that cannot be read; an adapter that is no sum of low rank (DoRA, trained biases, trained tokens).
    """
    if dtype is not None and dtype not in get_args(FusedDtype):
        raise OptionError(f"a fused checkpoint is stored in {', '.join(get_args(FusedDtype))}, not {dtype!r}")
    target = output_folder(output)
    check_folder(target)
    check_apart(target, [model, *([into] if into is not None else []), *([] if isinstance(adapter, Adapter) else [adapter])])
    with contextlib.ExitStack() as stack:
        # Everything is in small pieces, many at a time: threads inside one of them would only wait for each other.
        stack.enter_context(pinned_threads(1))
        base = stack.enter_context(open_checkpoint(model))
        subject = base if into is None else stack.enter_context(open_checkpoint(into))
        opened, shown = open_adapter(adapter, opened_bank(bank), model)
        opened = named_as_stored(opened, subject)
        pair = tensors_to_untie(subject, opened) if untie else ()
        if pair:
            subject = untied(subject)
            base = subject if into is None else untied(base)
        matrices = match_weights(opened, subject, other=into is not None)
        full = whole_tensors(opened, subject)
        clash = {spec.sources[0].name for spec, _ in full} & {s.name for spec, _ in matrices for s in spec.sources}
        if clash:
            raise OptionError(f"the adapter both changes and replaces {min(clash)}")
        on_base = matrices
        if into is not None:
            on_base = match_weights(opened, base, other=False)
            check_kinds(on_base, matrices, base, subject)
        expected = check_base(opened, on_base, base)
        opened = replace(opened, notes=(*opened.notes, *note_of_base(opened, base.name)))
        beneath = matrices_beneath(opened, on_base)
        if into is not None:
            check_beneath(beneath, on_base, base)
        factors = {spec.name: weight.total().factors for spec, weight in matrices}
        addition = Addition(factors, {spec.name: values for spec, values in full}, beneath if into is None else {})
        stack.enter_context(_downloads(subject, target, progress))
        specs = [spec for spec, _ in (*matrices, *full)]
        written = write_checkpoint(
            subject,
            output,
            specs,
            addition,
            dtype=dtype,
            settings=UNTIED if pair else {},
            expected=expected if into is None else None,
            approve=lambda: addition.refuse_nothing(opened, specs),
            threads=available_cpus(),
            progress=progress,
        )
        return report_of(addition, [spec for spec, _ in matrices], full, opened, subject, pair, shown, written)


@contextlib.contextmanager
def _downloads(checkpoint: Checkpoint, output: Path, progress: ProgressCallback | None) -> Iterator[None]:
    """Download the files of a Hub model ahead of the reading where they fit on the disk; else each read fetches its own bytes."""
    remote = checkpoint.remote
    if remote is None:
        yield
        return
    room = disk.free_bytes(remote.folder) - _HEADROOM
    if disk.same_disk(remote.folder, output):
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
