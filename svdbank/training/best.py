"""The text held out, measured while training; the best state so far, kept beside the checkpoints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svdbank.core import disk
from svdbank.core.errors import CheckpointError
from svdbank.core.specs import Struct, from_json, to_json
from svdbank.lm.windows import Window

if TYPE_CHECKING:
    from torch import Tensor

BEST, MEASURED = "best.safetensors", "measured.json"

#: Forward passes over a block that cost what a step's share of it costs: the base's own gradients are not computed.
FORWARDS = 2

#: Share of the time of the steps that measuring takes at most, and blocks and measurements between which it does.
SHARE, FEWEST, MOST, TIMES = 0.1, 16, 64, 20


class HeldOut(Struct, frozen=True):
    """Summed losses of the windows held out after a step, in nats."""

    step: int
    losses: tuple[float, ...]

    @property
    def total(self) -> float:
        return math.fsum(self.losses)


class _Measured(Struct, frozen=True):
    states: tuple[HeldOut, ...]


def blocks_measured(steps: int, a_step: int) -> int:
    """Blocks of text held out to measure at the start, at the end and twice between in a tenth of the time, where those are enough."""
    return max(FEWEST, min(MOST, int(SHARE * steps * a_step * FORWARDS / 4)))


def measured_every(steps: int, a_step: int, blocks: int, *, patience: int | None = None) -> int:
    """Steps from one measurement of so many blocks to the next; 0 where the start and the end alone take a tenth of the time.

    Where ``patience`` waits for more measurements than that, there are as many. From counts, not from seconds: a run that is done again
    measures at the same steps and keeps the same state.
    """
    left = SHARE * steps * a_step * FORWARDS - 2 * blocks
    times = min(max(min(TIMES, int(left // blocks)), patience + 1 if patience else 0), steps - 1)
    return -(-steps // (times + 1)) if times > 0 else 0


class Held:
    """States measured in a run's folder, in which the main process alone reads and writes after the start."""

    def __init__(self, folder: Path, windows: Sequence[Window], before: Sequence[float]) -> None:
        self.folder = folder
        self.windows = windows
        self.before = HeldOut(0, tuple(before))
        self.states: list[HeldOut] = []

    def resume(self, step: int) -> None:
        """Take up what was measured up to the checkpoint of ``step``: later steps are made again."""
        path = self.folder / MEASURED
        if path.is_file():
            known = from_json(path.read_bytes(), _Measured, where=str(path), error=CheckpointError)
            self.states = [state for state in known.states if state.step <= step]

    def add(self, state: HeldOut, model: Any, *, writes: bool) -> bool:
        """Keep a measured state, its factors too where it is the best so far; whether it is."""
        from safetensors.torch import save

        is_best = state.total < min(known.total for known in (self.before, *self.states))
        self.states.append(state)
        if writes:
            if is_best:
                note = {"state": to_json(state).decode()}
                disk.write_bytes(self.folder / BEST, save(factors(model), metadata=note))
            disk.write_bytes(self.folder / MEASURED, to_json(_Measured(tuple(self.states))))
        return is_best

    def best(self, processes: Any) -> HeldOut | None:
        """The state whose factors are kept; None where no measured one was better than the start."""
        return _told(self._read() if processes.is_main_process else None, processes)

    def restore(self, model: Any, processes: Any) -> HeldOut:
        """Put the best state's factors into the model; that state."""
        import torch
        from accelerate.utils import broadcast
        from safetensors.torch import load_file

        state = self.best(processes)
        assert state is not None
        kept = load_file(self.folder / BEST) if processes.is_main_process else {}
        with torch.no_grad():
            for name, parameter in _trainable(model).items():
                if name in kept:
                    parameter.copy_(kept[name])
                if processes.num_processes > 1:
                    parameter.copy_(broadcast(parameter.detach().clone()))
        return state

    def _read(self) -> HeldOut | None:
        from safetensors import safe_open

        path = self.folder / BEST
        if not path.is_file():
            return None
        with safe_open(path, framework="pt") as file:
            return from_json(file.metadata()["state"].encode(), HeldOut, where=str(path), error=CheckpointError)

    def without_gain(self) -> int:
        """Measurements in a row since the last that was better than all before it."""
        lowest, since = self.before.total, 0
        for state in self.states:
            since = 0 if state.total < lowest else since + 1
            lowest = min(lowest, state.total)
        return since


def factors(model: Any) -> dict[str, Tensor]:
    """Everything that training changes, by its name in the model, on the CPU."""
    return {name: parameter.detach().cpu().clone().contiguous() for name, parameter in _trainable(model).items()}


def _told(value: HeldOut | None, processes: Any) -> HeldOut | None:
    """The main process's value, in every process."""
    from accelerate.utils import broadcast_object_list

    values = [value]
    if processes.num_processes > 1:
        broadcast_object_list(values)
    return values[0]


def _trainable(model: Any) -> dict[str, Any]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
