"""The machines of a Ray cluster: the connection to it, what it has, and workers that it is asked to start."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import pickle
import re
import signal
import threading
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from svdbank.building.posting import PostedWorker
from svdbank.building.visit import Posting
from svdbank.building.words import Said, own_error
from svdbank.core.errors import DeviceError, OptionError, WorkerError, missing_extra
from svdbank.core.processors import available_cpus
from svdbank.core.version import __version__

#: How often Ray itself starts a worker again and repeats its bundle, before the driver hears of it.
RESTARTS = 3

#: Bytes of the object store of a Ray of our own: nothing of ours is put into it. Ray's least is 75 MiB.
_STORE = 100 << 20

#: Seconds in which each machine must answer before the work: a process is started on it.
_ANSWER_WITHIN = 300.0

_ADDRESS = re.compile(r"[A-Za-z0-9._\[\]:-]+:[0-9]{1,5}", re.ASCII)


@dataclass(frozen=True)
class Machine:
    """A machine of the cluster: Ray's id of it, what it is called, and what Ray was told that it has."""

    node: str
    name: str
    cpus: int
    gpus: int


def refuse_address(address: str) -> None:
    """OptionError for what is no address of a Ray cluster."""
    if address.startswith("ray://"):
        raise OptionError(
            f"--ray {address}: an address of Ray's client; the driver of a build must see the bank's folder as its workers do",
            hint="run svdbank on a machine of the cluster, with --ray auto",
        )
    if address not in ("local", "auto") and not _ADDRESS.fullmatch(address):
        raise OptionError(
            f"--ray takes local, auto or HOST:PORT, not {address!r}", hint="svdbank build MODEL --ray: local is the default"
        )


