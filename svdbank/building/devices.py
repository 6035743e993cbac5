"""Devices by name: which one is meant, of what kind it is for a plan, and whether it computes, before anything is downloaded."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from svdbank.core.errors import DeviceError, OptionError

if TYPE_CHECKING:
    import torch

#: Kinds of GPU that a plan says something about (:func:`svdbank.solver.devices.kind_of`).
GPU_KINDS = ("cuda", "cuda-low-float64")

#: What a driver of NVIDIA's (of a card, of a Jetson, under WSL) or AMD's leaves in a Linux file system.
_DRIVERS = ("/proc/driver/nvidia", "/dev/nvidiactl", "/dev/nvmap", "/dev/dxg", "/dev/kfd")

_DEVICES = "auto, cpu, cuda, cuda:0 …"


def planned_device(name: str) -> tuple[str, str | None]:
    """Kind of the device that a plan is for, and its name here; None where none of that kind is. OptionError for no device's name.

    Asks torch only where it could know of a GPU.
    """
    if name == "cpu" or (name == "auto" and not may_have_gpu()):
        return "cpu", "cpu"
    if name in GPU_KINDS and not (may_have_gpu() and _cuda_is_available()):
        return name, None
    device = named_device("cuda" if name == "cuda-low-float64" else name)
    from svdbank.solver.devices import kind_of

    kind = kind_of(device)
    return (kind, str(device)) if name in ("auto", "cpu", "cuda", kind) or name.startswith("cuda:") else (name, None)


def may_have_gpu() -> bool:
    """False where torch would find no CUDA device, as far as that is known without it: no driver is there, or all devices are hidden."""
    if "torch" in sys.modules:
        return _cuda_is_available()
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return False
    if platform.system() == "Darwin":  # no CUDA for years
        return False
    return any(Path(path).exists() for path in _DRIVERS) or shutil.which("nvidia-smi") is not None


def _cuda_is_available() -> bool:
    import torch

    return torch.cuda.is_available()


def worker_devices(names: str, workers: int | None) -> tuple[str, ...]:
    """A device for each process: of a list with commas each one named, also twice; of ``cuda``, and ``auto`` where there are several,
    every GPU there is; one for all workers on a CPU. OptionError for devices that are not here, or not so many."""
    listed = [name.strip() for name in names.split(",")]
    if len(listed) > 1:
        if workers not in (None, len(listed)):
            raise OptionError(f"{len(listed)} devices are named and {workers} workers asked for", hint="leave --workers out")
        return tuple(str(named_device(name)) for name in listed)
    device = named_device(listed[0])
    if device.type == "cpu":
        return ("cpu",)
    import torch

    count = torch.cuda.device_count() if device.index is None else 1
    if workers is not None and workers > count:
        again = ",".join([str(torch.device("cuda", device.index or 0))] * workers)
        raise OptionError(
            f"{workers} workers were asked for, {names} is {count} GPUs", hint=f"--device {again} has them share one"
        )
    if count <= 1:  # none: what is wrong with it is said when it is tried
        return (str(device),)
    return tuple(f"cuda:{number}" for number in range(workers or count))


def named_device(name: str) -> torch.device:
    """The torch device called ``name``, or ``auto``: CUDA where there is one. OptionError for one that is not here."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as cause:
        raise OptionError(f"no device is called {name!r}", hint=_DEVICES) from cause
    if device.type not in ("cpu", "cuda"):
        raise OptionError(f"the solver runs on cpu and cuda, not on {name!r}", hint=_DEVICES)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count() > 0:
        raise OptionError(
            f"device {name!r} was asked for, torch sees {torch.cuda.device_count()} CUDA devices", hint="they begin at cuda:0"
        )
    if device.type == "cuda" and not torch.cuda.is_available():
        raise OptionError(
            f"device {name!r} was asked for, but torch sees no CUDA device", hint="svdbank env --check shows what it sees"
        )
    return device


def working_device(name: str) -> torch.device:
    """The device called ``name`` once it has solved and certified a small weight; a CPU is taken at its word.

    Raises OptionError for one that is not here, DeviceError for one that does not compute.
    """
    from svdbank.solver import check_device

    device = named_device(name)
    if device.type == "cpu":
        return device
    found = check_device(device, every_path=False)
    if found.problem is not None:
        raise DeviceError(
            f"{device} ({found.name}) does not solve a small weight: {found.problem}",
            hint="svdbank env --check tries each device; --device cpu goes on without this one",
        )
    return device
