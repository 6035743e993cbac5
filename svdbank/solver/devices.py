"""What the solver must know of a device: its kind, what is called once before threads start, and turns where memory runs out."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from svdbank.solver.sizes import DeviceKind

#: CUDA compute capabilities whose float64 runs at half the float32 rate or a little less: P100, V100, A100 and A30, H100 and H200,
#: B200. All others (consumer and workstation cards, T4, A10, L4, L40, B300) have 1/16 to 1/64. A capability, never a timing:
#: a plan must not depend on what else a machine is doing. NVIDIA, *CUDA C++ Programming Guide*, table of arithmetic throughput.
FULL_FLOAT64 = ((6, 0), (7, 0), (8, 0), (9, 0), (10, 0))

_lock = threading.Lock()
_started: set[torch.device] = set()


def kind_of(device: torch.device) -> DeviceKind:
    """The kind of a device, by its type and compute capability."""
    return "cpu" if device.type != "cuda" else _kind_of(with_index(device))


@cache
def _kind_of(device: torch.device) -> DeviceKind:
    if torch.version.hip is not None:  # AMD's Instinct cards run float64 at full rate; its Radeon cards are not told apart
        return "cuda"
    return "cuda" if torch.cuda.get_device_capability(device) in FULL_FLOAT64 else "cuda-low-float64"


def start(device: torch.device) -> None:
    """Make every call once that must not be made first by two threads at a time; repeats cost nothing.

    torch loads CUDA's linear algebra at its first use, and two threads that do so end in "lazy wrapper should be called at most once".
    """
    device = with_index(device)
    with _lock:
        if device in _started:
            return
        # Also on a CPU: a device hands its small problems over to it.
        for place in {torch.device("cpu"), device}:
            for size in (4, 48):  # small symmetric matrices take another routine on CUDA
                square = torch.eye(size, dtype=torch.float64, device=place).expand(2, size, size).contiguous()
                for dtype in (torch.float64, torch.float32):
                    one = square[0].to(dtype)
                    factor, info = torch.linalg.cholesky_ex(one)
                    torch.linalg.solve_triangular(factor, one, upper=False)
                    torch.linalg.eigh(one)
                    torch.linalg.qr(one)
                    torch.linalg.svd(one)
                    (one @ one).sum().item()
                factor, info = torch.linalg.cholesky_ex(square)
                torch.linalg.solve_triangular(factor.mT, square, upper=True, left=False)
                torch.linalg.eigh(square)
                torch.bmm(square, square)
                info.tolist()
            if place.type == "cuda":
                torch.linalg.svd(square[0], driver="gesvd")
                torch.cuda.synchronize(place)
        _started.add(device)


class Turns:
    """Solves that share the memory of one device: any number at a time, or one alone that waits for the others to end."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running = 0
        self._waiting = 0
        self._alone = False

    @contextmanager
    def shared(self) -> Iterator[Turn]:
        """Take part; waits while a solve is alone or waits to be."""
        with self._changed:
            self._changed.wait_for(lambda: not self._alone and not self._waiting)
            self._running += 1
        turn = Turn(self)
        try:
            yield turn
        finally:
            with self._changed:
                if turn.is_alone:
                    self._alone = False
                else:
                    self._running -= 1
                self._changed.notify_all()

    def wait_alone(self, turn: Turn) -> None:
        """Step back, and go on once every other solve has ended; ``turn`` then says so."""
        with self._changed:
            self._running -= 1
            self._waiting += 1
            try:
                self._changed.notify_all()
                self._changed.wait_for(lambda: not self._alone and self._running == 0)
            except BaseException:  # an interrupt: it takes part again, until its own block ends
                self._running += 1
                raise
            finally:
                self._waiting -= 1
                self._changed.notify_all()
            self._alone = turn.is_alone = True


class Turn:
    """One solve's part in :class:`Turns`."""

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self.is_alone = False

    def alone(self) -> None:
        """Wait until no other solve uses the device, and keep them out until this one ends."""
        if not self.is_alone:
            self._turns.wait_alone(self)


def turns(device: torch.device) -> Turns:
    """The turns of a device, one object for all threads of the process."""
    return _turns(with_index(device))


@cache
def _turns(device: torch.device) -> Turns:
    return Turns()


def with_index(device: torch.device) -> torch.device:
    """``cuda`` as the ``cuda:N`` that it means in this thread."""
    if str(device) == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return device


def give_back_device(device: torch.device) -> None:
    """Hand memory that torch keeps of a device back to it: what one size of block left is no use for another."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
