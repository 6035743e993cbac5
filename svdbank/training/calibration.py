"""A peak rate for AdamW that follows the model: a range test on the first steps, which moves nothing for good.

From the untrained adapter, :data:`STEPS` gradients of training batches go through AdamW's own moments, without moving. What a unit of rate
would have moved by then is a direction in the trainable factors. Forward passes on other training blocks find how far along it the loss
of the middle one of them is :data:`RISE` nats a token higher than at the start: the rate at which these steps do harm. The peak rate is a
fixed share of that, by method. It follows whatever the loss depends on: norm gains and weights written otherwise, rank, alpha, the batch.

Why the middle one: text repeats itself, and a block that is nearly one of those that gave the direction changes ten times as much as any
other. Why so far out: near the start the change is mostly slope, which a few blocks do not know, and its curvature says little of what a
run may do where the loss is no parabola. That it is not symmetric, so that behind the start it tells nothing of what lies ahead, was seen
on SmolLM2. Range tests: arXiv 1506.01186. That a few trial steps are not simply compared and the best is taken, because greedy short
horizons prefer other rates than runs do: arXiv 1803.02021.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from statistics import median
from typing import Any

import torch
from torch import Tensor

from svdbank.core.specs import Progress
from svdbank.lm.blocks import first
from svdbank.training.generators import generators_kept
from svdbank.training.limits import BEGIN, RISE, find_limit, middle
from svdbank.training.report import Calibration
from svdbank.training.run import Run

#: Gradients whose direction is taken, a step's blocks each.
STEPS = 2

#: The peak rate over that rate, by method: with these, five models whose best rates lie a factor of thirty apart for one method, and of
#: twenty for one model, agree (docs/training.md).
SHARES = {"mica": 0.35, "milora": 0.28, "pissa": 0.55, "lora": 0.25}

#: Tokens set aside, and of a step's blocks at most. A step of more tokens has a direction that does harm sooner, and a run of such steps
#: takes larger rates and not smaller ones.
TOKENS, A_STEP = 512, 256

#: Tokens at the head of a block that are looked at: several blocks, and not one long one.
HEAD = 128

#: The rate at most over the entries of LoRA's random A (root mean square): Adam moves each by about the rate in a step.
LARGEST = 0.25

#: The rate over the smallest one tried, where none of them does harm, or all do.
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
            before = _losses(trainer, aside)

            def change(rate: float, rows: list[Any], before: list[float]) -> float:
                with torch.no_grad():
                    for factor, initial, by in zip(factors, start, direction, strict=True):
                        factor.copy_(initial - rate * by)
                return middle(_losses(trainer, rows), before)

            # Where about, from one block (of each process); then from all.
            near, _ = find_limit(lambda rate: change(rate, aside[:1], before[:: len(aside)]), within=4.0)
            limit, curve = find_limit(lambda rate: change(rate, aside, before), begin=near or BEGIN, step=2.0 if near else 4.0)
        finally:
            with torch.no_grad():
                for factor, initial in zip(factors, start, strict=True):
                    factor.copy_(initial)
                    factor.grad = None
            trainer.model.train(was_training)
    size = (
        median(float(factor.square().mean().sqrt()) for factor in start if factor.any()) if options.method == "lora" else None
    )
    rate, why = choose(options.method, limit, curve, size)
    rate = _agreed(rate, run)
    run.tell(Progress("finding a rate", total, total, "steps", f"{rate:.3g}"))
    processes = run.processes.num_processes
    return Calibration(
        rate=rate,
        limit=limit,
        curve=curve,
        steps=STEPS,
        blocks=processes * sum(map(len, groups)),
        aside=processes * len(aside),
        why=why,
        seconds=time.perf_counter() - begun,
    )


def choose(
    method: str, limit: float | None, curve: tuple[tuple[float, float], ...], size: float | None = None
) -> tuple[float, str]:
    """The peak rate, and why. ``size`` is that of the entries of random factors, where there are some."""
    if limit is None:
        return curve[0][0] * CAUTION, (
            f"no rate tried raised the loss by {RISE} nats, or all did: a tenth of the smallest one; give --learning-rate"
        )
    rate = SHARES[method] * limit
    why = f"at {limit:.2g} the first {STEPS} steps harm other blocks; {method} takes {SHARES[method]:g} of that"
    if size is not None and rate > LARGEST * size:
        rate = LARGEST * size
        why += f"; no more than {LARGEST:g} of the entries of A, {size:.2g}, which a few steps would write over"
    return float(f"{rate:.3g}"), why


def blocks_of(a_step: int, length: int, processes: int = 1) -> tuple[int, int]:
    """Heads of blocks set aside, over all processes, and a process's of each step for the direction: ``a_step`` as in the run, or fewer."""
    head = min(length, HEAD)
    return processes * -(-TOKENS // (head * processes)), min(a_step, -(-A_STEP // (head * processes)))


def _blocks(training: Any, run: Run) -> tuple[list[Any], list[list[Any]]]:
    """This process's blocks set aside, and its blocks of each step; all processes together have those that one would have.

    With too few blocks for all, steps share theirs.
    """
    processes, own = run.processes.num_processes, run.processes.process_index
    if hasattr(training, "select"):
        training = training.shuffle(seed=run.options.seed + 1)
    aside, a_step = blocks_of(run.options.batch_size * run.options.accumulation, run.length, processes)
    wanted = aside + STEPS * a_step * processes
    rows = [_head(row) for row in first(training, wanted)]
    if len(rows) < wanted:
        aside = max(1, min(aside, len(rows) // 2))
    rest = rows[aside:] or rows
    groups = [[rest[((step * processes + own) * a_step + i) % len(rest)] for i in range(a_step)] for step in range(STEPS)]
    # Each process has as many: those of all are put together.
    return [rows[(own + i * processes) % aside] for i in range(-(-aside // processes))], groups


def _head(block: dict[str, Any]) -> dict[str, Any]:
    return {
        "input_ids": block["input_ids"][:HEAD],
        "starts": [start for start in block["starts"] if start < HEAD],
        "context": block["context"],
    }


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


def _losses(trainer: Any, rows: list[Any]) -> list[float]:
    """Loss of each block, of those of all processes."""
    from accelerate.utils import gather

    with torch.no_grad():
        losses = torch.stack([_computed(trainer, inputs).float() for inputs in _batches(trainer, rows, 1)])
    found: list[float] = gather(losses).tolist()
    return found


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
