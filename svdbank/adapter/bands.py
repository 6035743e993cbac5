"""Where a pair of LoRA factors lies in a bank: the bands and coefficients of ``ΔW = s B A``, found from ``UᵀB``.

An adapter that PEFT saved again has lost what svdbank wrote beside it, may have been scaled, permuted or rounded to a half precision,
or comes from a program of which nothing is known. The tensors alone decide.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from svdbank.adapter.components import Band, Component, Free, InBank, bands_of, indices_of, squared_norm_of

#: ``‖B − U Uᵀ B‖ / ‖B‖`` up to which B counts as standing on the bank's directions. It bounds what a sum loses against the factors in
#: the files, whose promise is 1e-6; rounding B to float32 costs 6e-8 of it.
IN_SPAN = 1e-6

#: Entries of ``UᵀB`` below this share of its largest are rounding: float32 vectors of some thousand entries give 1e-7.
_NOISE = 3e-7

#: Roundings that a loader or PEFT may have put B through. Directions that differ from the bank's by such a rounding to the bit are kept as
#: they are in the file.
_ROUNDINGS = (torch.float32, torch.bfloat16, torch.float16)


def recover(A: Tensor, B: Tensor, scale: float, left: Tensor, *, claim: Sequence[Band] = ()) -> Component:
    """The component of ``scale · B A``: :class:`InBank` where B stands on the rows of ``left``, else :class:`Free`.

    ``A`` (k, in) and ``B`` (out, k) are as in a file. ``left`` (R, out) holds the bank's left vectors, most minor first. ``claim`` are
    the bands that a cache names; it saves the search where it is true and is ignored where it is not.

    Signs, order and lengths of B's columns are folded into the coefficients. Rows of C that no column reaches are left out, so bands
    may have holes.
    """
    A, B = A.float(), B.float()
    claimed = indices_of(claim)
    if len(claimed) == B.shape[1] and (not claimed or claimed[-1] < left.shape[0]):
        # As svdbank and PEFT write it: the last column is the most minor.
        exact = _exact_columns(A.flip(0), B.flip(1), scale, left, torch.tensor(claimed), torch.ones(len(claimed)))
        if exact is not None:
            return exact
    lengths = torch.linalg.vector_norm(B.double(), dim=0)
    if not bool((lengths > 0).all()):
        return free(A, B, scale)
    M = left.double() @ B.double()  # (R, k)
    rows = M.abs().argmax(dim=0)
    peaks = M.gather(0, rows[None])[0]
    if len(set(rows.tolist())) == len(rows):
        signs = peaks.sign().float()
        exact = _exact_columns(A, B, scale, left, rows, signs)
        if exact is not None:
            return exact
        off = torch.linalg.vector_norm(B.double() - left[rows].double().mT * peaks, dim=0)
        if bool((off <= IN_SPAN * lengths).all()):
            return _placed(A.double() * peaks[:, None] * scale, rows, left[rows].mT)
    return _rotated(A, B, scale, left, M, float(torch.linalg.vector_norm(lengths)))


def free(A: Tensor, B: Tensor, scale: float) -> Free:
    """Factors of their own, the scale folded into A."""
    return Free((A.double() * scale).float(), B.float())


def share_in(left: Tensor, component: Component) -> float:
    """Share of ``‖ΔW‖²`` that lies in the span of the rows of ``left`` (R, out); 1 for a component that is zero."""
    A, B = component.factors
    whole = squared_norm_of(A, B)
    return squared_norm_of(A, left.double() @ B.double()) / whole if whole > 0 else 1.0


def projected(component: Component, left: Tensor, minimum_share: float) -> InBank:
    """``U Uᵀ ΔW`` on the rows of ``left`` (R, out): in the component's own bands where they keep ``minimum_share``, else on all rows."""
    own = component.indices if isinstance(component, InBank) else ()
    if own and own[-1] < left.shape[0] and share_in(left[list(own)], component) >= minimum_share:
        rows = torch.tensor(own)
    else:
        rows = torch.arange(left.shape[0])
    A, B = component.factors
    C = (left[rows].double() @ B.double()) @ A.double()
    columns = left[rows].float().mT.contiguous()
    return InBank(bands_of(rows.tolist()), C.float(), columns, left.dtype == torch.float32, min(component.max_rank, len(rows)))


def _exact_columns(A: Tensor, B: Tensor, scale: float, left: Tensor, rows: Tensor, signs: Tensor) -> InBank | None:
    """The component where each column of B is, to the bit, plus or minus one vector of the bank in one rounding; else None."""
    wanted = left[rows]
    for rounding in _ROUNDINGS:
        columns = wanted.to(rounding).float().mT  # (out, k)
        if torch.equal(B, columns * signs):
            same = torch.equal(columns, wanted.float().mT) and left.dtype == torch.float32
            return _placed(A.double() * signs[:, None] * scale, rows, columns, orthonormal=same)
    return None


def _placed(C: Tensor, rows: Tensor, columns: Tensor, *, orthonormal: bool | None = None) -> InBank:
    """Rows of C and columns of directions, sorted by index."""
    order = rows.argsort()
    if orthonormal is None:
        orthonormal = columns.dtype == torch.float32
    return InBank(bands_of(rows.tolist()), C[order].float(), columns[:, order].float().contiguous(), orthonormal)


def _rotated(A: Tensor, B: Tensor, scale: float, left: Tensor, M: Tensor, length: float) -> Component:
    """B as a combination of bank directions (a truncation's ``B = U Q``), on as few of them as carry it; else :class:`Free`."""
    reach = torch.linalg.vector_norm(M, dim=1)
    rows = torch.nonzero(reach > _NOISE * reach.max()).flatten()
    if len(rows) == left.shape[1]:
        return free(A, B, scale)  # every matrix is a combination of all directions: it stands on none in particular
    off = torch.linalg.vector_norm(B.double() - left[rows].double().mT @ M[rows])
    if float(off) > IN_SPAN * length:
        return free(A, B, scale)
    C = (M[rows] @ A.double()) * scale
    columns = left[rows].float().mT.contiguous()
    return InBank(bands_of(rows.tolist()), C.float(), columns, left.dtype == torch.float32, min(B.shape[1], len(rows)))
