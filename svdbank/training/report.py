"""What a run of ``train`` did, in figures."""

from __future__ import annotations

from typing import Literal

from svdbank.core.specs import Struct


class Change(Struct, frozen=True):
    """Loss on blocks of one text before and after, nats a token. Errors are standard errors over blocks; the change is paired."""

    text: str
    blocks: int
    tokens: int
    before: float
    before_error: float
    after: float
    after_error: float
    change: float
    change_error: float


class Calibration(Struct, frozen=True):
    """How a rate was found.

    ``curve`` holds (rate, change) by rate: of the loss of the middle one of ``aside`` other training blocks, in nats a token, so far
    along the first ``steps`` steps of AdamW on ``blocks`` blocks. At ``limit`` it is 0.2 nats, or 1 above the lowest; None where no such
    rate was found. ``seconds`` is the time that it took.
    """

    rate: float
    limit: float | None
    curve: tuple[tuple[float, float], ...]
    steps: int
    blocks: int
    aside: int
    why: str
    seconds: float


class Measured(Struct, frozen=True):
    """The text held out after a step: mean loss in nats a token, its change since the start, and the standard error of the pairs."""

    step: int
    loss: float
    change: float
    change_error: float


class TrainReport(Struct, frozen=True):
    """What a run did, as it also lies in ``training.json``. As text it is the adapter's folder, or nothing where none was written.

    ``kept`` is the state that was written, of step ``kept_step``: the ``best`` on the text held out, the ``last``, or ``nothing``, where
    the start was the best. ``held_out`` is about that state, of ``nothing`` about the last one, and so is ``retained``. ``worse`` says that
    nothing was written, or that what was is worse on the text held out by more than two standard errors.
    ``calibration`` is how ``learning_rate`` was found; None where it was given. ``measured`` is the text held out while training, after it,
    and not before; ``measuring_share`` what measuring (before and after too) and ``calibration_share`` what the calibration took, as
    shares of the time of the steps of this process. ``notices`` are what was said of the run while it ran.
    ``curve`` holds (step, mean training loss since the point before). ``step_seconds`` and its standard error are over the steps of
    this process but the first; ``peak_bytes`` is the most GPU memory that tensors took, or without a GPU the most memory this
    process had. ``resumed_from`` is the step of the checkpoint this process began at. ``left_out`` are names in the bank of weights that
    ``all-linear`` selects and that have too few directions for the rank. ``stages`` are seconds of this process by what they were spent on:
    opening (config, tokenizer, bank, what they import), imports (torch, PEFT, the Trainer, as far as left), text, rehearsal, loading,
    attaching, preparing (the Trainer), measuring before, calibration, training (with what is measured and saved meanwhile), measuring
    after. Writing the adapter is in none of them.
    """

    adapter: str
    model: str
    method: str
    rank: int
    bank: str | None
    trainable_parameters: int
    blocks: int
    length: int
    steps: int
    tokens: int
    processes: int
    dtype: str
    seconds: float
    step_seconds: float
    step_seconds_error: float
    peak_bytes: int
    resumed_from: int | None
    held_out: Change | None
    retained: tuple[Change, ...]
    curve: tuple[tuple[int, float], ...]
    learning_rate: float
    calibration: Calibration | None
    kept: Literal["best", "last", "nothing"]
    kept_step: int
    worse: bool
    measured: tuple[Measured, ...]
    measuring_share: float
    calibration_share: float
    notices: tuple[str, ...]
    stages: dict[str, float]
    left_out: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.adapter if self.kept != "nothing" else ""
