"""Who works at a build: workers of this machine, or those that a Ray cluster starts."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol, Self

import msgspec

from svdbank.building.cluster import Cluster
from svdbank.building.crew import Crew
from svdbank.building.devices import worker_devices, working_device
from svdbank.building.dispatch import Dispatch
from svdbank.building.execution import WorkReport
from svdbank.building.joining import Workplace
from svdbank.building.request import BuildRequest
from svdbank.building.shares import Share, own_device
from svdbank.building.visit import OWN_RANGES
from svdbank.core.errors import OptionError
from svdbank.core.specs import ProgressCallback

#: Of what workers fetched: bytes, requests, retries.
Fetched = tuple[int, int, int]


class Team(Protocol):
    """Workers, for the length of a block.

    ``request`` is what they were asked for, fitted to them; ``device`` where they compute, for the report; ``joins`` whether they take a
    place beside others at the same build, ``on_cpu`` whether this process itself solves on a CPU.
    """

    request: BuildRequest
    device: str
    joins: bool
    on_cpu: bool

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None: ...

    def work(self, here: Workplace, progress: ProgressCallback) -> tuple[WorkReport, Fetched]:
        """Have all that is left recorded; a report over all workers, and what those in other processes fetched."""


class LocalTeam:
    """A worker a device of this machine: this process, and others that it starts."""

    def __init__(self, request: BuildRequest, share: Share | None) -> None:
        where = worker_devices(own_device(share, request.device), request.workers)
        self._solver = working_device(where[0])
        self._share = share or Share(0, 1)
        self._crew = Crew(where, request.threads)
        self.request, self.device = request, ",".join(where)
        self.joins, self.on_cpu = share is not None, "cpu" in where

    def __enter__(self) -> Self:
        self._crew.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._crew.__exit__(*error)

    def work(self, here: Workplace, progress: ProgressCallback) -> tuple[WorkReport, Fetched]:
        """As :meth:`Team.work`."""
        return self._crew.work(here, self._share, self.request, device=self._solver, progress=progress)


class RayTeam:
    """The workers of a Ray cluster: a GPU each, or some processors. This process drives them and solves nothing.

    ``threads`` and ``jobs`` as they were asked for, None where the machines decide. OptionError for what cannot be meant there.
    """

    joins, on_cpu = True, False

    def __init__(self, address: str, request: BuildRequest, *, threads: int | None, jobs: int | None) -> None:
        if request.fetch.fetch not in ("auto", "ranges") or request.fetch.disk_budget is not None or request.fetch.keep:
            raise OptionError(
                "workers on Ray fetch the byte ranges of their own weights and put nothing on a disk",
                hint="leave --fetch, --disk-budget and --keep out, or name a folder that all machines see",
            )
        self._cluster = Cluster(address)
        self._threads, self._jobs = threads, jobs
        self._kind = "cpu"
        self.request, self.device = request, ""

    def __enter__(self) -> Self:
        try:
            self._kind = self._cluster.device(self.request.device)
            threads = self._threads or self._cluster.threads(self._kind, self.request.workers)
            if self.request.workers is None:
                self._cluster.refuse_no_room(self._kind, threads)
        except BaseException as error:
            self._cluster.__exit__(type(error), error, error.__traceback__)
            raise
        jobs = self._jobs or threads
        self.request = msgspec.structs.replace(self.request, threads=threads, jobs=jobs, fetch=OWN_RANGES)
        self.device = f"{self._kind} (Ray)"
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._cluster.__exit__(kind, value, trace)

    def work(self, here: Workplace, progress: ProgressCallback) -> tuple[WorkReport, Fetched]:
        """As :meth:`Team.work`."""
        with Dispatch(self._cluster, here, self.request, self._kind, progress) as dispatch:
            return dispatch.run()
