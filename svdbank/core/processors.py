"""How many processors this process may use."""

from __future__ import annotations

import os


def available_cpus() -> int:
    """Processors this process may use (its affinity, not the machine's count); ``SVDBANK_THREADS`` overrides."""
    asked = os.environ.get("SVDBANK_THREADS", "")
    if asked.isdecimal() and asked.isascii() and int(asked) > 0:
        return int(asked)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
