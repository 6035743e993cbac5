"""Building a bank from a loaded model, in its own process, on the devices where its weights lie; one of several processes builds."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import torch

from svdbank.bank.reading import Bank, open_bank
from svdbank.building.devices import working_device
from svdbank.building.execution import work
from svdbank.building.freezing import frozen_plan
from svdbank.building.joining import Workplace, finished, joined
from svdbank.building.request import BuildRequest
from svdbank.building.survey import place
from svdbank.checkpoint.loaded import LoadedCheckpoint
from svdbank.core.errors import LockedError
from svdbank.core.specs import Progress, ProgressCallback, ShardSpec
from svdbank.solver.devices import give_back_device, kind_of

#: Seconds after which a process that waits for the one that builds looks again.
_LOOK_AGAIN = 0.2


@dataclass(frozen=True)
class Built:
    """A bank of a loaded model, and how many of its weights this process solved."""

    bank: Bank
    solved: int


def build_loaded(
    checkpoint: LoadedCheckpoint, request: BuildRequest, *, device: torch.device, progress: ProgressCallback
) -> Built:
    """Prepare, work and publish as ``svdbank.build`` does, with weights from memory; finished banks and what is recorded are used.

    Each shard is solved where its first weight lies, what comes from files on ``device``. While another process builds here, this one waits
    and then finds what it lacks: nothing, where both want the same. What was begun here with other targets, and stopped, is finished
    first. Raises as ``svdbank.build``.
    """
    solved = 0
    while True:
        try:
            asked = _begun(checkpoint, request)
            with joined(asked, device=str(device), join=False, on_cpu=False, progress=progress, opened=checkpoint) as here:
                for where, shards in _by_device(here, checkpoint, device):
                    solved += _worked(here, where, shards, request, progress)
                finished(here.prepared, progress=progress, facts=lambda: {"from": "a loaded model"})
            if asked is request:
                return Built(open_bank(here.prepared.root), solved)
        except LockedError:
            progress(Progress("wait for the process that builds this bank", 0, 1, "banks"))
            time.sleep(_LOOK_AGAIN)


def _begun(checkpoint: LoadedCheckpoint, request: BuildRequest) -> BuildRequest:
    """``request``, or where its place has an unfinished build of other targets, that one."""
    root = place(checkpoint, request)
    frozen = frozen_plan(root)
    if frozen is None or frozen.sources is None or frozen.sources.targets == request.targets:
        return request
    return msgspec.structs.replace(request, targets=frozen.sources.targets)


def _by_device(
    here: Workplace, checkpoint: LoadedCheckpoint, other: torch.device
) -> Sequence[tuple[torch.device, list[ShardSpec]]]:
    """The shards that are left by the device that solves them, ``other`` those of weights that are not held."""
    families = {family.name: family for family in here.prepared.plan.families}
    placed: dict[torch.device, list[ShardSpec]] = {}
    for shard in here.prepared.todo:
        held = checkpoint.held.get(families[shard.family].weights[shard.start])
        device = held.matrix.device if held is not None else other
        placed.setdefault(device if device.type == "cuda" else torch.device("cpu"), []).append(shard)
    return list(placed.items())


def _worked(
    here: Workplace, device: torch.device, shards: list[ShardSpec], request: BuildRequest, progress: ProgressCallback
) -> int:
    if device.type == "cuda":
        working_device(str(device))
        torch.cuda.synchronize(device)  # the weights may still be on their way there
    done = work(
        here.prepared,
        shards,
        checkpoint=here.checkpoint,
        device=device,
        jobs=request.jobs,
        progress=progress,
        lease=here.lease,
    )
    if kind_of(device) != "cpu":
        give_back_device(device)
    return done.solved
