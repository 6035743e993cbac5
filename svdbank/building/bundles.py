"""Bundles: how many shards a worker of a cluster is given at a time. The largest come first, small ones by the seconds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from svdbank.building.shards import ShardWork
from svdbank.building.shares import cost, in_file_order

#: Seconds of work that a bundle is made for: long beside what it costs to hand one over, short beside a build.
SECONDS = 3.0

#: What is left is divided so that each worker gets some more bundles: nobody waits long for the last one.
_LEFT_EACH = 2

#: Flops a second that are assumed before any were measured, and seconds that a shard takes whatever its size.
_FLOPS, _EACH = 1e10, 2e-3


class Bundles:
    """The shards that nobody has been given, and how long those of each size take.

    ``least`` says how many shards of a kind make sense together: what is solved at once.
    """

    def __init__(
        self, works: Sequence[ShardWork], places: Mapping[str, int], least: Callable[[ShardWork], int] = lambda _: 1
    ) -> None:
        ordered = in_file_order(works, places)
        #: From the last to the first. Of equal cost a family's own together, in the order of their bytes.
        self._left = sorted(ordered, key=lambda work: (-cost(work), work.family.name))[::-1]
        self._counts = Counter(cost(work) for work in works)
        self._least = least
        self._rate = _FLOPS
        #: Seconds of a shard, by its flops.
        self._measured: dict[float, float] = {}

    def __len__(self) -> int:
        return len(self._left)

    def next(self, workers: int, is_left: Callable[[ShardWork], bool] = lambda _: True) -> tuple[ShardWork, ...]:
        """The next bundle where ``workers`` share what is left, without shards that are not left; empty where none are."""
        total = sum(count * self._seconds(flops) for flops, count in self._counts.items())
        most = min(SECONDS, total / (_LEFT_EACH * max(1, workers)))
        bundle: list[ShardWork] = []
        spent, least = 0.0, 1
        while self._left and (len(bundle) < least or spent + self._seconds(cost(self._left[-1])) <= most):
            work = self._left.pop()
            self._counts[cost(work)] -= 1
            if is_left(work):
                least = least if bundle else self._least(work)
                bundle.append(work)
                spent += self._seconds(cost(work))
        return tuple(bundle)

    def back(self, works: Iterable[ShardWork]) -> None:
        """Shards whose worker is gone: they come next, in their order."""
        again = list(works)
        self._left += again[::-1]
        self._counts.update(cost(work) for work in again)

    def took(self, bundle: Sequence[ShardWork], seconds: float) -> None:
        """A bundle took so long."""
        flops = [cost(work) for work in bundle]
        if not flops or seconds <= 0:
            return
        factor = seconds / sum(self._seconds(each) for each in flops)
        self._measured |= {each: factor * self._seconds(each) for each in set(flops)}
        self._rate = sum(flops) / seconds

    def _seconds(self, flops: float) -> float:
        """What a shard will take: as the last of its cost did, or as its flops say."""
        return self._measured.get(flops, flops / self._rate + _EACH)
