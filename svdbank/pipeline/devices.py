"""The device that a build computes on: found, and tried before anything is downloaded."""

from __future__ import annotations

import torch

from svdbank.errors import DeviceError
from svdbank.pipeline.planning import named_device
from svdbank.solver import check_device


def working_device(name: str) -> torch.device:
    """The device called ``name`` once it has solved and certified a small weight; a CPU is taken at its word.

    Raises OptionError for one that is not here, DeviceError for one that does not compute.
    """
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