class Cluster:
    """A connection to Ray for the length of the block; to one of our own (``local``), or one that runs (``auto``, ``HOST:PORT``).

    The connection, or Ray itself, is made when it is first needed. OptionError for an address that cannot be meant, MissingExtraError
    where Ray is not installed.
    """

    def __init__(self, address: str) -> None:
        refuse_address(address)
        if importlib.util.find_spec("ray") is None:
            raise missing_extra("ray", "ray")
        self.address = address
        self._ray: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self._ray is not None:
            self._ray.shutdown()
            _let_print(True)

    @property
    def ray(self) -> Any:
        """The module, connected."""
        if self._ray is None:
            self._ray = self._connected()
        return self._ray

    def machines(self) -> list[Machine]:
        """The machines that are alive. Of a Ray of our own that is not needed yet, what it would have."""
        if self._ray is None and self.address == "local":
            return [Machine("", "this machine", available_cpus(), _gpus())]
        return [
            Machine(
                one["NodeID"],
                f"{one['NodeManagerHostname']} ({one['NodeManagerAddress']})",
                int(one["Resources"].get("CPU", 0)),
                int(one["Resources"].get("GPU", 0)),
            )
            for one in self.ray.nodes()
            if one["Alive"]
        ]

    def device(self, asked: str) -> str:
        """``cpu`` or ``cuda``, as asked for, or as there are GPUs. OptionError for what Ray cannot hand out, or does not have."""
        if asked not in ("auto", "cpu", "cuda"):
            raise OptionError(
                f"--device {asked} with --ray: Ray hands the GPUs out", hint="--device cuda, --device cpu, or auto"
            )
        has_gpu = any(machine.gpus for machine in self.machines())
        if asked == "cuda" and not has_gpu:
            raise OptionError("--device cuda: no machine of this Ray cluster has a GPU", hint="--device cpu")
        return "cuda" if has_gpu and asked != "cpu" else "cpu"

    def room(self, device: str, threads: int) -> int:
        """How many workers there is room for: one a GPU, or one for each ``threads`` processors of a machine."""
        return sum(one.gpus if device == "cuda" else one.cpus // threads for one in self.machines())

    def refuse_no_room(self, device: str, threads: int) -> None:
        """OptionError where there is room for no worker."""
        if self.room(device, threads) == 0:
            most = max((machine.cpus for machine in self.machines()), default=0)
            raise OptionError(
                f"no machine of this Ray cluster has {threads} processors for a worker: the largest has {most}",
                hint="fewer --threads where a build is begun; with --workers N it waits for machines that come",
            )

    def threads(self, device: str, workers: int | None) -> int:
        """Threads of a worker where none were asked for: processors divided among the workers, as the smallest machine has them."""
        able = [one for one in self.machines() if one.cpus and (one.gpus or device == "cpu")]
        count = workers or (sum(one.gpus for one in able) if device == "cuda" else len(able))
        return max(1, min((*(one.cpus for one in able), sum(one.cpus for one in able) // max(1, count)), default=1))

    def look_around(self, posting: Posting, device: str, threads: int) -> None:
        """Have each machine that may work look for the bank's folder and the model; raises, by its name, what the first says that does not
        find them or has another svdbank."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        order = pickle.dumps(posting)
        ray, asked = self.ray, {}
        for machine in self.machines():
            if machine.gpus if device == "cuda" else machine.cpus >= threads:
                there = NodeAffinitySchedulingStrategy(machine.node, soft=False)
                task = ray.remote(num_cpus=0, max_retries=RESTARTS, scheduling_strategy=there)(_looking(__version__))
                asked[task.remote(order)] = machine
        waiting = list(asked)
        while waiting:
            ready, waiting = ray.wait(waiting, timeout=_ANSWER_WITHIN)
            if not ready:
                raise DeviceError(
                    f"{asked[waiting[0]].name} has not answered in {_ANSWER_WITHIN:.0f} s", hint="ray status shows how it is"
                )
            self._heard(asked[ready[0]], ready[0])

    def _heard(self, machine: Machine, answer: Any) -> None:
        from ray.exceptions import RayError, RayTaskError

        try:
            said: Said | str = self.ray.get(answer)
        except RayTaskError as cause:
            raise _unlike(machine.name, str(cause).strip().splitlines()[-1]) from cause
        except RayError:  # it is gone: whoever is gone has no place to be refused
            return
        if isinstance(said, str):
            raise _unlike(machine.name, said)
        if said.error is not None:
            raise own_error(machine.name, said)

    def started(self, posting: Posting, device: str, threads: int) -> Any:
        """A worker that Ray starts where there is room, now or later, and again where it dies; see :class:`PostedWorker`."""
        actor = self.ray.remote(
            num_cpus=1 if device == "cuda" else threads,
            num_gpus=1 if device == "cuda" else 0,
            max_restarts=RESTARTS,
            max_task_retries=RESTARTS,
            concurrency_groups={"talk": 1},
            scheduling_strategy="SPREAD",
        )(PostedWorker)
        return actor.remote(posting, device)

    def _connected(self) -> Any:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # of a Ray that we start, nothing is told to anybody
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        import ray

        if ray.is_initialized():
            raise OptionError("this process is connected to Ray already", hint="ray.shutdown() before the build")
        in_main = threading.current_thread() is threading.main_thread()
        before = signal.getsignal(signal.SIGTERM) if in_main else None
        own: dict[str, Any] = {}
        if self.address == "local":
            own = {"num_cpus": available_cpus(), "num_gpus": _gpus(), "object_store_memory": _STORE, "include_dashboard": False}
        try:
            ray.init(address=self.address, log_to_driver=False, logging_level=logging.ERROR, **own)
        except KeyboardInterrupt:
            ray.shutdown()
            raise
        except Exception as cause:  # a node that did not start in Ray's 30 s is a plain one
            ray.shutdown()
            raise WorkerError(f"Ray at {self.address}: {cause}", hint=_connecting(self.address)) from cause
        finally:
            if before is not None:  # Ray's own ends the process at once
                signal.signal(signal.SIGTERM, before)
        _let_print(False)
        return ray


def _let_print(may: bool) -> None:
    """Whether Ray prints, to standard output, what its machines say; it has no option for that."""
    import ray

    with contextlib.suppress(AttributeError):
        ray._private.worker._worker_logs_enabled = may


def _gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _connecting(address: str) -> str:
    if address == "local":
        return "/tmp/ray/session_latest/logs says why it did not start"
    return "ray status --address HOST:PORT shows a cluster; --ray alone starts a Ray of its own"


def _looking(version: str) -> Any:
    """A function that a machine is sent whole: it may have no svdbank, or another."""

    def look_from_there(order: bytes) -> Any:
        import pickle

        try:
            from svdbank.core.version import __version__ as theirs
        except ImportError as cause:
            return f"cannot import svdbank: {cause}"
        if theirs != version:
            return f"has svdbank {theirs}, this is {version}"
        from svdbank.building.visit import look
        from svdbank.building.words import Said, last_words

        try:
            look(pickle.loads(order))
        except BaseException as error:
            return last_words(error)
        return Said()

    return look_from_there


def _unlike(name: str, what: str) -> WorkerError:
    return WorkerError(f"{name}: {what}", hint=f"all machines need the same: pip install svdbank=={__version__}")
