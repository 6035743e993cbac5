"""svdbank: a base model is decomposed once; every adapter after that is a lookup.

>>> import svdbank
>>> bank = svdbank.build("org/model")        # once
>>> bank = svdbank.open("org/model")         # ever after
>>> bank["model.layers.0.self_attn.q_proj.weight"].left(16)   # U[:, -16:], as MiCA wants it
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from svdbank.errors import (
    BankError,
    BankNotFoundError,
    CheckpointError,
    DamageError,
    LockedError,
    MissingExtraError,
    NotFiniteError,
    OptionError,
    SolverError,
    SvdbankError,
    WrongBaseError,
)

if TYPE_CHECKING:
    from svdbank.adapter.exporting import export as export
    from svdbank.adapter.initialisation import init as init
    from svdbank.adapter.model import Adapter as Adapter
    from svdbank.adapter.reading import read_adapter as read_adapter
    from svdbank.adapter.writing import write_adapter as write_adapter
    from svdbank.bank.reading import Bank as Bank
    from svdbank.bank.reading import StoredBasis as StoredBasis
    from svdbank.basis import Basis as Basis
    from svdbank.basis import Certificate as Certificate
    from svdbank.composition.comparing import compare as compare
    from svdbank.composition.merging import merge as merge
    from svdbank.composition.stacking import stack as stack
    from svdbank.demonstration import demo as demo
    from svdbank.environment import env as env
    from svdbank.evaluation import eval as eval
    from svdbank.extraction import extract as extract
    from svdbank.fusion import fuse as fuse
    from svdbank.pipeline.building import build as build
    from svdbank.pipeline.locating import ls as ls
    from svdbank.pipeline.locating import open as open
    from svdbank.pipeline.locating import rm as rm
    from svdbank.pipeline.planning import plan as plan
    from svdbank.specs import Progress as Progress
    from svdbank.training import train as train
    from svdbank.verification import info as info
    from svdbank.verification import verify as verify

__version__ = "0.1.0"

# Where each public name lives. Loaded on first use, so that `import svdbank` costs no torch and no zarr.
_LAZY = {
    "Adapter": "svdbank.adapter.model",
    "Bank": "svdbank.bank.reading",
    "Basis": "svdbank.basis",
    "Certificate": "svdbank.basis",
    "Progress": "svdbank.specs",
    "StoredBasis": "svdbank.bank.reading",
    "build": "svdbank.pipeline.building",
    "compare": "svdbank.composition.comparing",
    "demo": "svdbank.demonstration",
    "env": "svdbank.environment",
    "eval": "svdbank.evaluation",
    "export": "svdbank.adapter.exporting",
    "extract": "svdbank.extraction",
    "fuse": "svdbank.fusion",
    "info": "svdbank.verification",
    "init": "svdbank.adapter.initialisation",
    "ls": "svdbank.pipeline.locating",
    "merge": "svdbank.composition.merging",
    "open": "svdbank.pipeline.locating",
    "plan": "svdbank.pipeline.planning",
    "read_adapter": "svdbank.adapter.reading",
    "rm": "svdbank.pipeline.locating",
    "stack": "svdbank.composition.stacking",
    "train": "svdbank.training",
    "verify": "svdbank.verification",
    "write_adapter": "svdbank.adapter.writing",
}

__all__ = [
    *sorted(_LAZY),
    "BankError",
    "BankNotFoundError",
    "CheckpointError",
    "DamageError",
    "LockedError",
    "MissingExtraError",
    "NotFiniteError",
    "OptionError",
    "SolverError",
    "SvdbankError",
    "WrongBaseError",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'svdbank' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
