"""States of the random generators that training draws from."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator


@contextlib.contextmanager
def generators_kept() -> Iterator[None]:
    """Whatever is drawn inside, Python's, NumPy's and torch's generators (on every device) go on as if nothing had been."""
    import numpy
    import torch

    python, numbers = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(numbers)
