"""svdbank: a base model is decomposed once; every adapter after that is a lookup.

>>> import svdbank
>>> bank = svdbank.build("org/model")        # once
>>> bank = svdbank.open("org/model")         # ever after
>>> bank["model.layers.0.self_attn.q_proj.weight"].left(16)   # U[:, -16:], as MiCA wants it
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from svdbank.core.errors import (
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
    UnfinishedError,
    WrongBaseError,
)
from svdbank.core.version import __version__ as __version__

if TYPE_CHECKING:
    from svdbank.adapter.model import Adapter as Adapter
    from svdbank.adapter.reading import read_adapter as read_adapter
    from svdbank.adapter.writing import write_adapter as write_adapter
    from svdbank.bank.reading import Bank as Bank
    from svdbank.bank.reading import StoredBasis as StoredBasis
    from svdbank.cache import open as open
    from svdbank.core.basis import Basis as Basis
    from svdbank.core.basis import Certificate as Certificate
    from svdbank.core.specs import Progress as Progress
    from svdbank.training.options import TrainOptions as TrainOptions
    from svdbank.verbs.build import build as build
    from svdbank.verbs.compare import compare as compare
    from svdbank.verbs.demo import demo as demo
    from svdbank.verbs.env import env as env
    from svdbank.verbs.eval import eval as eval
    from svdbank.verbs.export import export as export
    from svdbank.verbs.extract import extract as extract
    from svdbank.verbs.fuse import fuse as fuse
    from svdbank.verbs.info import info as info
    from svdbank.verbs.init import init as init
    from svdbank.verbs.ls import ls as ls
    from svdbank.verbs.merge import merge as merge
    from svdbank.verbs.plan import plan as plan
    from svdbank.verbs.prune import prune as prune
    from svdbank.verbs.publish import publish as publish
    from svdbank.verbs.pull import pull as pull
    from svdbank.verbs.push import push as push
    from svdbank.verbs.repair import repair as repair
    from svdbank.verbs.report import report as report
    from svdbank.verbs.rm import rm as rm
    from svdbank.verbs.stack import stack as stack
    from svdbank.verbs.train import train as train
    from svdbank.verbs.verify import verify as verify

# Where each public name lives. Loaded on first use, so that `import svdbank` costs no torch and no zarr.
_LAZY = {
    "Adapter": "svdbank.adapter.model",
    "Bank": "svdbank.bank.reading",
    "Basis": "svdbank.core.basis",
    "Certificate": "svdbank.core.basis",
    "Progress": "svdbank.core.specs",
    "StoredBasis": "svdbank.bank.reading",
    "TrainOptions": "svdbank.training.options",
    "build": "svdbank.verbs.build",
    "compare": "svdbank.verbs.compare",
    "demo": "svdbank.verbs.demo",
    "env": "svdbank.verbs.env",
    "eval": "svdbank.verbs.eval",
    "export": "svdbank.verbs.export",
    "extract": "svdbank.verbs.extract",
    "fuse": "svdbank.verbs.fuse",
    "info": "svdbank.verbs.info",
    "init": "svdbank.verbs.init",
    "ls": "svdbank.verbs.ls",
    "merge": "svdbank.verbs.merge",
    "open": "svdbank.cache",
    "plan": "svdbank.verbs.plan",
    "prune": "svdbank.verbs.prune",
    "publish": "svdbank.verbs.publish",
    "pull": "svdbank.verbs.pull",
    "push": "svdbank.verbs.push",
    "read_adapter": "svdbank.adapter.reading",
    "repair": "svdbank.verbs.repair",
    "report": "svdbank.verbs.report",
    "rm": "svdbank.verbs.rm",
    "stack": "svdbank.verbs.stack",
    "train": "svdbank.verbs.train",
    "verify": "svdbank.verbs.verify",
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
    "UnfinishedError",
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
