"""A peak rate for AdamW that follows the model.

From the untrained adapter, :data:`STEPS` gradients of training batches go through AdamW's own moments, without moving. What a unit of rate
would have moved by then is a direction in the trainable factors. Forward passes on other training blocks, as far behind the start as
before it, give the curvature of the loss along it: the rate at which the mean of both lies :data:`RISE` nats a token above the start. The
slope, which is in the difference of both, is left out of it: from few blocks it is mostly noise. The peak rate is that rate, times a small
constant of the method. It follows whatever the loss depends on: norm gains and weights written otherwise, rank, alpha, the batch.

Forward passes on both sides of the start along the optimiser's own step: generalized Newton (GeN, arXiv 2407.02772). That the curvature
along it limits the peak rate: arXiv 2406.09405. Why the best of a few trial steps is not asked for: greedy short horizons prefer other
rates than runs do (arXiv 1803.02021).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
from torch import Tensor

from svdbank.core.specs import Progress
from svdbank.lm.blocks import first
from svdbank.training.best import FORWARDS, SHARE
from svdbank.training.generators import generators_kept
from svdbank.training.report import Calibration
from svdbank.training.run import Run

#: Gradients whose direction is taken, a step's blocks each.
STEPS = 2

#: Nats a token that the loss lies higher at the rate looked for, in the mean of both sides.
RISE = 0.05

#: The peak rate over that rate, by method: within these, five models whose best rates lie a factor of thirty apart for one method, and
#: of twenty for one model, agree (docs/training.md). The directions of PiSSA are steep at the start above all.
OVER = {"mica": 1.5, "milora": 1.0, "pissa": 2.5, "lora": 1.2}

#: Tokens set aside at least, and of a step's blocks at least where the run is too short for all of them.
TOKENS, FEWEST = 512, 256

#: Forward passes over the blocks set aside that the search makes as a rule.
PASSES = 5

#: Where the search begins, between which rates it stays, and how many pairs of forward passes it makes at most.
BEGIN, LEAST, MOST, PAIRS = 2e-3, 1e-8, 10.0, 8

#: What stands for a loss that is no number, in nats.
NO_NUMBER = 1e6

#: The rate at most over the entries of LoRA's random A (root mean square): Adam moves each by about the rate in a step.
LARGEST = 0.25

#: What is left of the rate where the steps raise the loss of other blocks by more than the bend does.
CAUTION = 0.1


def calibrate(run: Run, trainer: Any, training: Any) -> Calibration:
    """The peak rate for this model, method and text. Model, factors, generators and the order of the data are left as they were.

    Every process computes on blocks of its own and all come to the same rate.
    """
    options, begun = run.options, time.perf_counter()
    aside, groups = _blocks(training, run)
    factors = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    start = [factor.detach().clone() for factor in factors]
    was_training = trainer.model.training
    total = STEPS + 1
    run.tell(Progress("finding a rate", 0, total, "steps"))
    with generators_kept():
        try:
            direction = _direction(trainer, factors, groups, options)
            run.tell(Progress("finding a rate", STEPS, total, "steps"))
            trainer.model.eval()
            before = _loss(trainer, aside, options.batch_size)

            def change(rate: float) -> float:
                with torch.no_grad():
                    for factor, initial, by in zip(factors, start, direction, strict=True):
                        factor.copy_(initial - rate * by)
                found = _loss(trainer, aside, options.batch_size) - before
                return found if math.isfinite(found) else NO_NUMBER

            bend, curve = find_bend(change)
        finally:
            with torch.no_grad():
                for factor, initial in zip(factors, start, strict=True):
                    factor.copy_(initial)
                    factor.grad = None
            trainer.model.train(was_training)
    size = (
        median(float(factor.square().mean().sqrt()) for factor in start if factor.any()) if options.method == "lora" else None
    )
    rate, why = choose(options.method, bend, curve, size)
    rate = _agreed(rate, run)
    run.tell(Progress("finding a rate", total, total, "steps", f"{rate:.3g}"))
    processes = run.processes.num_processes
    return Calibration(
        rate=rate,
        bend=bend,
        curve=curve,
        steps=STEPS,
        blocks=processes * sum(map(len, groups)),
        aside=processes * len(aside),
        why=why,
        seconds=time.perf_counter() - begun,
    )


def find_bend(change: Callable[[float], float]) -> tuple[float | None, tuple[tuple[float, float, float], ...]]:
    """The rate where the mean of ``change`` ahead (at the rate) and behind (at minus it) is :data:`RISE`; and what was asked, by rate.

    The mean grows with the square of the rate where the loss is a parabola, so that two or three pairs are enough; it is taken once it
    lies between a half and twice of what is looked for. None where that is not between :data:`LEAST` and :data:`MOST`.
    """
    found: dict[float, tuple[float, float]] = {}
    low, high = (LEAST, 0.0), (MOST, math.inf)
    rate = BEGIN
    for _ in range(PAIRS):
        ahead, behind = change(rate), change(-rate)
        found[rate] = ahead, behind
        mean = (ahead + behind) / 2
        if RISE / 2 <= mean <= 2 * RISE:
            return rate * math.sqrt(RISE / mean), _curve(found)
        low, high = ((rate, mean), high) if mean < RISE else (low, (rate, mean))
        if low[0] > LEAST and high[0] < MOST:
            rate = _between(low, high)
        else:
            rate = min(max(rate * math.sqrt(RISE / mean) if mean > 0 else math.inf, rate / 10, LEAST), rate * 10, MOST)
    return (_between(low, high) if low[0] > LEAST and high[0] < MOST else None), _curve(found)


def _between(low: tuple[float, float], high: tuple[float, float]) -> float:
    """Where a power of the rate through both points is :data:`RISE`, kept off their ends; the middle where one of them is far off."""
    share = 0.5
    if low[1] > 0 and high[1] < 100 * RISE:
        share = min(max(math.log(RISE / low[1]) / math.log(high[1] / low[1]), 0.1), 0.9)
    return float(low[0] * (high[0] / low[0]) ** share)


def _curve(found: dict[float, tuple[float, float]]) -> tuple[tuple[float, float, float], ...]:
    return tuple((rate, *found[rate]) for rate in sorted(found))


def choose(
    method: str, bend: float | None, curve: tuple[tuple[float, float, float], ...], size: float | None = None
) -> tuple[float, str]:
    """The peak rate, and why. ``size`` is that of the entries of random factors, where there are some."""
    if bend is None:
        return curve[0][0] * CAUTION, (
            f"no rate tried raised the loss by {RISE} nats in the mean of both sides: a tenth of the smallest one; give --learning-rate"
        )
    rate = OVER[method] * bend
    why = f"at {bend:.2g} the first {STEPS} steps bend the loss of others up by {RISE} nats; {method} takes {OVER[method]:g} times that"
    _, ahead, behind = min(curve, key=lambda point: abs(math.log(point[0] / bend)))
    if (ahead - behind) / 2 > RISE:
        rate *= CAUTION
        why += f"; a tenth of it, because those steps raise the loss of other blocks ({ahead:+.3f} ahead, {behind:+.3f} behind)"
    if size is not None and rate > LARGEST * size:
        rate = LARGEST * size
        why += f"; no more than {LARGEST:g} of the entries of A, {size:.2g}, which a few steps would write over"
    return float(f"{rate:.3g}"), why


def blocks_of(steps: int, a_step: int, length: int, processes: int = 1) -> tuple[int, int]:
    """Blocks set aside, over all processes, and a process's blocks of each step for the direction.

    Those of a step are as many as the run has, ``a_step``, or fewer in a short run, so that all takes a tenth of the time of its
    ``steps`` where :data:`FEWEST` tokens are enough for that.
    """
    aside = max(processes, -(-TOKENS // length))
    passes = SHARE * steps * a_step * FORWARDS - PASSES * aside / processes
    return aside, min(a_step, max(1, -(-FEWEST // length), int(passes / (STEPS * FORWARDS))))


def _blocks(training: Any, run: Run) -> tuple[list[Any], list[list[Any]]]:
    """This process's blocks set aside, and its blocks of each step; all processes together have those that one would have.

    With too few blocks for all, steps share theirs.
    """
    processes, own = run.processes.num_processes, run.processes.process_index
    steps = run.steps(len(training) if hasattr(training, "select") else 0)
    if hasattr(training, "select"):
        training = training.shuffle(seed=run.options.seed + 1)
    aside, a_step = blocks_of(steps, run.options.batch_size * run.options.accumulation, run.length, processes)
    rows = list(first(training, aside + STEPS * a_step * processes))
    aside = max(1, min(aside, len(rows) // 2))
    rest = rows[aside:] or rows
    groups = [[rest[((step * processes + own) * a_step + i) % len(rest)] for i in range(a_step)] for step in range(STEPS)]
    return rows[:aside][own::processes] or rows[:1], groups


def _direction(trainer: Any, factors: list[Any], groups: list[list[Any]], options: Any) -> list[Tensor]:
    """What AdamW moves each factor by in so many steps at a rate of one, with the gradients of the factors as they are."""
    if options.gradient_checkpointing:
        trainer.model.gradient_checkpointing_enable()  # as the Trainer does when it begins
        trainer.model.train()
    else:
        trainer.model.eval()
    (beta, other), epsilon = (trainer.args.adam_beta1, trainer.args.adam_beta2), trainer.args.adam_epsilon
    mean, square, moved = ([torch.zeros_like(factor, dtype=torch.float32) for factor in factors] for _ in range(3))
    for step, rows in enumerate(groups, 1):
        for factor, gradient in enumerate(_gradient(trainer, factors, rows, options)):
            mean[factor].lerp_(gradient, 1 - beta)
            square[factor].lerp_(gradient.square(), 1 - other)
            scale = (square[factor] / (1 - other**step)).sqrt_().add_(epsilon)
            moved[factor].addcdiv_(mean[factor], scale, value=1 / (1 - beta**step))
    return moved


def _gradient(trainer: Any, factors: list[Any], rows: list[Any], options: Any) -> list[Tensor]:
    """Float32 gradient of the mean loss, over all processes, clipped as the run clips."""
    from accelerate.utils import reduce

    scale = 2.0**12 if options.dtype == "float16" else 1.0  # small gradients underflow in float16
    for factor in factors:
        factor.grad = None
    for inputs in _batches(trainer, rows, options.batch_size):
        torch.autograd.backward(scale * _computed(trainer, inputs))
    gradients = [torch.zeros_like(f) if f.grad is None else f.grad for f in factors]
    gradients = [
        reduce(gradient.float(), "mean") / (scale * math.ceil(len(rows) / options.batch_size)) for gradient in gradients
    ]
    norm = float(torch.stack([gradient.norm() for gradient in gradients]).norm())
    if options.clip and norm > options.clip:
        gradients = [gradient * (options.clip / norm) for gradient in gradients]
    return gradients


def _loss(trainer: Any, rows: list[Any], batch: int) -> float:
    """Mean loss of the blocks of all processes."""
    from accelerate.utils import reduce

    with torch.no_grad():
        losses = torch.stack([_computed(trainer, inputs).float() for inputs in _batches(trainer, rows, batch)])
    return float(reduce(losses.mean(), "mean"))


def _batches(trainer: Any, rows: list[Any], batch: int) -> Iterator[Any]:
    for begin in range(0, len(rows), batch):
        yield trainer._prepare_inputs(trainer.data_collator(rows[begin : begin + batch]))


def _computed(trainer: Any, inputs: Any) -> Tensor:
    """The loss as training computes it."""
    with trainer.accelerator.autocast():
        loss: Tensor = trainer.compute_loss(trainer.model, inputs)
    return loss


def _agreed(rate: float, run: Run) -> float:
    """The main process's rate: sums may end in other bits elsewhere."""
    from accelerate.utils import broadcast_object_list

    rates = [rate]
    if run.processes.num_processes > 1:
        broadcast_object_list(rates)
    return rates[0]
