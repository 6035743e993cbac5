"""A machine of a cluster looks whether a build can be joined from it: before the work, so without what solving needs."""

from __future__ import annotations

import socket
import threading
import time
from dataclasses import dataclass

from svdbank.bank.layout import RECORDS
from svdbank.bank.sessions import WORKERS
from svdbank.building.fetching import FetchOptions
from svdbank.building.freezing import frozen_plan
from svdbank.building.request import BuildRequest
from svdbank.checkpoint.planned import open_planned
from svdbank.checkpoint.source import open_checkpoint
from svdbank.core import disk
from svdbank.core.errors import BankError, CheckpointError
from svdbank.core.places import OnDisk, OnHub, locate

#: How a worker fetches what is on the Hub: other workers are on other machines, and no byte is to come twice.
OWN_RANGES = FetchOptions(fetch="ranges", disk_budget=None, keep=None)

#: Seconds in which a file that the driver has just made must be seen: a network's file system may be late.
_SEEN_WITHIN = 5.0


@dataclass(frozen=True)
class Posting:
    """Where a worker is to be: the request, with the paths of bank and model as every machine has them, the session that is there, and
    the name of the driver's lease in it."""

    request: BuildRequest
    session: str
    driver: str


def look(posting: Posting) -> None:
    """See whether a build can be joined from this machine. Changes nothing.

    Raises BankError where the bank's folder is not here, is another one or may not be written to; what
    :func:`svdbank.checkpoint.planned.open_planned` raises where the model is not here, or is another one.
    """
    root = posting.request.output
    assert root is not None
    session = root / RECORDS / posting.session
    until = time.monotonic() + _SEEN_WITHIN
    hint = "a build on a cluster needs a folder that all machines share: name it with -o"
    while not (session / WORKERS / posting.driver).exists():
        if time.monotonic() > until:
            what = "is another folder here than where the build was begun" if root.exists() else "is not here"
            raise BankError(f"the bank's folder {root} {what}", hint=hint)
        time.sleep(0.1)
    mark = session / WORKERS / f".{posting.driver}.{socket.gethostname()}.{threading.get_native_id()}{disk.TEMPORARY}"
    try:
        disk.create_mark(mark, b"")
        disk.remove_mark(mark)
    except OSError as cause:
        raise BankError(f"the bank's folder {root} cannot be written to here: {cause.strerror}", hint=hint) from cause
    model = posting.request.model
    if not isinstance(locate(model), OnDisk | OnHub):
        raise CheckpointError(
            f"the model {model} is not here", hint="put it where all machines find it by this path, or name it as on the Hub"
        )
    frozen = frozen_plan(root)
    if frozen is not None and frozen.sources is not None:
        with open_planned(model, frozen.sources, frozen.plan.base):
            return
    with open_checkpoint(model):
        return
