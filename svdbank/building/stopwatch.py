"""Where the seconds of a build go."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import defaultdict
from collections.abc import Iterator


class Stopwatch:
    """Seconds by stage, summed over the threads that work beside each other."""

    def __init__(self) -> None:
        self._spent: defaultdict[str, float] = defaultdict(float)
        self._counting = threading.Lock()

    @contextlib.contextmanager
    def spending(self, stage: str) -> Iterator[None]:
        """Count the time of the block."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            with self._counting:
                self._spent[stage] += time.perf_counter() - begun

    def seconds(self) -> dict[str, float]:
        """What was spent so far."""
        with self._counting:
            return {stage: round(seconds, 4) for stage, seconds in self._spent.items()}
