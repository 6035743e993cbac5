"""What a fuse did, for people and programs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from svdbank.adapter.model import Adapter
from svdbank.checkpoint.source import Checkpoint
from svdbank.checkpoint.writing.tensors import WrittenCheckpoint
from svdbank.core.errors import abridge
from svdbank.core.specs import Struct, WeightSpec
from svdbank.fusion.addition import Addition

FusedDtype = Literal["float32", "bfloat16", "float16"]

#: Share of ΔW that rounding may take before it is worth a warning.
_SWALLOWED = 0.1


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
    untied
        The two tensors of what was one for embedding and head, if that was asked for and needed.
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
    untied: tuple[str, ...]
    dequantised: bool
    nbytes: int
    notes: tuple[str, ...]

    def __str__(self) -> str:
        return self.checkpoint


def report_of(
    addition: Addition,
    specs: Sequence[WeightSpec],
    full: Sequence[tuple[WeightSpec, Tensor]],
    adapter: Adapter,
    subject: Checkpoint,
    untied: tuple[str, ...],
    shown: str,
    written: WrittenCheckpoint,
) -> FuseReport:
    order = {file.name: number for number, file in enumerate(subject.files)}
    specs = sorted(specs, key=lambda spec: (order[spec.sources[0].file], spec.sources[0].begin))
    tallies = [addition.tally(spec.name) for spec in specs]
    sizes = [addition.intended(spec.name) for spec in specs]
    weights = [
        FusedWeight(spec.name, spec.module, tally.elements, tally.changed, math.sqrt(size), _relative(tally.lost, size))
        for spec, tally, size in zip(specs, tallies, sizes, strict=True)
    ]
    dtype = ", ".join(addition.dtypes([*specs, *(spec for spec, _ in full)]))
    error = _relative(math.fsum(tally.lost for tally in tallies), math.fsum(sizes))
    still = [weight.name for weight in weights if not weight.changed and weight.norm]
    notes = list(adapter.notes)
    quantised = any(source.quantisation is not None for source in subject.tensors.values())
    if quantised:
        notes.append(
            f"{subject.name} holds codes and scales: every weight was written as its values, quantization_config removed"
        )
    if untied:
        notes.append(f"{' and '.join(untied)} were one tensor and are two: config.json says tie_word_embeddings: false")
    if error > _SWALLOWED:
        notes.append(
            f"{dtype} rounds {error:.0%} of the intended change away (norm of the error over norm of ΔW); --dtype float32 keeps all of it"
        )
    if still:
        notes.append(f"{len(still)} weights did not change at all: {abridge(still)}")
    return FuseReport(
        checkpoint=written.path,
        base=subject.name if subject.revision is None else f"{subject.name}@{subject.revision}",
        adapter=shown,
        dtype=dtype,
        weights=tuple(weights),
        elements=sum(t.elements for t in tallies),
        changed=sum(t.changed for t in tallies),
        error=error,
        replaced=tuple(spec.sources[0].name for spec, _ in full),
        untied=untied,
        dequantised=quantised,
        nbytes=written.nbytes,
        notes=tuple(notes),
    )


def _relative(lost: float, size: float) -> float:
    """Norm by norm, of their squares."""
    return math.sqrt(lost / size) if size else 0.0
