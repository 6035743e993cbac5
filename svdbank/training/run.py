"""What the steps of a run share."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from svdbank.building.stopwatch import Stopwatch
from svdbank.core.specs import ProgressCallback
from svdbank.lm.loading import CausalModel
from svdbank.training import checkpoints
from svdbank.training.checkpoints import RunRecord
from svdbank.training.options import TrainOptions, to_toml

if TYPE_CHECKING:
    from svdbank.bank.reading import Bank


@dataclass
class Clock:
    """Seconds of each step made in this process, saving and measuring left out, and of measuring while training."""

    steps: list[float] = field(default_factory=list)
    begun: float = 0.0
    measuring: float = 0.0


@dataclass
class Run:
    """Options as they were settled, the model without its weights, the bank (``lora`` has none), Transformers' settings."""

    options: TrainOptions
    output: Path
    force: bool
    model: CausalModel
    bank: Bank | None
    arguments: Any
    tell: ProgressCallback
    clock: Clock = field(default_factory=Clock)
    watch: Stopwatch = field(default_factory=Stopwatch)

    @property
    def folder(self) -> Path:
        return checkpoints.folder_of(self.output)

    @property
    def length(self) -> int:
        assert self.options.length is not None
        return self.options.length

    @property
    def processes(self) -> Any:
        from accelerate import PartialState

        return PartialState()

    @property
    def a_step(self) -> int:
        """Blocks of a step, over all processes."""
        return self.options.batch_size * self.options.accumulation * int(self.processes.num_processes)

    def steps(self, blocks: int) -> int:
        """Steps that the run makes on so many blocks, as the Trainer counts them: the last batch of a pass may be smaller."""
        options = self.options
        if options.steps is not None:
            return options.steps
        batches = math.ceil(blocks / (options.batch_size * int(self.processes.num_processes)))
        return max(1, math.ceil(options.epochs * max(1, math.ceil(batches / options.accumulation))))

    def blocks_seen(self, steps: int, blocks: int) -> int:
        """Blocks that so many steps on so many blocks trained on: the last step of a pass may have fewer. 0 blocks: a stream."""
        if blocks == 0:
            return steps * self.a_step
        passes, rest = divmod(steps, max(1, math.ceil(blocks / self.a_step)))
        return passes * blocks + min(rest * self.a_step, blocks)

    @property
    def is_main(self) -> bool:
        return bool(self.processes.is_main_process)

    def record(self, data_digest: str) -> RunRecord:
        """What has to stay as it is for the run to go on: where the adapter goes and how often is saved may change."""
        kept = msgspec.structs.replace(self.options, output="", save_steps=None, save_minutes=None)
        return RunRecord(to_toml(kept).decode(), data_digest, self.processes.num_processes)
