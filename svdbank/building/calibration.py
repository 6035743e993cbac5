"""The rates of a device, taken now: the real solver on random matrices, real records and a real publish in a folder that goes again."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from svdbank.building.bookkeeping import kept_books
from svdbank.building.devices import working_device
from svdbank.building.memory import IN_FLIGHT
from svdbank.building.rates import Rates, SolveRate
from svdbank.core.processors import available_cpus
from svdbank.core.specs import Progress, ProgressCallback, ignore_progress
from svdbank.core.version import __version__
from svdbank.solver import batch_bases, choose_path, flops, minor_basis, on_own_stream, pinned_threads
from svdbank.solver.devices import kind_of, start
from svdbank.solver.planning import ITERATE_FROM

_RANK, _SMALL_RANK = 128, 16

#: (out, in, rank) from small to large: square, wide, tall, experts; the last are left out where the time is up.
_ON_CPU = (
    (192, 576, _RANK),
    (576, 576, _RANK),
    (576, 1536, _RANK),
    (1536, 576, _RANK),
    (576, 1536, _SMALL_RANK),
    (768, 2048, _RANK),
    (1024, 1024, _RANK),
    (1024, 4096, _RANK),
    (4096, 1024, _RANK),
    (2048, 2048, _SMALL_RANK),
    (2048, 2048, _RANK),
    (2048, 5632, _RANK),
    (5632, 2048, _RANK),
    (4096, 4096, _RANK),
)
_ON_GPU = (
    (512, 4096, _RANK),
    (768, 2048, _RANK),
    (1024, 4096, _RANK),
    (4096, 1024, _RANK),
    (2048, 5632, _RANK),
    (5632, 2048, _RANK),
    (4096, 4096, _SMALL_RANK),
    (4096, 4096, _RANK),
    (4096, 14336, _RANK),
    (14336, 4096, _RANK),
    (8192, 8192, _RANK),
    (8192, 28672, _RANK),
)
#: (out, in, weights) of batches on a GPU.
_BATCHES = ((768, 2048, 64), (2048, 768, 64), (1536, 4096, 32), (2048, 7168, 16))

#: Seconds for solves alone; no solve begins that would end after.
_TIME = 45.0
#: Solves that take less than this are timed more often, and the median is taken.
_SHORT, _REPEATS = 1.0, 5


def measured_rates(device: str, *, folder: Path | None = None, progress: ProgressCallback = ignore_progress) -> Rates:
    """The rates of ``device`` here and now, in about a minute; nothing else should be running. Writing is measured in ``folder``.

    Raises OptionError for a device that is not here, DeviceError for one that does not compute.
    """
    where = working_device(device)
    kind, here = kind_of(where), available_cpus()
    told = _Told(progress)
    with pinned_threads(1):
        start(where)
        solves = [*_solves(where, here, told)]
        at_once = here if kind == "cpu" else IN_FLIGHT
        told.next("several at once")
        slowdown = _slowdown(where, at_once)
        upload = None if kind == "cpu" else _upload(where)
        told.next("reading and writing")
        with tempfile.TemporaryDirectory(prefix=".svdbank-rates-", dir=folder) as place:
            books = kept_books(Path(place))
    told.next("start-up")
    return Rates(
        format=1,
        kind=kind,
        device=_name(where, here),
        measured=True,
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        versions={"svdbank": __version__, "torch": str(torch.__version__), "zarr": importlib.metadata.version("zarr")}
        | {"python": platform.python_version()},
        notes=(),
        processors=here if kind == "cpu" else max(1, here // torch.cuda.device_count()),
        at_once=at_once,
        slowdown=slowdown,
        solves=tuple(solves),
        read=books.read,
        hash=books.hash,
        disk=books.disk,
        upload=upload,
        write=books.write,
        shard=books.shard,
        weight=books.weight,
        busy=books.busy,
        publish=books.publish,
        start=_start(where),
    )


class _Told:
    def __init__(self, progress: ProgressCallback) -> None:
        self._progress, self._done = progress, 0

    def next(self, what: str) -> None:
        self._progress(Progress("measure", self._done, len(_ON_GPU) + len(_ON_CPU) + 3, "steps", what))
        self._done += 1


def _random(out_features: int, in_features: int, seed: int = 0) -> Tensor:
    """A random bulk and 32 strong directions, up to 30 times its edge, as trained weights have them; bfloat16 (out, in)."""
    generator = torch.Generator().manual_seed(seed)
    bulk = torch.randn(out_features, in_features, generator=generator)
    count = min(32, out_features, in_features)
    left, right = (torch.randn(side, count, generator=generator) / side**0.5 for side in (out_features, in_features))
    edge = out_features**0.5 + in_features**0.5
    weight: Tensor = (bulk + (left * (3 * edge * torch.logspace(0, 1, count))) @ right.mT).to(torch.bfloat16)
    return weight


def _solves(device: torch.device, here: int, told: _Told) -> Iterator[SolveRate]:
    kind, ends = kind_of(device), time.perf_counter() + _TIME
    rate = 0.0
    for out_features, in_features, rank in _ON_CPU if kind == "cpu" else _ON_GPU:
        shape = (out_features, in_features)
        told.next(f"{out_features}x{in_features}, rank {rank}")
        path = choose_path(*shape, rank, kind)
        large = kind == "cpu" and min(shape) >= ITERATE_FROM
        weight = _random(*shape)
        for threads in sorted({1, here}) if large else (1,):
            if rate and time.perf_counter() + flops(*shape, rank, path) / rate > ends:
                continue
            with pinned_threads(threads):
                seconds = _timed(device, partial(minor_basis, weight.to(device), rank, solver=path))
            if threads == 1:
                rate = flops(*shape, rank, path) / seconds
            yield SolveRate(*shape, rank=rank, path=path, threads=threads, batch=1, seconds=seconds)
    for out_features, in_features, count in _BATCHES if kind == "cuda" else ():
        weights = [_random(out_features, in_features, seed).to(device) for seed in range(count)]
        seconds = _timed(device, partial(batch_bases, weights, _RANK, count)) / count
        yield SolveRate(out_features, in_features, rank=_RANK, path="filter", threads=1, batch=count, seconds=seconds)


def _timed(device: torch.device, call: Callable[[], object]) -> float:
    """Seconds of a call, the median where it is short; the first of a short one is not counted."""
    found: list[float] = []
    while len(found) < _REPEATS + 1:
        begun = time.perf_counter()
        on_own_stream(device, call)
        found.append(time.perf_counter() - begun)
        if len(found) == 1 and found[0] > _SHORT:
            return found[0]
    return median(found[1:])


def _slowdown(device: torch.device, at_once: int) -> float:
    """How many times as long each of ``at_once`` solves takes beside the others; at least 1."""
    if at_once == 1:
        return 1.0
    shape = (576, 1536) if device.type == "cpu" else (4096, 4096)
    weight, count = _random(*shape).to(device), 8
    solve = partial(minor_basis, weight, _RANK)

    def several(number: int) -> float:
        with pinned_threads(1):
            begun = time.perf_counter()
            for _ in range(count):
                on_own_stream(device, solve)
            return time.perf_counter() - begun

    several(0)
    alone = median(several(0) for _ in range(3))
    with ThreadPoolExecutor(at_once) as pool:
        beside = median(seconds for _ in range(3) for seconds in pool.map(several, range(at_once)))
    return max(1.0, beside / alone)


def _upload(device: torch.device) -> float:
    """Bytes a second to the device, as a build brings weights there."""
    from svdbank.building.transfer import uploaded

    weight = _random(4096, 4096)
    return weight.nbytes / _timed(device, partial(uploaded, weight, device))


def _start(device: torch.device) -> float:
    """Seconds until a worker's process has loaded what it works with."""
    program = "import sys; sys.path[:0] = sys.argv[2:]; import torch, svdbank.building.execution; "
    program += "from svdbank.solver.devices import start; start(torch.device(sys.argv[1]))"
    paths: Sequence[str] = [path for path in sys.path if path]
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", program, str(device), *paths], check=True, stdin=subprocess.DEVNULL)
    return time.perf_counter() - begun


def _name(device: torch.device, here: int) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {here} processors for {torch.cuda.device_count()} of them"
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return f"{model}, {here} processors"
