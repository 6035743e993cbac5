"""A worker process of a build on this machine: told what to do by one line, it says what it does in lines of JSON."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
from dataclasses import dataclass
from typing import Any, Never

from svdbank.building.devices import working_device
from svdbank.building.joining import joined, work_through
from svdbank.building.request import BuildRequest
from svdbank.building.shares import Share
from svdbank.building.words import Said, last_words
from svdbank.core.specs import Progress, to_json


@dataclass(frozen=True)
class Order:
    """What a worker is to do: its share of ``request``, on ``device``. Pickled, by its parent, as a line of hexadecimal digits."""

    request: BuildRequest
    share: Share
    device: str


def main() -> int:
    """Do what the first line of standard input says; stop when there is no more of it, or at SIGTERM, and keep what is done.

    Returns the exit code of the process, which has nothing else to do.
    """
    out = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # whatever a library prints
    speaking = threading.Lock()

    def say(said: Said) -> None:
        with speaking:
            out.write(to_json(said))

    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, _stop)
        line = sys.stdin.buffer.readline()
        if not line:
            return 130
        order: Order = pickle.loads(bytes.fromhex(line.decode()))
        threading.Thread(target=_stop_with_parent, daemon=True).start()
        say(_worked(order, say))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 1
    except BaseException as error:
        say(last_words(error))
        return 1
    return 0


def _worked(order: Order, say: Any) -> Said:
    device = working_device(order.device)

    def progress(progress: Progress) -> None:
        say(Said(progress=Progress(progress.stage, progress.done, progress.total, progress.unit, progress.item)))

    with joined(order.request, device=order.device, join=True, on_cpu=device.type == "cpu", progress=progress) as here:
        done = work_through(here, order.share, device=device, request=order.request, progress=progress)
        remote = here.checkpoint.remote
        traffic = (remote.traffic.nbytes, remote.traffic.requests, remote.traffic.retries) if remote is not None else (0, 0, 0)
    return Said(solved=done.solved, stages=done.stages, waited=done.waited, traffic=traffic)


def _stop(number: int, frame: object) -> Never:
    raise KeyboardInterrupt


def _stop_with_parent() -> None:
    """The parent closes our input when it wants us to stop, or dies."""
    while sys.stdin.buffer.read(4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
