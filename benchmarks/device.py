"""What benchmarks on a GPU share: times with synchronisation, facts about the card, goals and the table of them."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch


@dataclass(frozen=True)
class Goal:
    """One figure with what it is to reach: at least ``target``, or at most where ``at_most``."""

    what: str
    ours: str
    rival: str
    value: float
    target: float
    at_most: bool = False

    @property
    def met(self) -> bool:
        return self.value <= self.target if self.at_most else self.value >= self.target

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "met": self.met}


def table(goals: Sequence[Goal]) -> str:
    """All goals, one a line, as Markdown."""
    rows = [("what", "ours", "against", "ratio", "target", "")]
    rows += [
        (
            goal.what,
            goal.ours,
            goal.rival,
            f"{goal.value:.3g}",
            ("≤ " if goal.at_most else "≥ ") + f"{goal.target:g}",
            "met" if goal.met else "MISSED",
        )
        for goal in goals
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "| " + " | ".join("-" * max(width, 3) for width in widths) + " |")
    return "\n".join(lines)


@dataclass
class Results:
    """What was found so far: each row is printed and written when it comes, so that a run that is cut off leaves what it had."""

    environment: dict[str, Any]
    path: Path | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def add(self, row: dict[str, Any], *goals: Goal) -> None:
        """Keep one row and the goals that it decides."""
        self.rows.append(row)
        self.goals += goals
        shown = [f"{key} {_short(value)}" for key, value in row.items() if key != "section"]
        print(f"[{row['section']}] " + " · ".join(shown), flush=True)
        self.write()

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        """One part of a run; where it fails, the others still come."""
        begun = time.perf_counter()
        try:
            yield
        except Exception:
            traceback.print_exc()
            self.failed.append(name)
        print(f"-- {name} done after {time.perf_counter() - begun:.0f} s", flush=True)

    def write(self) -> None:
        """The file of all results, if one was asked for."""
        if self.path is None:
            return
        content = {"environment": self.environment, "rows": self.rows, "targets": [goal.record() for goal in self.goals]}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    def close(self) -> int:
        """Print the table of goals; the exit code of the benchmark, 1 where a part of it failed (a goal missed is a result)."""
        print("\n" + table(self.goals))
        if self.failed:
            print(f"failed: {', '.join(self.failed)}", file=sys.stderr)
        return 1 if self.failed else 0


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def synchronise(device: torch.device) -> None:
    """Wait until everything that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(device: torch.device, work: Callable[[], Any]) -> tuple[float, Any]:
    """Wall-clock seconds of one run, from an idle device to an idle device, and its result."""
    synchronise(device)
    begun = time.perf_counter()
    result = work()
    synchronise(device)
    return time.perf_counter() - begun, result


def timed_median(device: torch.device, work: Callable[[], Any], repeats: int, *, warm: bool = True) -> tuple[float, Any]:
    """Median seconds of ``repeats`` runs after, with ``warm``, one that does not count; and the last result."""
    if warm:
        work()
    seconds, result = [], None
    for _ in range(repeats):
        result = None  # two results at a time would count twice in memory
        taken, result = timed(device, work)
        seconds.append(taken)
    return median(seconds), result


def start(device: torch.device) -> None:
    """Create the device's context and load its linear algebra, so that the first figure does not pay for it."""
    small = torch.randn(96, 64, dtype=torch.float64, device=device)
    gram = small.mT @ small
    torch.linalg.cholesky_ex(gram)
    torch.cholesky_inverse(torch.linalg.cholesky(gram))
    torch.linalg.solve_triangular(gram, small.mT, upper=False)
    torch.linalg.qr(small)
    torch.linalg.eigh(gram)
    torch.linalg.svd(small, full_matrices=False)
    torch.linalg.svd(small.to(torch.float32), full_matrices=False)
    synchronise(device)


def commit() -> str:
    """The short hash of what is measured; ``SVDBANK_COMMIT`` where the folder is not a git repository."""
    if given := os.environ.get("SVDBANK_COMMIT"):
        return given
    try:
        asked = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return asked.stdout.strip() or "unknown"


def processor() -> str:
    """The CPU's name as the system gives it."""
    listed = Path("/proc/cpuinfo")
    names = listed.read_text().splitlines() if listed.exists() else []
    found = [line.partition(":")[2].strip() for line in names if line.startswith("model name")]
    return found[0] if found else platform.processor()


def facts(device: torch.device) -> dict[str, Any]:
    """The card and what runs on it."""
    if device.type != "cuda":
        return {"device": str(device)}
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": str(device),
        "card": torch.cuda.get_device_name(device),
        "capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
        "card memory GB": round(properties.total_memory / 1e9, 1),
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "float32 products": torch.get_float32_matmul_precision(),
    }


def environment(device: torch.device, module: str) -> dict[str, Any]:
    """What a figure is worth nothing without."""
    return {
        "command": " ".join([f"python -m benchmarks.{module}", *sys.argv[1:]]),
        "commit": commit(),
        **facts(device),
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }


def show(environment: dict[str, Any]) -> None:
    for key, value in environment.items():
        print(f"{key}: {value}", flush=True)
