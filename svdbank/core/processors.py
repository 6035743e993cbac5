"""How many processors this process may use."""

from __future__ import annotations

import os
from math import ceil
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")


def available_cpus() -> int:
    """Processors this process may use: its affinity and its cgroup's quota, not the machine's count. ``SVDBANK_THREADS`` overrides."""
    asked = os.environ.get("SVDBANK_THREADS", "")
    if asked.isdecimal() and asked.isascii() and int(asked) > 0:
        return int(asked)
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroup_quota()
    return count if quota is None else max(1, min(count, ceil(quota)))


def cgroup_quota(cgroups: Path = _CGROUPS, own: Path = Path("/proc/self/cgroup")) -> float | None:
    """Processors that the control groups of this process, and those above them, grant; None where nothing is limited (Linux)."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return None
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = cgroups / "cpu" if controllers else cgroups
        # In a container the path is that of the host, and its own group is mounted at the top.
        folder = base / path.strip("/")
        for place in (folder, *folder.parents):
            found.append(_quota(place))
            if place == base:
                break
    return min((quota for quota in found if quota is not None), default=None)


def _quota(folder: Path) -> float | None:
    """Quota over period of one group: ``cpu.max`` of version 2, two files in version 1."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        return int(quota) / int(period) if quota not in ("max", "-1") else None
    except (OSError, ValueError, ZeroDivisionError):
        return None
