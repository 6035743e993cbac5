"""Ray in a network of its own: it takes 127.0.0.1 for the host's address, and other tests' ports are none of its business."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from svdbank.bank.leases import Worker
from svdbank.bank.sessions import WORKERS, current_session

_CLONE_NEWNET = 0x40000000

#: An address of a network that is reserved for examples: of nobody's machine.
_ADDRESS = "198.51.100.1"
_RESOLVER = Path("/etc/resolv.conf")

#: A machine where many tests run is slow to answer; none of it is what is tested.
_PATIENT = {
    "RAY_health_check_initial_delay_ms": "60000",
    "RAY_health_check_timeout_ms": "60000",
    "RAY_worker_register_timeout_seconds": "300",
    "RAY_agent_register_timeout_ms": "300000",
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}


@contextlib.contextmanager
def own_network() -> Iterator[None]:
    """This thread, and what it starts, in a network with a loopback and nothing else, where the system lets us (Linux, root)."""
    before = os.environ.copy()
    os.environ.update(_PATIENT)
    try:
        with _apart():
            yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("ip") is None:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        if libc.unshare(_CLONE_NEWNET) != 0:  # a container that may not
            yield
            return
        try:
            subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
            # Who asks for a name is told at once that nobody answers.
            for address in (_ADDRESS, *re.findall(r"^nameserver (\d+\.\d+\.\d+\.\d+)$", _RESOLVER.read_text(), re.MULTILINE)):
                subprocess.run(["ip", "addr", "add", f"{address}/32", "dev", "lo"], check=True)
            subprocess.run(["ip", "route", "add", "default", "dev", "lo"], check=True)
            yield
        finally:
            if libc.setns(home, _CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), "the network of before")
    finally:
        os.close(home)


def started(model: Path, bank: Path, *options: str, **environment: str) -> subprocess.Popen[str]:
    """``svdbank build … --json`` as a process of a session of its own."""
    command = [sys.executable, "-m", "svdbank_cli.main", "build", str(model), "-o", str(bank), "--rank", "18", "--json"]
    return subprocess.Popen(
        [*command, "--threads", "1", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        start_new_session=True,
    )


def pids_at(bank: Path) -> dict[int, str]:
    """Processes that have a lease at an unfinished build, with what each says it computes on; the driver says Ray."""
    session = current_session(bank)
    found: dict[int, str] = {}
    for path in (session.folder / WORKERS).glob("[0-9a-f]*") if session is not None else ():
        with contextlib.suppress(FileNotFoundError, msgspec.DecodeError):
            worker = msgspec.json.decode(path.read_bytes(), type=Worker)
            found[worker.pid] = worker.device
    return found


@contextlib.contextmanager
def simulated(*cpus: int) -> Iterator[Any]:
    """A head without processors, and a node for each number of them, as processes of this machine."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 80 << 20})
    try:
        for count in cpus:
            add_node(cluster, count)
        yield cluster
    finally:
        cluster.shutdown()


def add_node(cluster: Any, cpus: int = 1, tries: int = 5) -> None:
    """Another node; again where it was not up within the 30 seconds that Ray gives it, which says nothing but that the machine is busy."""
    for left in reversed(range(tries)):
        try:
            cluster.add_node(num_cpus=cpus, object_store_memory=80 << 20)
            return
        except Exception:
            if left == 0:
                raise
