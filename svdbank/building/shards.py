"""Shards with what they are made of, in the order of the work, and what of them is solved together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from svdbank.building.fetching import files_of
from svdbank.building.memory import solve_bytes
from svdbank.building.planning import planned_path
from svdbank.checkpoint.source import Checkpoint
from svdbank.core.specs import FamilySpec, Plan, ShardSpec, WeightSpec


@dataclass(frozen=True)
class ShardWork:
    """A shard with what it is made of."""

    shard: ShardSpec
    family: FamilySpec
    weights: tuple[WeightSpec, ...]


@dataclass(frozen=True)
class Batch:
    """Shards of one family that are solved together, on ``path``, ``size`` weights at a time (1: each by itself)."""

    works: tuple[ShardWork, ...]
    path: str
    size: int

    @property
    def weights(self) -> list[WeightSpec]:
        """All their weights, in order."""
        return [weight for work in self.works for weight in work.weights]

    @property
    def family(self) -> FamilySpec:
        """Theirs."""
        return self.works[0].family

    @property
    def threads(self) -> int:
        """CPU threads of a solve, as planned."""
        return self.works[0].shard.threads

    @property
    def loaded_nbytes(self) -> int:
        """Bytes of the weights in memory."""
        return sum(weight.loaded_nbytes for weight in self.weights)

    def of(self, works: Sequence[ShardWork]) -> Batch:
        """The same with some of its shards; how many are solved at a time stays, so that the bytes do."""
        return replace(self, works=tuple(works))

    def device_bytes(self, kind: str) -> int:
        """Memory of a ``kind`` of device that solving takes, with a batch that is uploaded meanwhile, in bytes."""
        first = self.works[0].weights[0]
        return solve_bytes(self.family, first, self.path, self.size, kind) + self.size * first.loaded_nbytes


def shard_works(plan: Plan, weights: Mapping[str, WeightSpec], shards: Sequence[ShardSpec]) -> list[ShardWork]:
    """``shards`` of a plan with their families and weights."""
    families = {family.name: family for family in plan.families}
    return [
        ShardWork(
            shard,
            families[shard.family],
            tuple(weights[name] for name in families[shard.family].weights[shard.start : shard.stop]),
        )
        for shard in shards
    ]


def in_order(works: Sequence[ShardWork], checkpoint: Checkpoint, *, by_file: bool) -> list[ShardWork]:
    """Work of one thread count together; where files come one by one (``by_file``), each file's work together before that.

    Work on a file waits until the last of its files is there and then comes first, so that earlier files can go.
    """
    if not by_file:
        return sorted(works, key=lambda work: work.shard.threads)
    place = _places(checkpoint)

    def order(work: ShardWork) -> tuple[int, int, int]:
        places = [place[name] for weight in work.weights for name in files_of(weight)]
        return max(places), min(places), work.shard.threads

    return sorted(works, key=order)


def batched(works: Sequence[ShardWork], plan: Plan, checkpoint: Checkpoint, kind: str, *, by_file: bool) -> list[Batch]:
    """What is solved together: on a CPU each shard alone; on a GPU as the plan says, of single weights as many as a batch has."""
    if kind == "cpu":
        return [Batch((work,), work.shard.path, 1) for work in works]
    place = _places(checkpoint)
    groups: dict[tuple[int, str], list[ShardWork]] = {}
    for work in works:
        # Files that come one by one go again one by one: what is solved together must lie in the same.
        last = max(place[name] for weight in work.weights for name in files_of(weight)) if by_file else 0
        groups.setdefault((last, work.family.name), []).append(work)
    batches = []
    for members in groups.values():
        how = planned_path(plan, members[0].family, kind)
        step = max(1, how.batch // members[0].family.weights_per_shard)
        batches += [Batch(tuple(members[i : i + step]), how.path, how.batch) for i in range(0, len(members), step)]
    return batches


def _places(checkpoint: Checkpoint) -> dict[str, int]:
    return {file.name: number for number, file in enumerate(checkpoint.files)}
