"""What a run of ``train`` did, in figures."""

from __future__ import annotations

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


class TrainReport(Struct, frozen=True):
    """What a run did, as it also lies in ``training.json``. As text it is the adapter's folder.

    ``curve`` holds (step, mean training loss since the point before). ``step_seconds`` and its standard error are over the steps of
    this process but the first; ``peak_bytes`` is the most GPU memory that tensors took, or without a GPU the most memory this
    process had. ``resumed_from`` is the step of the checkpoint this process began at. ``left_out`` are names in the bank of weights that
    ``all-linear`` selects and that have too few directions for the rank.
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
    left_out: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.adapter
