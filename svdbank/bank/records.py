"""Whether the record of a shard is one of its plan: what it says is folded into arrays and read by index, by whoever finds it."""

from __future__ import annotations

from svdbank.bank.layout import ShardRecord
from svdbank.core.probe import PROBE_SIZE
from svdbank.core.specs import FamilySpec, ShardSpec

_LARGEST = 2**31 - 1


def fits(record: ShardRecord, shard: ShardSpec, family: FamilySpec) -> bool:
    """True where a record has the weights of its shard, and of each as many numbers as the family's description says."""
    names = family.weights[shard.start : shard.stop]
    if tuple(weight.name for weight in record.weights) != names:
        return False
    samples = min(PROBE_SIZE, family.out_features * family.in_features)
    for rows, length in ((record.sigma, family.rank), (record.probe, samples), (record.principal_sigma, family.principal)):
        if len(rows) != (len(names) if length else 0) or any(len(row) != length for row in rows):
            return False
    return all(
        _is_sha256(weight.source_sha256)
        and all(number is None or 0 <= number <= _LARGEST for number in (weight.layer, weight.expert))
        for weight in record.weights
    )


def _is_sha256(text: str) -> bool:
    return len(text) == 64 and all(ch in "0123456789abcdef" for ch in text)
