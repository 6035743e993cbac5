"""Certified minor singular triplets of one matrix. Tensors in, a Basis out; knows nothing of files, models or banks."""

from svdbank.solver.batch import minor_bases, minor_batch
from svdbank.solver.gates import residual_check
from svdbank.solver.planning import PATHS, choose_path, flops, peak_bytes
from svdbank.solver.solve import minor_basis
from svdbank.solver.threads import pinned_threads
from svdbank.solver.triplets import canonical_signs
from svdbank.solver.weight import Precision

__all__ = [
    "PATHS",
    "Precision",
    "canonical_signs",
    "choose_path",
    "flops",
    "minor_bases",
    "minor_basis",
    "minor_batch",
    "peak_bytes",
    "pinned_threads",
    "residual_check",
]
