"""Which functions may bring a result to the host, which makes it wait until the device has done everything before; and why each does.

A place is ``module:function``, the innermost one of svdbank, PEFT, Transformers or Accelerate; functions inside one count as part of it.
"""

from __future__ import annotations

#: Once a weight, or once a step of an iteration: the numbers that decide what is done next.
SOLVER = {
    "svdbank.solver.solve:_scaled": "not finite and zero weights are told apart before any factorisation",
    "svdbank.solver.solve:_climbed": "the CPU takes over where the device's memory ran out",
    "svdbank.solver.devices:start": "every routine is called once before threads are: once a process",
    "svdbank.solver.batch:on_own_stream": "what a worker's stream made is ready when it goes to another thread",
    "svdbank.solver.filter:_inverse": "whether the factor exists decides the shift: one answer an inverse",
    "svdbank.solver.filter:upper_end": "the filter's bounds",
    "svdbank.solver.filter:project": "eigh reports whether it converged; the Ritz values decide what is done next",
    "svdbank.solver.filter:solve_filter": "whether the subspace is finite; ends of the spectrum for the certificate",
    "svdbank.solver.subspace:quotients": "Rayleigh quotients of a cycle, which decide the next one",
    "svdbank.solver.batched:_begin": "one copy a batch: which weights are not finite, or zero",
    "svdbank.solver.batched:_end": "one copy a batch: every figure of the gates",
    "svdbank.solver.batched:_Mixing.__init__": "one copy a batch: small eigenproblems, which CUDA would solve one after another",
    "svdbank.solver.dense:solve_dense": "eigh reports whether it converged; ends of the spectrum for the certificate",
    "svdbank.solver.ritz:rayleigh_ritz": "the SVD of the small factor reports whether it converged",
    "svdbank.solver.dense:decompose": "the SVD reports whether it converged: if not, the transpose is next",
    "svdbank.solver.dense:_ends": "ends of the spectrum for the certificate",
    "svdbank.solver.cholesky:factorise": "a pivot that is not positive decides the path; one answer a block of columns",
    "svdbank.solver.gates:judge": "the gates' figures, and whether a Newton step is due",
    "svdbank.solver.gates:departure": "the orthogonality gate's figure",
    "svdbank.solver.gates:complete": "the completeness gate's verdict",
    "svdbank.solver.gates:_none_smaller": "the threshold that the proof is made for",
    "svdbank.solver.gates:_none_larger": "the threshold that the proof is made for",
    "svdbank.solver.gates:residual_check": "the weight's norm; verification compares one figure a weight",
    "svdbank.solver.gates:_largest_column": "verification's figure",
    "svdbank.solver.orthogonal:thin_qr": "pivots decide between Cholesky and Householder, cosines between one pass and two",
    "svdbank.solver.lanczos:largest": "eigh reports whether it converged; figures decide whether the iteration stops, restarts, locks",
    "svdbank.solver.lanczos:_forgotten": "what the projection forgets, against which convergence is measured",
    "svdbank.solver.lanczos:orthogonalise": "whether the Krylov space is exhausted, and in which directions",
    "svdbank.solver.shift_invert:place_shift": "Ritz values place the shift",
    "svdbank.solver.shift_invert:solve_shift_invert": "what is wanted of the iteration, and how far off it is",
    "svdbank.solver.shift_invert:_top": "how far the other end's iteration is off",
}

#: Once an attachment, however many weights there are.
ATTACHING = {
    "svdbank.core.probe:sample": "values of all weights, to be compared with the bank's: one copy a dtype",
    "svdbank.peft.residuals:subtract": "what rounding lost of the base: one number for all weights",
}

#: Once a shard of a bank, or once a batch of windows.
BUILDING = {
    "svdbank.building.transfer:brought_home": "what is stored of a weight: one copy an array",
    "svdbank.lm.measuring:summed_losses": "losses of a batch: one copy",
}

#: Once a run.
TRAINING = {
    "svdbank.training.writing:initial_factors": "the factors that a residual method starts from are needed again when it is saved",
    "peft.peft_model:PeftModel.save_pretrained": "the adapter is written to a file",
}

ALLOWED = {**SOLVER, **ATTACHING, **BUILDING, **TRAINING}
