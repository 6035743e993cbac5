"""Banks on disk: their format, writing, reading and checking. The one place that imports zarr."""

from svdbank.bank.layout import Index, Manifest, ShardRecord, WeightRecord
from svdbank.bank.reading import Bank, StoredBasis, base_digest, open_bank, read_manifest
from svdbank.bank.writing import BankWriter, clean

__all__ = [
    "Bank",
    "BankWriter",
    "Index",
    "Manifest",
    "ShardRecord",
    "StoredBasis",
    "WeightRecord",
    "base_digest",
    "clean",
    "open_bank",
    "read_manifest",
]
