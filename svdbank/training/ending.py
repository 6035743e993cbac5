"""Which state of a run is written, and what it comes to."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from svdbank.core.errors import SvdbankError
from svdbank.training.best import Held, HeldOut
from svdbank.training.data import HELD_OUT, TrainingData
from svdbank.training.losses import change_of, measure
from svdbank.training.report import Change, Measured
from svdbank.training.run import Run


class TrainingError(SvdbankError):
    """A training that came to nothing."""


@dataclass(frozen=True)
class Ending:
    """The state that is kept and its step; its change on every text (of ``nothing`` that of the last state); the text held out by step."""

    kept: Literal["best", "last", "nothing"]
    step: int
    changes: dict[str, Change]
    measured: tuple[Measured, ...]


def end(run: Run, trainer: Any, data: TrainingData, before: dict[str, list[float]], held: Held | None) -> Ending:
    """Measure the last state, choose, put the state chosen into the model, measure the rest.

    Raises :class:`TrainingError` where the last loss is no number and no state before it can be kept.
    """
    begun = time.perf_counter()
    steps = trainer.state.global_step
    # A run shorter than one point of the curve has the mean over all steps alone.
    logged = [float(entry[name]) for entry in trainer.state.log_history for name in ("loss", "train_loss") if name in entry]
    last = HeldOut(steps, (math.inf,)) if not all(map(math.isfinite, logged)) else None
    if last is None and held is not None and held.states and held.states[-1].step == steps:
        last = held.states.pop()  # a run that patience ended was measured just now
    if last is None and held is not None:
        last = HeldOut(steps, tuple(measure(trainer, {HELD_OUT: held.windows}, run.tell, "loss after")[HELD_OUT]))
    kept, step = _chosen(run, held, last, steps)
    losses: dict[str, Sequence[float]] = {}
    states: list[HeldOut] = []
    if held is not None and last is not None:
        states = [*held.states, *([last] if math.isfinite(last.total) else [])]
        losses[HELD_OUT] = held.restore(trainer.model, run.processes).losses if step not in (0, steps) else last.losses
    rest = {name: windows for name, windows in data.measured.items() if name != HELD_OUT}
    losses |= measure(trainer, rest, run.tell, "loss after")

    def change(name: str, after: Sequence[float]) -> Change:
        return change_of(name, data.measured[name], before[name], after)

    curve = [(state.step, change(HELD_OUT, state.losses)) for state in states]
    run.clock.measuring += time.perf_counter() - begun
    return Ending(
        kept,
        step,
        {name: change(name, losses[name]) for name in data.measured},
        tuple(Measured(at, found.after, found.change, found.change_error) for at, found in curve),
    )


def _chosen(run: Run, held: Held | None, last: HeldOut | None, steps: int) -> tuple[Literal["best", "last", "nothing"], int]:
    """What is kept, and of which step: 0 where the start was better than everything after it."""
    is_number = last is None or math.isfinite(last.total)
    best = held.best(run.processes) if held is not None and run.options.keep == "best" else None
    if not is_number and best is None:
        raise TrainingError(
            "the loss is not a number any more", hint="a lower --learning-rate, or --dtype bfloat16 instead of float16"
        )
    if held is None or last is None or run.options.keep == "last":
        return "last", steps
    if best is not None and best.total < last.total:
        return "best", best.step
    return ("best", steps) if last.total < held.before.total else ("nothing", 0)
