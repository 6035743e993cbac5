"""What happens beside the Trainer's own loop: progress, the clock, checkpoints by the minute, and their seal."""

from __future__ import annotations

import contextlib
import math
import time
from pathlib import Path
from typing import Any

from svdbank.core.specs import Progress, ProgressCallback
from svdbank.training import checkpoints
from svdbank.training.attaching import activate
from svdbank.training.run import Clock


def watcher(tell: ProgressCallback, clock: Clock, save_minutes: float | None, model: Any) -> Any:
    """A Trainer callback that reports steps, times them, asks for a checkpoint every ``save_minutes`` and seals what was written."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list
    from transformers import TrainerCallback

    class Watcher(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.loss = ""
            self.saved = time.monotonic()

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            activate(model)  # the Trainer has just loaded a checkpoint into one adapter, and activated it alone

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            clock.begun = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            clock.steps.append(time.perf_counter() - clock.begun)
            tell(Progress("training", state.global_step, state.max_steps, "step", self.loss))
            if save_minutes is not None and self._is_due(save_minutes):
                control.should_save = True

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
            if logs and "loss" in logs:
                self.loss = f"loss {float(logs['loss']):.3f}"
                control.should_training_stop |= not math.isfinite(float(logs["loss"]))
                tell(Progress("training", state.global_step, state.max_steps, "step", self.loss))

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            processes = PartialState()
            processes.wait_for_everyone()  # each process writes its own random state
            if processes.is_main_process:
                checkpoints.seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")
            processes.wait_for_everyone()
            self.saved = time.monotonic()

        def _is_due(self, minutes: float) -> bool:
            """The main process's clock decides for all: a checkpoint is written by all or by none."""
            due = [time.monotonic() - self.saved >= 60 * minutes]
            if PartialState().num_processes > 1:
                broadcast_object_list(due)
            return due[0]

    return Watcher()


def peak_bytes() -> int:
    """The most GPU memory that tensors took, or without a GPU the most memory this process had."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: bytes
