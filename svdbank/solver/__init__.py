"""Certified minor singular triplets of one matrix. Tensors in, a Basis out; knows nothing of files, models or banks."""

from svdbank.solver.batch import batch_bases, minor_bases, on_own_stream
from svdbank.solver.batched import batch_size
from svdbank.solver.check import DeviceCheck, check_device
from svdbank.solver.gates import residual_check
from svdbank.solver.planning import PATHS, batch_peak_bytes, choose_path, flops, peak_bytes
from svdbank.solver.solve import minor_basis
from svdbank.solver.threads import pinned_threads
from svdbank.solver.triplets import canonical_signs
from svdbank.solver.weight import Precision

__all__ = [
    "PATHS",
    "DeviceCheck",
    "Precision",
    "batch_bases",
    "batch_peak_bytes",
    "batch_size",
    "canonical_signs",
    "check_device",
    "choose_path",
    "flops",
    "minor_bases",
    "minor_basis",
    "on_own_stream",
    "peak_bytes",
    "pinned_threads",
    "residual_check",
]
