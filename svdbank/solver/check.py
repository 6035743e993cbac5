"""Whether a device computes: one small weight on each path, certified, or what went wrong in its own words."""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass

import torch

from svdbank.core.errors import SvdbankError
from svdbank.solver.batch import batch_bases
from svdbank.solver.devices import kind_of, start
from svdbank.solver.solve import minor_basis

#: Small enough for a second, large enough for every path.
SHAPE, RANK, BATCH = (320, 480), 8, 4


@dataclass(frozen=True)
class DeviceCheck:
    """What a device made of a small weight.

    ``residuals`` maps each path tried to the residual of its certificate, relative to σ_max; ``batch`` too, where there are batches.
    ``problem`` is None where all is well, else the first thing that went wrong, with the step at which it did.
    """

    device: str
    name: str
    kind: str
    seconds: float
    residuals: dict[str, float]
    problem: str | None


def check_device(device: torch.device, *, every_path: bool = True) -> DeviceCheck:
    """Make the calls that come first, then solve and certify a small weight on the device's paths, or the main one. Never raises."""
    begun = time.perf_counter()
    residuals: dict[str, float] = {}
    name, kind, step, problem = platform.machine(), "cpu", "asking for its name", None
    try:
        if device.type == "cuda":
            name = torch.cuda.get_device_name(device)
        kind = kind_of(device)
        step = "loading its linear algebra"
        start(device)
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(SHAPE, generator=generator).to(torch.bfloat16) for _ in range(BATCH)]
        paths = ("dense", "shift-invert") if kind == "cpu" else ("filter", "dense", "lq")
        for path in paths if every_path else paths[:1]:
            step = f"solving a {SHAPE[0]}x{SHAPE[1]} weight on the {path} path"
            certificate = minor_basis(weights[0], RANK, solver=path, device=device).certificate
            if certificate.path != path or certificate.device != device.type:
                raise SvdbankError("; ".join(certificate.tried))
            residuals[path] = certificate.residual
        if kind != "cpu" and every_path:
            step = f"solving a batch of {BATCH}"
            for basis in batch_bases(weights, RANK, BATCH, device=device):
                if isinstance(basis, str):
                    raise SvdbankError(basis)
                residuals["batch"] = max(residuals.get("batch", 0.0), basis.certificate.residual)
    except Exception as error:  # whatever a driver throws is what is to be told
        lines = str(error).strip().splitlines()
        problem = f"{step}: {type(error).__name__}" + (f": {lines[0]}" if lines else "")
    return DeviceCheck(str(device), name, kind, time.perf_counter() - begun, residuals, problem)
