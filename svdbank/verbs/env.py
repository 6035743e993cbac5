"""What svdbank runs on: versions, processors, devices, caches. For bug reports and for `svdbank env`."""

from __future__ import annotations

import importlib.metadata
import os
import platform

from svdbank.core.specs import ProgressCallback, Struct, ignore_progress
from svdbank.core.version import __version__


class DeviceReport(Struct, frozen=True):
    """What a device made of a small weight: the residual, relative to σ_max, on each path tried, or the ``problem``.

    ``kind`` is what plans go by: ``cpu``, ``cuda``, or ``cuda-low-float64`` for a card that has little of it.
    """

    device: str
    name: str
    kind: str
    seconds: float
    residuals: dict[str, float]
    problem: str | None


class Environment(Struct, frozen=True):
    """Versions of what matters (None where not installed), processors usable, memory and free space in bytes, devices, folders."""

    svdbank: str
    python: str
    platform: str
    packages: dict[str, str | None]
    processors: int
    torch_threads: int
    memory_bytes: int | None
    devices: tuple[str, ...]
    home: str
    home_free_bytes: int
    hub_cache: str
    hub_offline: bool
    variables: dict[str, str]
    checks: tuple[DeviceReport, ...] = ()
    rates: str | None = None


def env(
    *,
    check: bool = False,
    rates: str | os.PathLike[str] | None = None,
    device: str = "auto",
    progress: ProgressCallback | None = None,
) -> Environment:
    """Collect the facts. Tokens are never among them. With ``check`` each device that torch sees solves and certifies a small weight.

    With ``rates`` the rates of ``device`` are measured, in a minute, and written to that file, for :func:`svdbank.plan`; writing is
    measured on the disk where it is. Raises OptionError for a file that cannot be written or is something else, and a device that is not
    here, DeviceError for one that does not compute.
    """
    if rates is not None:
        _measure(rates, device, progress or ignore_progress)
    import torch
    from huggingface_hub import constants

    from svdbank.cache import home
    from svdbank.core import disk
    from svdbank.core.processors import available_cpus

    packages = (
        "torch",
        "zarr",
        "safetensors",
        "huggingface-hub",
        "numpy",
        "peft",
        "transformers",
        "accelerate",
        "datasets",
        "bitsandbytes",
    )
    devices = ["cpu", *(f"cuda:{i} {_name(i)}" for i in range(torch.cuda.device_count()))]
    shown = (
        "SVDBANK_HOME",
        "SVDBANK_THREADS",
        "OMP_NUM_THREADS",
        "MKL_NUM_THREADS",
        "HF_HOME",
        "HF_HUB_OFFLINE",
        "HF_ENDPOINT",
    )
    return Environment(
        svdbank=__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        packages={name: _version(name) for name in packages},
        processors=available_cpus(),
        torch_threads=torch.get_num_threads(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None,
        devices=tuple(devices),
        home=str(home()),
        home_free_bytes=disk.free_bytes(home()),
        hub_cache=str(constants.HF_HUB_CACHE),
        hub_offline=bool(constants.HF_HUB_OFFLINE),
        variables={name: os.environ[name] for name in shown if name in os.environ},
        checks=tuple(_tried(device) for device in ("cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))))
        if check
        else (),
        rates=None if rates is None else os.fspath(rates),
    )


def _measure(file: str | os.PathLike[str], device: str, progress: ProgressCallback) -> None:
    from svdbank.building.rates import refuse_other_file, write_rates
    from svdbank.core import disk

    refuse_other_file(file)
    from svdbank.building.calibration import measured_rates

    write_rates(file, measured_rates(device, folder=disk.expanded(os.fspath(file)).parent, progress=progress))


def _name(index: int) -> str:
    import torch

    try:
        return torch.cuda.get_device_name(index)
    except Exception as error:  # a card that fails is what this page is read for
        return f"(no name: {type(error).__name__})"


def _tried(name: str) -> DeviceReport:
    import torch

    from svdbank.solver import check_device, pinned_threads

    with pinned_threads(1):
        found = check_device(torch.device(name))
    return DeviceReport(
        device=found.device,
        name=found.name,
        kind=found.kind,
        seconds=round(found.seconds, 3),
        residuals=found.residuals,
        problem=found.problem,
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
