"""Which entries of a weight are sampled to recognise it again.

A bank stores these values for each weight; attaching it to a loaded model compares them. They are entries of the (out, in) matrix,
so sharding and file layout do not matter, and a cast of the model is followed by casting the stored values.
"""

from __future__ import annotations

from math import gcd

#: Entries sampled from each weight.
PROBE_SIZE = 256

_GOLDEN = 0.6180339887498949


def probe_indices(out_features: int, in_features: int) -> list[int]:
    """Flat row-major indices into an (out, in) matrix, ``min(256, out·in)`` of them, distinct and spread evenly.

    A golden-ratio step coprime to the size walks over rows and columns alike, so no layer shape makes all samples share a column.
    """
    size = out_features * in_features
    if size <= PROBE_SIZE:
        return list(range(size))
    step = max(1, int(size * _GOLDEN))
    while gcd(step, size) != 1:
        step += 1
    return [(i * step) % size for i in range(PROBE_SIZE)]
