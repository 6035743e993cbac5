"""Shares: which shards a worker of several takes first. An order of preference, not a bound: whoever is done helps the others."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import accumulate

from svdbank.building.devices import may_have_gpu
from svdbank.building.fetching import files_of
from svdbank.building.shards import ShardWork
from svdbank.core.errors import OptionError
from svdbank.core.specs import Struct
from svdbank.solver.planning import flops


class Share(Struct, frozen=True):
    """Worker ``index`` of ``count``, from 0; ``device`` where the launcher says which one is this worker's."""

    index: int
    count: int
    device: str | None = None

    def __str__(self) -> str:
        return f"{self.index + 1}/{self.count}"


_FORM = re.compile(r"([0-9]{1,7})/([0-9]{1,7})", re.ASCII)
_AUTO = re.compile(r"auto(?:/([0-9]{1,7}))?", re.ASCII)
_LAUNCHERS = (
    "Slurm arrays (SLURM_ARRAY_TASK_ID), indexed Jobs (JOB_COMPLETION_INDEX) and torchrun (RANK, WORLD_SIZE) are recognised"
)


def parse_share(text: str, environment: Mapping[str, str]) -> Share:
    """``I/N`` (I from 1 to N), or ``auto[/N]``: what the launcher of this process says in its environment. OptionError otherwise."""
    if (form := _FORM.fullmatch(text)) is not None:
        index, count = int(form[1]), int(form[2])
        if not 1 <= index <= count:
            raise OptionError(f"--shard {text}: the shards of {count} are 1/{count} to {count}/{count}")
        return Share(index - 1, count)
    if (form := _AUTO.fullmatch(text)) is None:
        raise OptionError(f"--shard is I/N, auto or auto/N, not {text!r}", hint="--shard 1/4; --shard auto in a Slurm array")
    return _auto(None if form[1] is None else int(form[1]), environment)


def _auto(count: int | None, environment: Mapping[str, str]) -> Share:
    if count == 0:
        raise OptionError("--shard auto/0: N is the number of workers")
    if "SLURM_ARRAY_TASK_ID" in environment:
        return _slurm(count, environment)
    if "JOB_COMPLETION_INDEX" in environment:
        if count is None:
            raise OptionError(
                "--shard auto: Kubernetes says which pod of a Job this is, and not of how many",
                hint="--shard auto/N with N the completions of the Job",
            )
        return _bounded(_number(environment, "JOB_COMPLETION_INDEX"), count)
    if "RANK" in environment and ("WORLD_SIZE" in environment or count is not None):
        local = environment.get("LOCAL_RANK")
        index, count = _number(environment, "RANK"), count or _number(environment, "WORLD_SIZE")
        return Share(_bounded(index, count).index, count, f"cuda:{_number(environment, 'LOCAL_RANK')}" if local else None)
    raise OptionError(f"--shard auto: nothing here says which worker this is; {_LAUNCHERS}", hint="--shard 1/4 says it by hand")


def _slurm(count: int | None, environment: Mapping[str, str]) -> Share:
    """Place of a task in an array, from 0: Slurm counts its ids from MIN in steps of STEP; a list of ids has neither."""
    task = _number(environment, "SLURM_ARRAY_TASK_ID")
    if count is not None and "SLURM_ARRAY_TASK_MIN" not in environment:
        return Share(task % count, count)
    first, last, tasks = (_number(environment, f"SLURM_ARRAY_TASK_{name}") for name in ("MIN", "MAX", "COUNT"))
    step = _number(environment, "SLURM_ARRAY_TASK_STEP") if "SLURM_ARRAY_TASK_STEP" in environment else 1
    place, rest = divmod(task - first, max(step, 1))
    regular = rest == 0 and (last - first) // max(step, 1) + 1 == tasks
    if count is not None:
        return Share((place if regular else task) % count, count)
    if not regular:
        raise OptionError(
            f"--shard auto: this array's ids are a list ({tasks} from {first} to {last}), and Slurm does not say which place has {task}",
            hint=f"--shard auto/{tasks}, or number the array from 1 to {tasks}",
        )
    return _bounded(place, tasks)


def _bounded(index: int, count: int) -> Share:
    if not 0 <= index < count:
        raise OptionError(f"--shard auto: this is worker {index} (from 0) of {count}", hint="N is the number of all workers")
    return Share(index, count)


def _number(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name, "")
    if not (value.isdecimal() and value.isascii()):
        raise OptionError(f"--shard auto: {name} is {value!r}, not a number", hint="--shard I/N says it by hand")
    return int(value)


def own_device(share: Share | None, asked: str) -> str:
    """The device of a worker: its launcher's where that names one, and GPUs in general were asked for, or ``auto`` where there are any."""
    if share is None or share.device is None or not (asked == "cuda" or (asked == "auto" and may_have_gpu())):
        return asked
    return share.device


def cost(work: ShardWork) -> float:
    """Flops of a shard's solves: what shares are balanced by."""
    family = work.family
    return len(work.weights) * float(flops(family.out_features, family.in_features, family.rank, work.shard.path))


def divided(works: Sequence[ShardWork], count: int, places: Mapping[str, int], *, by_file: bool) -> list[list[ShardWork]]:
    """``works`` in ``count`` parts: each a run of them in the order of their bytes, of about the cost of every other.

    With ``by_file`` runs begin and end between files where there are more files than parts, so that no two of them fetch one file.
    """
    ordered = in_file_order(works, places)
    groups: dict[int, list[ShardWork]] = {}
    for number, work in enumerate(ordered):
        last = max(places[name] for weight in work.weights for name in files_of(weight)) if by_file else number
        groups.setdefault(last, []).append(work)
    if by_file and len(groups) <= count:
        return divided(works, count, places, by_file=False)
    costs = [sum(cost(work) for work in group) for group in groups.values()]
    ends = [0.0, *accumulate(costs)]
    bounds = [ends[-1] * number / count for number in range(1, count)]
    parts: list[list[ShardWork]] = [[] for _ in range(count)]
    for group, begin, end in zip(groups.values(), ends, ends[1:], strict=False):
        parts[bisect_right(bounds, (begin + end) / 2)] += group
    return parts


def in_file_order(works: Sequence[ShardWork], places: Mapping[str, int]) -> list[ShardWork]:
    """``works`` in the order of their bytes: by the last file that each needs, and where its first byte lies."""

    def order(work: ShardWork) -> tuple[int, int]:
        source = work.weights[0].sources[0]
        return max(places[name] for weight in work.weights for name in files_of(weight)), source.begin

    return sorted(works, key=order)
