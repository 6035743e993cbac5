"""What happens beside the Trainer's own loop: progress, the clock, the text held out, checkpoints by the minute, and their seal."""

from __future__ import annotations

import contextlib
import math
import time
from pathlib import Path
from statistics import fmean
from typing import Any

from svdbank.core.specs import Progress, ignore_progress
from svdbank.core.units import duration
from svdbank.training import checkpoints
from svdbank.training.attaching import activate
from svdbank.training.best import Held, HeldOut
from svdbank.training.data import HELD_OUT
from svdbank.training.generators import generators_kept
from svdbank.training.losses import change_of, measure
from svdbank.training.noticing import Noticing
from svdbank.training.run import Run


def watcher(run: Run, trainer: Any, held: Held | None, noticing: Noticing, every: int) -> Any:
    """A Trainer callback: reports and times steps, measures ``every`` so many (0: never), saves by the minute, seals what was saved."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list
    from transformers import TrainerCallback

    options, clock, tell = run.options, run.clock, run.tell

    class Watcher(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.loss = ""
            self.saved = time.monotonic()

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            activate(trainer.model)  # the Trainer has just loaded a checkpoint into one adapter, and activated it alone

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            clock.begun = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            clock.steps.append(time.perf_counter() - clock.begun)
            self._tell(state)
            if held is not None and every and state.global_step % every == 0 and state.global_step < state.max_steps:
                self._measure(held, args, state, control)
            if options.save_minutes is not None and self._is_due(options.save_minutes):
                control.should_save = True

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
            if logs and "loss" in logs:
                loss = float(logs["loss"])
                self.loss = f"loss {loss:.3f}, rate {float(logs['learning_rate']):.1e}, "
                control.should_training_stop |= not math.isfinite(loss)
                noticing.logged(state.global_step, loss, logs.get("grad_norm"), args.learning_rate)
                self._tell(state)

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            processes = PartialState()
            processes.wait_for_everyone()  # each process writes its own random state
            if processes.is_main_process:
                checkpoints.seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")
            processes.wait_for_everyone()
            self.saved = time.monotonic()

        def _tell(self, state: Any) -> None:
            recent = fmean(clock.steps[1:][-20:] or clock.steps)
            left = recent * (state.max_steps - state.global_step)
            speed = f"{run.a_step * run.length / recent:.0f} tokens/s, {duration(left)} left"
            tell(Progress("training", state.global_step, state.max_steps, "step", self.loss + speed))

        def _measure(self, held: Held, args: Any, state: Any, control: Any) -> None:
            begun = time.perf_counter()
            with generators_kept():
                losses = measure(trainer, {HELD_OUT: held.windows}, ignore_progress, "")[HELD_OUT]
            is_best = held.add(HeldOut(state.global_step, tuple(losses)), trainer.model, writes=run.is_main)
            change = change_of(HELD_OUT, held.windows, held.before.losses, losses)
            said = f"{change.change:+.3f} ± {change.change_error:.3f} since the start{', the best so far' if is_best else ''}"
            tell(Progress("held out", state.global_step, state.max_steps, "step", said))
            noticing.measured(state.global_step, change.change, change.change_error, args.learning_rate)
            if options.patience is not None and held.without_gain() >= options.patience:
                control.should_training_stop = True
            clock.measuring += time.perf_counter() - begun

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
