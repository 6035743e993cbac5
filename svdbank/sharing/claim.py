"""Which bank is being put into a folder of an object store: a small file there says so, from the first file that is written to the last."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from svdbank.core import stores
from svdbank.core.errors import LockedError
from svdbank.core.places import InStore

#: The file. Readers of banks do not look at hidden names.
CLAIM = ".push"

#: In the answer of a store that has no conditional requests. There two that begin at one moment may both make the claim, and the first
#: finds the other's when it looks again.
_UNCONDITIONAL = "501 Not Implemented"


class Claim:
    """A folder of a store that takes the bank of one manifest, by its ``digest``, and no other.

    Stores have no locks that end with a process. Two that put the same bank put the same bytes, so the claim names the bank and not the
    process: after one that was stopped, the same command goes on.
    """

    def __init__(self, store: Any, place: InStore, digest: str) -> None:
        self._store = store
        self._place = place
        self._mine = f"{digest}\n".encode()

    def take(self, *, force: bool) -> None:
        """Make the claim; LockedError where another bank's is there, unless ``force`` takes its place."""
        from obstore.exceptions import AlreadyExistsError

        with stores.explained(self._place.address, CLAIM, doing="written"):
            try:
                self._store.put(CLAIM, self._mine, mode="create")
                return
            except AlreadyExistsError:
                pass
            except Exception as cause:
                if _UNCONDITIONAL not in str(cause):
                    raise
            there = self._there()
            if there != self._mine and (there is None or force):
                self._store.put(CLAIM, self._mine)
                there = self._mine
        if there == self._mine:
            return
        raise LockedError(
            f"{self._place.address}: a push of another bank to this place is under way, or was stopped",
            hint="wait until it is done; or, once nobody is at it: --force takes its place",
        )

    def hold(self) -> None:
        """LockedError where the claim is another bank's now, or gone because somebody else brought this bank to its end."""
        if self._there() != self._mine:
            raise LockedError(
                f"{self._place.address}: another push took this place meanwhile; this one puts nothing more there",
                hint="run the same command again once that one is done",
            )

    def give_up(self) -> None:
        """Remove the claim, once all is done."""
        with stores.explained(self._place.address, CLAIM, doing="deleted"), suppress(FileNotFoundError):
            self._store.delete(CLAIM)

    def _there(self) -> bytes | None:
        try:
            with stores.explained(self._place.address, CLAIM):
                return bytes(self._store.get(CLAIM).bytes())
        except FileNotFoundError:
            return None
