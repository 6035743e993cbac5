"""The blocks of text that a run trains on and measures."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from svdbank.core.errors import OptionError
from svdbank.core.specs import Progress
from svdbank.lm.blocks import first, pack
from svdbank.lm.held_out import hold_out
from svdbank.lm.texts import explained, read_documents
from svdbank.lm.windows import Window, sample
from svdbank.training.best import blocks_measured
from svdbank.training.run import Run

#: The name under which the text held out is measured.
HELD_OUT = "held out"


@dataclass(frozen=True)
class TrainingData:
    """Blocks to train on and, by name, windows to measure."""

    training: Any
    measured: dict[str, list[Window]]
    digest: str

    @property
    def blocks(self) -> int:
        """Blocks to train on; 0 of a stream."""
        return len(self.training) if hasattr(self.training, "select") else 0


def read_data(run: Run) -> TrainingData:
    """Blocks for training and measuring. Raises :class:`OptionError` where there is too little."""
    options = run.options
    length = run.length

    def blocks(documents: Any) -> Any:
        return pack(documents, run.model.tokenizer, length)

    def chosen(documents: Any, most: int) -> list[Window]:
        return sample(documents, run.model.tokenizer, length, blocks=most, seed=options.seed)

    def enough(found: Any, what: str) -> Any:
        if len(found) == 0:
            raise OptionError(
                f"{what}: too little text for one block of {length} tokens",
                hint="more text, a smaller --length, or another --held-out",
            )
        return found

    run.tell(Progress("reading the text", 0, 1, "text"))
    streaming = options.streaming
    with explained(options.data):
        documents = read_documents(options.data, field=options.field, split=options.split, streaming=streaming)
        training, held_out = hold_out(documents, share=options.held_out, seed=options.seed)
        training = blocks(training)
        if streaming:
            enough(first(training, 1), ", ".join(options.data))
            training = training.shuffle(seed=options.seed, buffer_size=1000)
        else:
            enough(training, ", ".join(options.data))
        most = options.held_out_blocks
        if most is None:
            most = blocks_measured(run.steps(0 if streaming else len(training)), run.a_step)
        measured = {}
        if held_out is not None:
            measured[HELD_OUT] = enough(chosen(held_out, most), "the text held out")
    for source in options.retain:
        with explained([source]):
            kept = read_documents([source], field=options.field, split=options.split, streaming=streaming)
            measured[source] = enough(chosen(kept, most), source)
    run.tell(Progress("reading the text", 1, 1, "text"))
    return TrainingData(training, measured, _digest(training, measured))


def _digest(training: Any, measured: Mapping[str, list[Window]]) -> str:
    """Hash over every token, of a stream over those measured: a run goes on only with the text it began with."""
    import numpy

    digest = hashlib.sha256()
    if hasattr(training, "select"):
        digest.update(len(training).to_bytes(8, "little"))
        for batch in training.select_columns("input_ids").with_format("numpy").iter(1000):
            digest.update(numpy.ascontiguousarray(batch["input_ids"], dtype=numpy.int32).tobytes())
    for windows in measured.values():
        digest.update(len(windows).to_bytes(8, "little"))
        for window in windows:
            digest.update(numpy.array([len(window.tokens), window.context, *window.tokens], dtype=numpy.int32).tobytes())
    return digest.hexdigest()
